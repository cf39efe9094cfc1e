"""Attention over pages with a scale for each token and head: the public function.

Such pages are one more kind of the paged pool, ``Pools`` with scales, so that ``append`` and
``paged_attention`` take them as they take others and a model does not ask which it has. This family
says what they mean (``reference``), makes them of pages of floats, and insists on them. The layout
is that of ``paged_attention.pool``, the numbers are those of ``paged_attention.formats``, and the
implementations are ``paged_attention``'s own.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import Pools, append, paged_attention
from pallas_kernels.quantized_attention.reference import dequantized, quantized

__all__ = ["append", "dequantized", "quantized", "quantized_attention"]


def quantized_attention(
    q: Float[Array, "R T N H"],
    pools: Pools,
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    first: Int[Array, " F"] | None = None,
    window: int | Int[Array, ""] = 0,
    softcap: float = 0.0,
    narrow: bool = False,
    sinks: Float[Array, " M"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "R T N H"]:
    """Computes ``paged_attention`` over pages with scales; see there for all other arguments.

    Softmax and sums are float32, and so are queries, and keys and values once they are loaded and
    scaled, but for ``mosaic``: its tensor cores take bfloat16, or float16 for pages of fp8. Queries
    are rounded to that. The pages' numbers lose nothing by it, and scales multiply scores and
    softmax weights in float32; weights are rounded to 16 bits before they meet the values.

    Args:
        q: Queries.
        pools: With scales.
        table: Pages of each row.
        start: Position of each row's first query.
        length: Real queries of each row.
        layer: Which layer's pages.
        scale: Multiplies the scores.
        first: Of ragged rows: where each one's queries begin among the T places.
        window: Sliding window in tokens; 0 for none.
        softcap: Of the scores; 0 for none.
        narrow: Allows what there is for it; nothing yet of pages with scales.
        sinks: A logit of each query head; None for none.
        implementation: One of ``paged_attention``'s, or ``"auto"`` for the first that accepts.

    Raises:
        ValueError: Shapes, dtypes or numbers that no implementation could take; pools without
            scales.
        ExceptionGroup: Every implementation declined; it holds the reasons.
    """
    if not pools.has_scales:
        raise ValueError(
            f"the pool is {pools.k.dtype} without scales; make it of quantized(), or use "
            "paged_attention for floats"
        )
    return paged_attention(
        q,
        pools,
        table,
        start,
        length,
        layer=layer,
        scale=scale,
        first=first,
        window=window,
        softcap=softcap,
        narrow=narrow,
        sinks=sinks,
        implementation=implementation,
    )
