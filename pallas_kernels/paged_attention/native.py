"""Paged attention and append in C++ on the CPU: each byte of the context is read once.

XLA moves it three times, since it gathers pages into an array before it can multiply them. The
sources beside this file read them where they lie; ``attention.h`` describes the method.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import native
from pallas_kernels.paged_attention.pool import Pools

MAX_HEAD_DIM = 256
MAX_GROUP = 128
"""What the kernel's scratch memory is sized for; attention.h has the same numbers."""


def paged_attention_native(
    q: Float[Array, "R T N H"],
    pools: Pools,
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    first: Int[Array, " B"] | None = None,
    window: int | Int[Array, ""] = 0,
    softcap: float = 0.0,
    narrow: bool = False,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R T N H"]:
    """Computes ``paged_attention``; see there for the arguments.

    Everything is float32 once it is loaded, or less if that is allowed (``pairs.h``). The answer of
    a query has the same bits alone, in any batch, in any chunk and on any number of threads;
    another instruction set may round otherwise.
    """
    _decline(q, pools)
    if sinks is not None:
        raise NotImplementedError("attention sinks are not written for the CPU")
    (out,) = native.call(
        "jaxserve_paged_attention",
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        q,
        pools.k,
        pools.v,
        table,
        start,
        length,
        _or_nothing(first),
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(window, jnp.int32),
        *_scales(pools),
        pages=np.int64(pools.pages),
        scale=np.float32(scale),
        softcap=np.float32(softcap),
        narrow=np.bool_(narrow),
    )
    return out


def _decline(q: Float[Array, "R T N H"], pools: Pools) -> None:
    """Says what the kernel was not written for; runs while tracing only."""
    if reason := native.why_not():
        raise NotImplementedError(reason)
    head_dim, group = q.shape[3], q.shape[2] // pools.k.shape[1]
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    if group > MAX_GROUP:
        raise NotImplementedError(
            f"{group} query heads share a key head, and at most {MAX_GROUP} may"
        )
    dtypes = [jnp.dtype(q.dtype).name]
    if not pools.has_scales:
        dtypes.append(jnp.dtype(pools.k.dtype).name)
    for dtype in dtypes:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise NotImplementedError(f"dtypes are float32, bfloat16 and float16, got {dtype}")
        if dtype == "float16" and native.isa() is native.Isa.PORTABLE:
            raise NotImplementedError("float16 needs AVX2 at least")


def append_native(
    pools: Pools,
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    first: Int[Array, " B"] | None = None,
) -> Pools:
    """Computes ``append``; see there. Padding is not written anywhere, the null page neither.

    Rounds to the pool's format on the way in, to the same bits as ``quantize``.
    """
    scales = _scales(pools)
    dtype = jnp.float32 if scales else pools.k.dtype
    fixed = (
        pools.k,
        pools.v,
        k.astype(dtype),
        v.astype(dtype),
        table,
        start,
        length,
        _or_nothing(first),
        jnp.asarray(layer, jnp.int32),
    )
    written = native.call(
        "jaxserve_append",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pools.k, pools.v, *scales)],
        *fixed,
        *scales,
        aliases={0: 0, 1: 1} | {len(fixed) + i: 2 + i for i in range(len(scales))},
        pages=np.int64(pools.pages),
    )
    return replace(pools, **dict(zip(("k", "v", "k_scale", "v_scale"), written, strict=False)))


def rotate_native(numbers: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Computes ``rotate``, to the same bits."""
    if reason := native.why_not():
        raise NotImplementedError(reason)
    if numbers.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head_dim is at most {MAX_HEAD_DIM}, got {numbers.shape[-1]}")
    exact = numbers.astype(jnp.float32)
    (rotated,) = native.call(
        "jaxserve_rotate", [jax.ShapeDtypeStruct(exact.shape, exact.dtype)], exact
    )
    return rotated.astype(numbers.dtype)


def _scales(pools: Pools) -> tuple[Array, ...]:
    """The last operands of both kernels: of pools with a format their scales, of others nothing."""
    return (pools.k_scale, pools.v_scale) if pools.has_scales else ()


def _or_nothing(first: Int[Array, " B"] | None) -> Int[Array, " F"]:
    """An operand without numbers stands for None."""
    return jnp.zeros(0, jnp.int32) if first is None else first
