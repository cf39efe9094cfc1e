"""What pages with scales mean: pages of the float32 numbers that values and scales stand for."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.paged_attention.formats import INT8, Format, dequantize, quantize, rotate_xla
from pallas_kernels.paged_attention.pool import Pools


def quantized(pools: Pools, format: Format = INT8) -> Pools:
    """Rounds every token and head of a pool of floats, as ``append`` does."""
    k, v = (x.astype(jnp.float32) for x in (pools.k, pools.v))
    if format.rotates_keys:
        k = rotate_xla(k)
    if format.rotates_values:
        v = rotate_xla(v)
    (k, k_scale), (v, v_scale) = quantize(k, format), quantize(v, format)
    return Pools(k=k, v=v, pages=pools.pages, k_scale=k_scale, v_scale=v_scale)


def dequantized(pools: Pools) -> Pools:
    """The pool of float32 that a pool with scales stands for; exact but for the rotation's sums."""
    k, v = dequantize(pools.k, pools.k_scale), dequantize(pools.v, pools.v_scale)
    if pools.rotates_keys:
        k = rotate_xla(k)
    if pools.rotates_values:
        v = rotate_xla(v)
    return Pools(k=k, v=v, pages=pools.pages)
