"""Measures everything that decides the speed on one GPU, in less than nine minutes.

    python -m bench.gpu --out FILE [--traces FOLDER] [--parts decode_8b,serving]
    python -m bench.gpu --dry-run

Needs no network and no checkpoint (weights are random), and beside Python 3.12 what an engine
imports: jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt (0.11.2), flax, jaxtyping, ml_dtypes,
numpy, orbax-checkpoint, tensorstore, gguf, tokenizers, protobuf, googleapis-common-protos, rich and
uvloop, in the versions of ``.ci/requirements.lock`` or near them, with what these need. A machine
without an index gets the missing ones as wheels: ``pip download --no-deps --only-binary=:all:``
where there is one, ``pip install --no-index --no-deps --target FOLDER *.whl`` and
``PYTHONPATH=FOLDER`` where there is none. The package itself runs from its checkout.

The file is renewed after every part. Exit code 1 says that a part failed; 2, that there is no GPU.
``docs/benchmarks.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import common
from bench.common import say
from bench.gpu import report
from bench.gpu.part import DRY_BUDGET_S, DRY_WHOLE_S, PARTS, WHOLE_S, Part
from bench.gpu.process import Outcome, probe, run_part

DRY_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    # Most of a dry run is compiling, and nobody needs its programs to be fast.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts that the arguments select; returns the exit code."""
    arguments = _parse(words)
    start_s = time.monotonic()
    environment = dict(DRY_ENVIRONMENT) if arguments.dry_run else {}
    try:
        machine = probe(environment)
    except RuntimeError as error:
        say(str(error))
        return 2
    if machine["platform"] == "cpu" and not arguments.dry_run:
        say("there is no GPU here, and on a CPU this would take hours; try --dry-run")
        return 2
    document = _document(arguments, machine)
    ends_s = start_s + (DRY_WHOLE_S if arguments.dry_run else WHOLE_S)
    with _ending_cleanly(), _cache(arguments.cache_dir) as cache_dir:
        # Those that launch a model keep their programs anyway; here, kernels and the sampler do.
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache_dir / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        setting = {
            "dry": arguments.dry_run,
            "device_kind": machine["device"],
            "cache_dir": str(cache_dir),
            "traces": None if arguments.traces is None else str(arguments.traces.resolve()),
        }
        for part in arguments.parts:
            outcome = _run(part, setting, ends_s - time.monotonic(), environment)
            document["parts"][part.name] = outcome.as_json()
            document["seconds"] = round(time.monotonic() - start_s, 1)
            if arguments.out is not None:
                report.write(document, arguments.out)
            say(f"{part.name}: {outcome.status} in {outcome.seconds:.1f} s {outcome.reason}")
            if outcome.log:
                say(outcome.log)
    print(report.table(document))
    return int(any(part["status"] == "failed" for part in document["parts"].values()))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Everything that decides the speed on one GPU."
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the JSON file; only a dry run needs none"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every part with tiny sizes on the CPU"
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=PARTS,
        metavar="NAMES",
        help=f"with commas; of {', '.join(part.name for part in PARTS)}",
    )
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="recorded traffic for the part replay"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="keep compiled programs there for the next run (default: made anew, then removed)",
    )
    parser.add_argument("--commit", help="what is measured, where there is no git checkout")
    arguments = parser.parse_args(words)
    if arguments.traces is not None and not arguments.traces.is_dir():
        parser.error(f"--traces {arguments.traces} is no folder")
    if arguments.out is None and not arguments.dry_run:
        parser.error("give --out FILE")
    return arguments


def _parts(text: str) -> tuple[Part, ...]:
    """Reads names, and puts the parts in their usual order."""
    names = set(text.split(","))
    if unknown := names - {part.name for part in PARTS}:
        raise argparse.ArgumentTypeError(f"there is no part {', '.join(sorted(unknown))}")
    return tuple(part for part in PARTS if part.name in names)


def _document(arguments: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "bench": report.BENCH,
        "dry_run": arguments.dry_run,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": arguments.commit or common.commit(),
        "device": machine["device"],
        "machine": machine,
        "versions": common.versions(),
        "seconds": 0.0,
        "parts": {},
    }


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Lets SIGTERM run what stands in ``finally``, or a child would go on without its parent."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _cache(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="bench-gpu-cache-") as made:
        yield Path(made)


def _run(
    part: Part, setting: dict[str, Any], left_s: float, environment: dict[str, str]
) -> Outcome:
    budget_s = min(part.budget_s, left_s, *([DRY_BUDGET_S] if setting["dry"] else []))
    if part.needs_traces and setting["traces"] is None and not setting["dry"]:
        return Outcome(
            status="not asked", reason="no --traces FOLDER was given", budget_s=part.budget_s
        )
    if budget_s <= 0:
        return Outcome(status="failed", reason="no time was left", budget_s=part.budget_s)
    return run_part(part, setting, budget_s=budget_s, environment=environment)


if __name__ == "__main__":
    sys.exit(main())
