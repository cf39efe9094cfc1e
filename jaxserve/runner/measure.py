"""What a launch turns out to take: the bytes that it holds, and the time of a decode step."""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.engine.engine import Runner as StepRunner
from jaxserve.engine.step import COLUMNS, Column, ProgramCall, RowTable, StepInputs, StepShape

TIMED_STEPS = 3

type Spans = dict[Any, set[tuple[int, int]]]
"""First byte and the one past the last of arrays, on each device."""


@dataclass(frozen=True, kw_only=True)
class HeldMemory:
    """Bytes that one device holds; the fullest of this host."""

    parts: dict[str, int]
    """``weights``, ``pages``, ``row state``: arrays by what they are for."""
    arrays_bytes: int
    """Of all arrays that were made since the launch began, whatever they are for."""
    temporary_bytes: int
    """The most that a program needs beside them, as XLA reports."""
    peak_bytes: int
    """The most that the process has used above what it had when the devices had started; of a GPU,
    the most that was in use on the device."""

    @property
    def total_bytes(self) -> int:
        """Arrays and temporaries."""
        return self.arrays_bytes + self.temporary_bytes


class MemoryMeter:
    """Measures what a launch adds to a process. Made when the devices have started."""

    def __init__(self) -> None:
        """Remembers what is held already."""
        self._before = live_spans(jax.live_arrays())
        self._resident_bytes = _resident_bytes()

    def read(self, parts: dict[str, Any], temporary_bytes: int) -> HeldMemory:
        """Measures now.

        Args:
            parts: the pytrees of arrays that are told apart, by name.
            temporary_bytes: what XLA reports of the programs.
        """
        live = live_spans(jax.live_arrays())
        added = {device: covered(live[device] - self._before[device]) for device in live}
        device = max(added, key=lambda device: added[device])
        stats = device.memory_stats() or {}
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._resident_bytes
        return HeldMemory(
            parts={
                name: covered(live_spans(jax.tree.leaves(tree))[device])
                for name, tree in parts.items()
            },
            arrays_bytes=added[device],
            temporary_bytes=temporary_bytes,
            peak_bytes=stats.get("peak_bytes_in_use", resident),
        )


def live_spans(arrays: Iterable[jax.Array]) -> Spans:
    """Returns where arrays lie on the devices of this host."""
    spans: Spans = defaultdict(set)
    for array in arrays:
        for shard in array.addressable_shards:
            begin = shard.data.unsafe_buffer_pointer()
            spans[shard.device].add((begin, begin + shard.data.nbytes))
    return spans


def covered(spans: set[tuple[int, int]]) -> int:
    """Returns the bytes in any of the spans: a layer may be a view of its stack."""
    total, reached = 0, 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def decode_seconds(
    runner: StepRunner, shape: StepShape, *, pages: int, page_tokens: int, rows: int, tokens: int
) -> float:
    """Times a decode step; the median of ``TIMED_STEPS``. Before the first request.

    Args:
        runner: is ready. What it holds in its pages is overwritten.
        shape: of its steps.
        pages: of each data shard, the null page included.
        page_tokens: of each page.
        rows: of each data shard that take part.
        tokens: that each of them has, the new one included.
    """
    inputs = decode_inputs(shape, pages, page_tokens, rows, tokens)
    times_s: list[float] = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        runner.dispatch(inputs).wait()
        times_s.append(time.perf_counter() - start)
    return statistics.median(times_s)


def decode_inputs(
    shape: StepShape, pages: int, page_tokens: int, rows: int, tokens: int
) -> StepInputs:
    """Packs a decode step of greedy rows of one length; see ``decode_seconds`` for the arguments.

    Pages are dealt out in order, and again from the first when there are no more.
    """
    bucket = next(size for size in shape.decode_buckets if size >= rows)
    lines = RowTable(shape).lines.reshape(shape.data_shards, shape.shard_rows, -1)
    order = [min(row, shape.null_row) for row in range(rows)] + [shape.null_row] * (bucket - rows)
    buffer = lines[:, order]
    each = -(-tokens // page_tokens)
    dealt = 1 + np.arange(rows * each, dtype=np.int32) % (pages - 1)
    buffer[:, :rows, Column.START] = tokens - 1
    buffer[:, :rows, Column.LENGTH] = 1
    buffer[:, :rows, Column.SAMPLES] = 1
    buffer[:, :rows, Column.LOGPROBS] = -1  # None; the lines of nobody have 0.
    buffer[:, :rows, COLUMNS : COLUMNS + each] = dealt.reshape(rows, each)
    places = bucket * shape.data_shards
    call = ProgramCall("decode", (bucket, 1), buffer.reshape(places, -1))
    return StepInputs([call], [], places, rows * shape.data_shards)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
