"""Compiles the GPU kernels for an H200 that is not there, and reads what the machine code is like.

    python -m bench.compiled                 check every case; prints the table
    python -m bench.compiled --only decode   those whose family or name has this in it
    python -m bench.compiled --every 10 of each family one case in ten
    python -m bench.compiled --record        and write RECORD and TABLE anew; of all cases

It takes the wheels of the extra ``aot-gpu``: `make prove-compile` fetches them. A case fails when
it does not compile, when a kernel spills registers, when instructions that it declares are missing,
when what it donates is copied, or when it takes more launches than it says. The record is for
reading and for comparing: registers and shared memory may change, and then it is written anew.

The process compiles and does nothing else; the interpreter of GPU kernels runs in another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before JAX is imported: nothing runs here, and Mosaic dumps what it compiles.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# A directory of our own: what is in it is removed before each case, and it at the end.
DUMPS = tempfile.TemporaryDirectory(prefix="mosaic-")
DUMP = Path(DUMPS.name)
os.environ["MOSAIC_GPU_DUMP_TO"] = DUMPS.name

import jax  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from bench.machine_code import faults_of, kernels_of, launches_of, table  # noqa: E402
from jaxserve.planning import aot  # noqa: E402
from jaxserve.planning.devices import device_facts  # noqa: E402
from pallas_kernels.compiling import CompileCase, all_cases  # noqa: E402
from sharding.mesh import MeshShape  # noqa: E402

DEVICE = "h200"
NOT_INSTALLED = 3
"""The exit status where nothing can be compiled."""
ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "compiled-h200.json"
TABLE = ROOT / "docs" / "kernels-compiled.md"


def compile_case(case: CompileCase, mesh: Mesh) -> dict[str, Any]:
    """Compiles one case and returns its row of the table.

    Raises:
        ValueError: The machine code is not what the case says; names what is wrong.
        Exception: It does not compile.
    """
    for path in DUMP.iterdir():
        path.unlink()
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), case.arguments
    )
    began = time.monotonic()
    with jax.set_mesh(mesh):
        jitted = jax.jit(case.function, donate_argnums=case.donated)
        compiled = jitted.lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    row = {
        "seconds": round(time.monotonic() - began, 1),
        "kernels": kernels_of(DUMP),
        "launches": launches_of(compiled.as_text() or ""),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
    }
    donated = [arguments[i] for i in case.donated]
    donated_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(donated))
    if wrong := faults_of(case, row, donated_bytes):
        raise ValueError("; ".join(wrong))
    return row


def main(words: Sequence[str] | None = None) -> int:
    """Compiles, prints, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose family or name has this in it")
    parser.add_argument(
        "--every", type=_above_0, default=1, help="of each family one case in so many"
    )
    parser.add_argument("--record", action="store_true", help="write the record and the table anew")
    options = parser.parse_args(words)
    if options.record and (options.only or options.every > 1):
        parser.error("--record writes what became of all cases: leave out --only and --every")
    facts, shape = device_facts(DEVICE), MeshShape()
    if reason := aot.why_not(facts, shape):
        print(f"{reason}; `make prove-compile` fetches what it takes", file=sys.stderr)
        return NOT_INSTALLED
    mesh = aot.absent_mesh(facts, shape)
    cases = {
        f"{family}: {case.name}": case
        for family, some in all_cases().items()
        for case in some[:: options.every]
    }
    rows, failed = {}, 0
    for name, case in cases.items():
        if options.only not in name:
            continue
        try:
            rows[name] = compile_case(case, mesh)
        except Exception as error:
            failed += 1
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        else:
            print(f"ok   {name}: {_short(rows[name])}", flush=True)
    print(f"{len(rows)} of {len(rows) + failed} compiled as they should")
    if options.record and failed:
        print("nothing is recorded, because of the failures above", file=sys.stderr)
    elif options.record:
        kept = {
            name: {k: v for k, v in row.items() if k != "seconds"} for name, row in rows.items()
        }
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
        TABLE.write_text(table(kept))
    return 1 if failed else 0


def _above_0(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"give a whole number above 0, got {text!r}")
    return int(text)


def _short(row: dict[str, Any]) -> str:
    kernels = (
        f"{kernel['name']} {kernel['registers']} registers, {kernel['shared_bytes']} shared, "
        f"{kernel['instructions']}"
        for kernel in row["kernels"]
    )
    return f"{row['seconds']} s; {'; '.join(kernels)}; launches {row['launches']}"


if __name__ == "__main__":
    sys.exit(main())
