"""Measures paged attention over the shapes of ``cases.SERVING``: one JSON line per measurement.

    python -m bench.kernels [--dtype bfloat16] [--only decode] [--out FILE]
    python -m bench.kernels --device gpu ...    another script: the kernels for Hopper, bench/hopper

Each line says the microseconds of one layer (append and attend), the bytes that layer cannot avoid
moving, the share that is of the copy bandwidth reached just before and after, and the arithmetic
rate, which is what limits a prompt's chunk. A case of a few megabytes lives in the cache, so its
share can pass 1; on a machine that others use, compare only lines of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.paged_attention import (
    FORMATS,
    IMPLEMENTATIONS,
    POOL_DTYPES,
    append,
    cell_bytes,
    paged_attention,
)
from pallas_kernels.paged_attention.cases import LAYER, SERVING, Case, Inputs
from pallas_kernels.quantized_attention.cases import arrays

COPY_BYTES = 256 * 2**20
"""Well past any cache, so that the copy measures memory."""

REPEATS = 7


def main() -> None:
    """Runs the cases that the arguments select."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    chosen, words = chooser.parse_known_args()
    if chosen.device == "gpu":
        from bench.hopper import run

        sys.exit(run.main(words))
    parser = argparse.ArgumentParser(
        description="Measures the kernels of cases.SERVING.", parents=[chooser]
    )
    parser.add_argument("--dtype", choices=(*POOL_DTYPES, *FORMATS), default="float32")
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="blocked" if native.why_not() else "native",
    )
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    arguments = parser.parse_args()

    for line in measurements(arguments.dtype, arguments.implementation, arguments.only):
        text = json.dumps(line)
        print(text, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(text + "\n")


def measurements(dtype: str, implementation: str, only: str) -> Iterator[dict[str, object]]:
    """Measures each selected case between two copies."""
    origin = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "commit": commit(),
    }
    for case in SERVING:
        if only not in case.name:
            continue
        before = copy_bytes_per_s()
        format = FORMATS.get(dtype)  # Of pages; queries and answers are float32 then.
        if format is not None:
            inputs = arrays(case, seed=0, format=format)
        else:
            inputs = case.arrays(seed=0, dtype=dtype)
        writes = "native" if implementation == "native" else "scatter"
        seconds = best_seconds(layer_step(case, inputs, implementation, writes))
        bandwidth = max(before, copy_bytes_per_s())
        moved = bytes_moved(case, inputs.pools.k.dtype, inputs.q.dtype)
        yield {
            "kernel": "paged_attention",
            "case": case.name,
            "implementation": implementation,
            "dtype": dtype,
            "microseconds": round(seconds * 1e6, 1),
            "bytes_moved": moved,
            "copy_gb_per_s": round(bandwidth / 1e9, 2),
            "share_of_copy_bandwidth": round(moved / seconds / bandwidth, 3),
            "gflop_per_s": round(operations(case) / seconds / 1e9, 1),
            **origin,
        }


def layer_step(
    case: Case, inputs: Inputs, implementation: str, writes: str
) -> Callable[[], jax.Array]:
    """One layer's append and attention, compiled, with the pool donated from call to call.

    Args:
        case: which shape.
        inputs: its arrays; donated, do not use them again.
        implementation: of attention.
        writes: implementation of ``append``.
    """

    @partial(jax.jit, donate_argnames="pools")
    def step(q, pools, table, start, length):
        new = q[:, :, : case.kv_heads]
        pools = append(
            pools,
            new,
            new,
            table,
            start,
            length,
            layer=LAYER,
            implementation=writes,
        )
        out = paged_attention(
            q,
            pools,
            table,
            start,
            length,
            layer=LAYER,
            scale=case.scale,
            implementation=implementation,
        )
        return out, pools

    def run() -> jax.Array:
        nonlocal inputs
        out, pools = step(*inputs)
        inputs = Inputs(inputs.q, pools, inputs.table, inputs.start, inputs.length)
        return out

    return run


def bytes_moved(case: Case, dtype: jnp.dtype, q_dtype: jnp.dtype) -> int:
    """Keys and values of every row's context once, plus queries, new cells and answers."""
    context_tokens = sum(row.start + row.length for row in case.rows)
    new_tokens = sum(row.length for row in case.rows)
    cells = 2 * case.kv_heads * (context_tokens + new_tokens)
    vectors = 2 * case.q_heads * new_tokens
    return cells * cell_bytes(case.head_dim, dtype) + vectors * case.head_dim * q_dtype.itemsize


def operations(case: Case) -> int:
    """Multiplications and additions of both products, over the keys that each query sees."""
    seen = sum(row.start + t + 1 for row in case.rows for t in range(row.length))
    return 4 * case.q_heads * case.head_dim * seen


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a large copy, both directions counted."""
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    # An addition, since XLA could alias what is only copied.
    copy = jax.jit(lambda x: x + 1.0)
    return 2 * COPY_BYTES / best_seconds(lambda: copy(source))


def best_seconds(run: Callable[[], jax.Array]) -> float:
    """Fastest of a few calls after one that compiles: noise only ever adds time."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def commit() -> str:
    """The commit measured; ``unknown`` outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    main()
