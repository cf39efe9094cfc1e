"""One case: its answers against the reference's, then the time of a call with cold memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.hopper.kernels import KernelCase

TOLERANCE = 2e-2
"""Norm of the difference of a head's or row's answer over the norm of all such in the mean."""
REPEATS = 7
LOOP_S = 0.01
MOST_CALLS = 500
CALL_S = 5e-6
"""What a call takes beyond the limit, as far as the number of calls is to be guessed."""


def measure(
    case: KernelCase,
    rates: dict[str, float],
    *,
    dry: bool,
    config: Any = None,
    expected: list[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Compares one case, and times it if it is right.

    Args:
        case: The case.
        rates: Of ``_rates``.
        dry: Whether kernels are interpreted; then a loop has one call.
        config: A tiling to try.
        expected: The reference's answers, where they are known already.
    """
    state = case.state()
    if expected is None:
        expected = reference(case, state)
    with interpreted() if dry else contextlib.nullcontext():
        try:
            once = partial(case.step, layer=1, implementation="mosaic", config=config)
            found = jax.jit(once)(state)
            error = _error(list(map(_float, case.answers(found))), expected)
        except Exception as failure:
            return _failed(failure)
        if not error < TOLERANCE:
            return {"wrong": f"answers are off by {error:.2g}, and {TOLERANCE:g} is tolerated"}
        del found
        least_s = max(case.moved / rates["copy_bytes_per_s"], case.flops / rates["flops_per_s"])
        calls = 1 if dry else max(1, min(MOST_CALLS, int(LOOP_S / (least_s + CALL_S))))
        step = partial(case.step, implementation="mosaic", config=config)
        try:
            seconds = _seconds(step, case, state, calls, 0 if dry else REPEATS)
        except Exception as failure:  # Such as a loop that does not fit the device's memory.
            return _failed(failure)
    median_s = statistics.median(seconds)
    return {
        "error": round(error, 6),
        "microseconds": round(median_s * 1e6, 2),
        "spread": [round(min(seconds) * 1e6, 2), round(max(seconds) * 1e6, 2)],
        "bytes": case.moved,
        "flops": case.flops,
        "share": round(least_s / median_s, 4),
        "calls": calls,
    }


def _failed(failure: Exception) -> dict[str, Any]:
    return {"wrong": f"{type(failure).__name__}: {str(failure)[:300]}"}


def reference(case: KernelCase, state: Any) -> list[np.ndarray]:
    """The reference's answers over the same rounded numbers."""
    step = partial(case.step, layer=1, implementation="reference", config=None)
    return list(map(_float, case.answers(jax.jit(step)(state))))


def _float(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def _error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The worst vector's difference over the size of the usual one."""
    worst = 0.0
    for here, there in zip(found, expected, strict=True):
        if not (np.isfinite(here).all() and np.isfinite(there).all()):
            return float("inf")
        usual = np.sqrt(np.mean(np.sum(there**2, axis=-1)))
        worst = max(worst, float(np.max(np.linalg.norm(here - there, axis=-1)) / usual))
    return worst


def _seconds(
    step: Callable[..., Any], case: KernelCase, state: Any, calls: int, repeats: int
) -> list[float]:
    """Seconds of a call in each of some loops after one that compiles; of none: in that one."""

    def loop(state: Any) -> Any:
        return jax.lax.fori_loop(
            0, calls, lambda i, carried: step(carried, jax.lax.rem(i, case.layers)), state
        )

    run = jax.jit(loop, donate_argnums=0)
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        state = jax.block_until_ready(run(state))
        seconds.append((time.perf_counter() - began) / calls)
    return seconds[1:] or seconds


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """What is traced in here is for an H200, and interpreted on the CPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=2)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
        yield
