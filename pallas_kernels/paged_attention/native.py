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


def append_native(
    pools: Pools,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
) -> Pools:
    """Computes ``append``; see there. Padding is not written anywhere, the null page neither."""
    pool = jax.ShapeDtypeStruct(pools.k.shape, pools.k.dtype)
    k_pool, v_pool = native.call(
        "jaxserve_append",
        [pool, pool],
        pools.k,
        pools.v,
        k.astype(pools.k.dtype),
        v.astype(pools.v.dtype),
        table,
        start,
        length,
        jnp.asarray(layer, jnp.int32),
        aliases={0: 0, 1: 1},
        pages=np.int64(pools.pages),
    )
    return replace(pools, k=k_pool, v=v_pool)
