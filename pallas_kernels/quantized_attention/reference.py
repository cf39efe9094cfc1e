"""What pages of int8 mean: pages of the float32 numbers that values and scales stand for."""

from __future__ import annotations

from pallas_kernels.paged_attention.int8 import dequantize, quantize
from pallas_kernels.paged_attention.pool import Pools


def quantized(pools: Pools) -> Pools:
    """Rounds every token and head of a pool of floats, as ``append`` does."""
    (k, k_scale), (v, v_scale) = quantize(pools.k), quantize(pools.v)
    return Pools(k=k, v=v, pages=pools.pages, k_scale=k_scale, v_scale=v_scale)


def dequantized(pools: Pools) -> Pools:
    """The pool of float32 that a pool of int8 stands for; exact."""
    return Pools(
        k=dequantize(pools.k, pools.k_scale),
        v=dequantize(pools.v, pools.v_scale),
        pages=pools.pages,
    )
