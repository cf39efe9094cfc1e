"""The device by itself: what it copies and multiplies, and what it costs to ask it for anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.part import Number, Setting
from bench.gpu.timing import seconds_per_call

ROWS = (1, 8, 64, 256)
EMBED, FFN = 4096, 14336
"""Of a model of 8B parameters."""
WEIGHTS = 4
"""Matrices in turn, so that none is still in the device's cache when it is needed again."""
ARGUMENTS = (1, 16, 64, 256, 512)
"""A stacked model hands over about 20 arrays a step, an unrolled one of 32 layers about 300."""


def ceilings(setting: Setting) -> Iterator[Number]:
    """Copy bandwidth, and the rate of matrix products: large ones, and those of a decode step."""
    yield _copy(setting)
    yield from _host_copies(setting)
    size = setting.pick(8192, 256)
    for dtype in ("bfloat16", "float32"):
        yield _product(setting, dtype, (size, size, size), f"product {dtype}")
    for rows in setting.pick(ROWS, ROWS[:2]):
        shape = (rows, setting.pick(EMBED, 128), setting.pick(FFN, 256))
        yield _product(setting, "bfloat16", shape, f"product bfloat16 of {rows} rows")


def _copy(setting: Setting) -> Number:
    """Reads and writes once: an addition, since XLA could alias what is only copied."""
    count = setting.pick(2**31, 2**20)
    source = jax.random.normal(jax.random.key(0), (count // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    seconds = seconds_per_call(lambda: copy(source), calls=setting.pick(10, 2))
    limit = None if setting.facts is None else setting.facts.memory_bytes_per_s / 1e9
    return Number("copy on the device", 2 * count / seconds / 1e9, "GB/s", limit)


def _host_copies(setting: Setting) -> Iterator[Number]:
    """Between host and device, of memory that is not pinned, as weights are loaded."""
    array = np.random.default_rng(0).random(setting.pick(2**26, 2**16), np.float32)
    to_device_s, to_host_s = math.inf, math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        there = jax.block_until_ready(jax.device_put(array))
        middle_s = time.perf_counter()
        np.array(there)
        to_device_s = min(to_device_s, middle_s - start_s)
        to_host_s = min(to_host_s, time.perf_counter() - middle_s)
    yield Number("copy to the device", array.nbytes / to_device_s / 1e9, "GB/s")
    yield Number("copy to the host", array.nbytes / to_host_s / 1e9, "GB/s")


def _product(setting: Setting, dtype: str, shape: tuple[int, int, int], name: str) -> Number:
    """A product of random numbers: zeros would draw less power, and so run faster."""
    rows, inner, columns = shape
    left_key, *keys = jax.random.split(jax.random.key(1), 1 + WEIGHTS)
    left = jax.random.normal(left_key, (rows, inner), jnp.dtype(dtype))
    weights = cycle([jax.random.normal(key, (columns, inner), jnp.dtype(dtype)) for key in keys])
    multiply = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
    calls = setting.pick(20, 2)
    seconds = seconds_per_call(lambda: multiply(left, next(weights)), calls=calls)
    flops = 2 * rows * inner * columns
    limit = None
    if setting.facts is not None:
        moved = (rows * inner + inner * columns + rows * columns) * jnp.dtype(dtype).itemsize
        least_s = max(
            flops / setting.facts.flops_per_s[dtype], moved / setting.facts.memory_bytes_per_s
        )
        limit = flops / least_s / 1e12
    return Number(name, flops / seconds / 1e12, "TFLOP/s", limit)


def dispatch(setting: Setting) -> Iterator[Number]:
    """What a call costs the host, by how many arrays go in, and with one that the host hands over.

    Every program is so small that the host is what takes the time.
    """
    calls = setting.pick(500, 20)
    for count in setting.pick(ARGUMENTS, ARGUMENTS[:3]):
        arrays = [jnp.full((8,), number, jnp.float32) for number in range(count)]
        program = jax.jit(_first, keep_unused=True).lower(*arrays).compile()
        seconds = seconds_per_call(partial(program, *arrays), calls=calls)
        yield Number(f"call with {count} arrays", seconds * 1e6, "us")
    packed = np.zeros((64, 300), np.int32)
    program = jax.jit(_first, keep_unused=True).lower(packed).compile()
    seconds = seconds_per_call(lambda: program(packed), calls=calls)
    yield Number("call with an array of the host", seconds * 1e6, "us")
    small = jnp.zeros((64, 43), jnp.int32)
    step = jax.jit(lambda x: x + 1).lower(small).compile()
    start_s = time.perf_counter()
    for _ in range(calls):
        np.asarray(step(small))
    yield Number("call and read 11 KB", (time.perf_counter() - start_s) / calls * 1e6, "us")


def _first(first: Any, *_: Any) -> Any:
    return first + 1
