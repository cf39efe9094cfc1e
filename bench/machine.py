"""What this machine is and can do, and how much of it others used while something was measured.

    python -m bench.machine

The rates are measured through JAX in a process of their own (``measured``), so that the process
that serves keeps its own JAX settings and its count of compilations.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

READ_BYTES = 256 * 2**20
"""Well past any cache."""
MATRIX_SIZE = 1024
REPEATS = 7
NOISE_CORES = 0.15
"""A run beside which others used more is disturbed: spinning threads can lose a factor of ten."""
PROC = Path("/proc")


def measured() -> dict[str, Any]:
    """Measures in a fresh process; takes a few seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.machine"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the machine failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> dict[str, Any]:
    """Measures in this process; every rate is the best of ``REPEATS``."""
    import jax
    import jax.numpy as jnp

    flat = jnp.ones(READ_BYTES // 4, jnp.float32)
    read_s = _best_seconds(jax.jit(jnp.sum), flat)

    def matrix_rate(dtype: Any) -> float:
        # Both operands contiguous along the summed axis, as weights stored [out, in] are.
        left = jnp.ones((MATRIX_SIZE, MATRIX_SIZE), dtype)
        product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
        return 2 * MATRIX_SIZE**3 / _best_seconds(product, left, left) / 1e12

    flags = cpu_info("flags").split()
    return {
        "cpu": cpu_info("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "has_amx": "amx_bf16" in flags,
        "device": jax.devices()[0].device_kind,
        "read_gb_per_s": round(READ_BYTES / read_s / 1e9, 2),
        "f32_tflop_per_s": round(matrix_rate(jnp.float32), 3),
        "bf16_tflop_per_s": round(matrix_rate(jnp.bfloat16), 3),
    }


def _best_seconds(program: Callable[..., Any], *arguments: Any) -> float:
    program(*arguments).block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        program(*arguments).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_info(name: str) -> str:
    """Returns what the kernel says of the first CPU under a name; empty where it says nothing."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class OtherLoad:
    """CPU time used since it was made by processes outside this one's tree and other trees."""

    def __init__(self, roots: Iterable[int] = ()) -> None:
        """Starts counting; ``roots`` are processes that belong to the measurement too."""
        self._roots = {os.getpid(), *roots}
        self._start_s = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), _tree_s(self._roots)

    def cores(self) -> float | None:
        """Returns the mean number of cores that others kept busy; None where /proc is missing."""
        busy_s = _busy_s()
        if busy_s is None or self._busy_s is None:
            return None
        wall_s = max(1e-9, time.perf_counter() - self._start_s)
        own_s = _tree_s(self._roots) - self._own_s
        return round(max(0.0, busy_s - self._busy_s - own_s) / wall_s, 3)


def listener_pid(address: str) -> int | None:
    """Returns the process on this machine that listens on ``HOST:PORT``; None for any other."""
    host, _, port = address.rpartition(":")
    if host.strip("[]") not in ("127.0.0.1", "localhost", "::1", "0.0.0.0") or not port.isdecimal():
        return None
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(int(port))}
    for process in PROC.glob("[0-9]*"):
        try:
            if any(os.readlink(file) in sockets for file in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue  # Gone, or somebody else's.
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set[str]()
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def _busy_s() -> float | None:
    """CPU seconds of the whole machine since it started, idle and waiting for disks left out."""
    try:
        line = (PROC / "stat").read_text().partition("\n")[0]
    except OSError:
        return None
    ticks = [int(field) for field in line.split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _tree_s(roots: Iterable[int]) -> float:
    """CPU seconds of processes, their descendants, and those of these that have ended."""
    stats = process_stats()
    ticks = [sum(map(int, stats[one][11:15])) for one in descendants(roots, stats) if one in stats]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def process_stats() -> dict[int, list[str]]:
    """Returns every process with what the kernel says of it: state, parent, group, session, ..."""
    stats: dict[int, list[str]] = {}
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):  # Gone meanwhile.
            stats[int(process.name)] = (process / "stat").read_text().rpartition(")")[2].split()
    return stats


def descendants(roots: Iterable[int], stats: Mapping[int, Sequence[str]]) -> list[int]:
    """Returns processes and those that they started, directly or not, each once."""
    children: dict[int, list[int]] = {}
    for process_id, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(process_id)
    found, todo = dict[int, None](), list(roots)
    while todo:
        process_id = todo.pop()
        if process_id not in found:
            found[process_id] = None
            todo += children.get(process_id, [])
    return list(found)


if __name__ == "__main__":
    print(json.dumps(measure()))
