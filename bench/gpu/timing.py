"""Seconds of a call: the host starts several without waiting, as a server does, then waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

REPEATS = 5


def seconds_per_call(run: Callable[[], Any], *, calls: int) -> float:
    """Returns the median over ``REPEATS`` of the mean time of calls back to back.

    Args:
        run: starts the work and returns its arrays; called twice before, so that it is compiled.
        calls: so many that the time of one wait does not count.
    """
    jax.block_until_ready(run())
    jax.block_until_ready(run())
    times_s = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        for _ in range(calls - 1):
            run()
        jax.block_until_ready(run())
        times_s.append((time.perf_counter() - start_s) / calls)
    return statistics.median(times_s)
