"""What pages of int8 mean: pages of the float32 numbers that values and scales stand for."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.int8 import dequantize, quantize
from pallas_kernels.paged_attention.pool import Pools
from pallas_kernels.paged_attention.reference import paged_attention_reference


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


def quantized_attention_reference(
    q: Float[Array, "B T N H"],
    pools: Pools,
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    window: int | Int[Array, ""] = 0,
    softcap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Defines ``quantized_attention``; see there for the arguments."""
    return paged_attention_reference(
        q,
        dequantized(pools),
        table,
        start,
        length,
        layer=layer,
        scale=scale,
        window=window,
        softcap=softcap,
    )
