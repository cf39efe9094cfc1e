"""What a person who watches the engine sees: one JSON event about every half second.

Numbers come from where ``/metrics`` has them. Percentiles are of the last minute, or of all time
while nothing has happened in it. The pool's map has one cell for one page, or, where the pool is
large, one for several.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.engine.measures import EngineMeasures, HistogramSnapshot
from jaxserve.engine.page_states import CACHED
from jaxserve.engine.stats import EngineStats
from jaxserve.frontend.engine_api import EngineApi

MAX_CELLS = 2048
"""Of the map: 6 KiB an event, and about what can be told apart on a screen."""
WINDOW_S = 60.0
WINDOW_PARTS = 12
"""Snapshots that are kept of a window, so that it is at most this part of it too long."""
SHARES = (0.5, 0.95, 0.99)
LATENCIES = ("time_to_first_token", "inter_token_latency", "end_to_end", "queue")


class LiveView:
    """Makes events while somebody watches. One thread; ``clear`` when the last one has left."""

    def __init__(self, engine: EngineApi, clock: Callable[[], float] = time.monotonic) -> None:
        """Looks at ``engine``; asks it for nothing yet."""
        self._engine = engine
        self._clock = clock
        self._earlier: deque[tuple[float, EngineMeasures]] = deque()

    def clear(self) -> None:
        """Forgets the window, which nobody is going to extend."""
        self._earlier.clear()

    def event(self, pages: Sequence[np.ndarray] | None) -> dict[str, Any]:
        """Returns what to show now.

        Args:
            pages: the pool's states by data shard; None when the engine did not say.
        """
        now, stats, seen = self._clock(), self._engine.stats(), self._engine.measures()
        earlier = self._window(now, seen)
        health = self._engine.health()
        return {
            "health": {"serving": health.serving, "detail": health.detail},
            "rows": {"running": stats.rows_running, "max": stats.rows_max},
            "queue": {
                "requests": stats.requests_waiting,
                "tokens": stats.tokens_waiting,
                "age_seconds": stats.queue_age_seconds,
            },
            "tokens": {
                "per_second": stats.output_tokens_per_second,
                "output_total": stats.output_tokens_total,
                "prompt_total": stats.prompt_tokens_total,
            },
            "prefix": _prefix(stats),
            "latency": {
                name: _quantiles(getattr(seen, name), getattr(earlier, name, None))
                for name in LATENCIES
            },
            "phases": _phases(seen.phase_seconds, earlier and earlier.phase_seconds),
            "counts": {
                "steps": stats.steps_total,
                "accepted": stats.requests_accepted_total,
                "finished": sum(stats.requests_finished_total.values()),
                "preemptions": stats.preemptions_total,
                "compiles_after_ready": stats.compiles_after_ready,
                "padding": stats.padding_waste,
            },
            "pages": {
                "total": stats.pages_total,
                "page_tokens": stats.page_tokens,
                **(_pool(stats) if pages is None else pool_map(pages)),
            },
        }

    def _window(self, now: float, seen: EngineMeasures) -> EngineMeasures | None:
        """What was seen a minute ago, or, watched for less, at first; None at the very first."""
        earlier = self._earlier
        if not earlier or now - earlier[-1][0] >= WINDOW_S / WINDOW_PARTS:
            earlier.append((now, seen))
        while len(earlier) > 1 and now - earlier[1][0] >= WINDOW_S:
            earlier.popleft()
        first = earlier[0][1]
        return None if first is seen else first


def _prefix(stats: EngineStats) -> dict[str, Any]:
    lookup = sum(shard.prefix_lookup_tokens for shard in stats.data_shards)
    hit = sum(shard.prefix_hit_tokens for shard in stats.data_shards)
    return {"lookup_tokens": lookup, "hit_tokens": hit, "rate": stats.prefix_hit_rate}


def _quantiles(seen: HistogramSnapshot, earlier: HistogramSnapshot | None) -> dict[str, Any]:
    recent = seen if earlier is None else seen.since(earlier)
    shown = recent if recent.count else seen
    return {
        "recent": earlier is not None and shown is recent,
        "count": shown.count,
        "total": seen.count,
        "least": seen.bounds[0],
        "seconds": [shown.quantile(share) for share in SHARES],
    }


def _phases(
    seen: Mapping[str, HistogramSnapshot], earlier: Mapping[str, HistogramSnapshot] | None
) -> dict[str, float | None]:
    """Mean seconds of each phase; None for one that has never been."""
    means: dict[str, float | None] = {}
    for phase, all_time in seen.items():
        recent = all_time.since(earlier[phase]) if earlier else all_time
        shown = recent if recent.count else all_time
        means[phase] = shown.sum / shown.count if shown.count else None
    return means


def _pool(stats: EngineStats) -> dict[str, Any]:
    """The pool in numbers alone."""
    return {
        "free": stats.pages_free,
        "used": stats.pages_used,
        "cached": stats.pages_cached,
        "shared": None,
        "map": None,
    }


def pool_map(shards: Sequence[np.ndarray]) -> dict[str, Any]:
    """Counts and draws a picture of the pool; see ``page_states`` for what is in it.

    The map is base64 of three bytes a cell: 255 times the share of its pages that one sequence
    holds, that several share, and that are cached. What is left is free.
    """
    states = np.concatenate(shards)
    kinds = np.stack(
        [states == 1, (states > 1) & (states < CACHED), states == CACHED], axis=1
    ).astype(np.int64)
    used, shared, cached = kinds.sum(axis=0).tolist()
    per_cell = max(1, -(-len(states) // MAX_CELLS))
    starts = np.arange(0, len(states), per_cell)
    sizes = np.diff(starts, append=len(states))
    cells = np.add.reduceat(kinds, starts, axis=0) * 255 // sizes[:, None]
    return {
        "free": len(states) - used - shared - cached,
        "used": used + shared,
        "cached": cached,
        "shared": shared,
        "map": {
            "pages_per_cell": per_cell,
            "cells": base64.b64encode(cells.astype(np.uint8).tobytes()).decode(),
        },
    }
