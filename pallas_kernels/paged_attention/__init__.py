"""Attention of new tokens over the paged key/value pool: the public function and the pool.

``pool`` owns the layout and ``reference`` the meaning; ``mosaic`` is the fast way on a Hopper GPU,
``native`` on a CPU, and ``blocked`` anywhere else. Projections, rotary positions and the mesh are
the model's business; which page belongs to whom is the engine's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.paged_attention.append_mosaic import rope_append_mosaic
from pallas_kernels.paged_attention.blocked import paged_attention_blocked
from pallas_kernels.paged_attention.checks import (
    POOL_DTYPES,
    check_attention,
    check_new_tokens,
    check_places,
    check_rope,
)
from pallas_kernels.paged_attention.formats import (
    FORMATS,
    SCALE_DTYPE,
    Format,
    cell_bytes,
    format_of,
    rotate_product,
    rotate_xla,
)
from pallas_kernels.paged_attention.mosaic import paged_attention_mosaic
from pallas_kernels.paged_attention.native import (
    append_native,
    paged_attention_native,
    rotate_native,
)
from pallas_kernels.paged_attention.pool import (
    NULL_PAGE,
    Pools,
    abstract_pools,
    append_scatter,
    pool_shape,
)
from pallas_kernels.paged_attention.ragged import places_of
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.rope import apply_rope

__all__ = [
    "FORMATS",
    "NULL_PAGE",
    "POOL_DTYPES",
    "SCALE_DTYPE",
    "Format",
    "Pools",
    "abstract_pools",
    "append",
    "apply_rope",
    "cell_bytes",
    "format_of",
    "paged_attention",
    "places_of",
    "pool_shape",
    "rope_append",
    "rotate",
]

IMPLEMENTATIONS = {
    "mosaic": paged_attention_mosaic,
    "native": paged_attention_native,
    "blocked": paged_attention_blocked,
    "reference": paged_attention_reference,
}
"""By name, best first."""

APPENDS = {"native": append_native, "scatter": append_scatter}
"""Of ``append``, by name, best first."""

ROTATIONS = {"native": rotate_native, "product": rotate_product, "xla": rotate_xla}
"""Of what ``rotate`` does, by name, best first."""


def paged_attention(
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
    """Attends from each row's new tokens to that row's pages, causally.

    Query ``t`` of row ``b`` stands at position ``start[b] + t`` and sees positions 0 to its own, or
    the last ``window`` of them. Its key and value must be in the pool already (``append`` first).
    Softmax and sums are float32 whatever the dtypes; the result has the dtype of ``q``. Pages with
    scales stand for what their values times their scales are (``formats``); of int4 they stand
    rotated, and so implementations get rotated queries and give rotated answers.

    Args:
        q: Queries, rotated already and not scaled; ``R = B``: T places for each row, or, with
            ``first``, ``R = 1``: T places that all rows share. A whole KV group stands together:
            query head ``n`` uses key/value head ``n // (N // K)``.
        pools: Read only. Cells that a row does not see may hold anything, NaN included.
        table: Pages of each row in position order; unused entries are ``NULL_PAGE``.
        start: Position of each row's first query.
        length: Real queries of each row, 0 for a padding row. Answers at other places are zeros.
        layer: Which layer's pages; a Python int or a traced scalar.
        scale: Multiplies the scores, ``head_dim ** -0.5`` in most models.
        first: Of ragged rows: where each one's queries begin among the T places. None: every row
            has places of its own, and its queries begin at the first.
        window: Sliding window in tokens, the query's own included; 0 for none. May be traced.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 for none.
        narrow: Allows native attention over bfloat16 pages to round queries, and the softmax's
            numerators, to bfloat16, where the CPU is faster so; sums stay float32.
        sinks: A logit for each query head that joins the denominator of its softmaxes, as a key
            would that no query sees and whose value is zero (gpt-oss). Neither scaled nor capped.
        implementation: A name in ``IMPLEMENTATIONS``, or ``"auto"`` for the first that accepts.

    Raises:
        ValueError: Shapes, dtypes or numbers that no implementation could take.
        ExceptionGroup: Every implementation declined; it holds the reasons.
    """
    check_attention(q, pools, scale=scale, window=window, softcap=softcap, sinks=sinks)
    check_places("queries", q.shape[0], table, start, length, first)
    with jax.named_scope("paged_attention"):
        out = dispatch(
            "paged_attention",
            IMPLEMENTATIONS,
            implementation,
            rotate(q) if pools.rotates_keys else q,
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
        )
        return rotate(out) if pools.rotates_values else out


def append(
    pools: Pools,
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    first: Int[Array, " F"] | None = None,
    implementation: str = "auto",
) -> Pools:
    """Writes new keys and values of one layer into the pages of their rows.

    Token ``t`` of row ``b`` goes to position ``start[b] + t``. Tokens from ``length[b]`` on are
    padding and go to the null page or nowhere, as does a position that the table has no entry for,
    so that no mistake of a caller can overwrite the page of another sequence.

    Args:
        pools: Updated in place when the caller's ``jit`` donates them: do not use again.
        k: New keys, with their positions' rotation already; cast to the pool's dtype, or rounded to
            its format with a scale for each token and head. ``R`` is as for the queries of
            ``paged_attention``.
        v: New values; as ``k``.
        table: Pages of each row in position order; unused entries are ``NULL_PAGE``.
        start: Position of each row's first new token.
        length: Real new tokens of each row, 0 for a padding row.
        layer: Which layer's pages; a Python int or a traced scalar.
        first: Of ragged rows: where each one's new tokens begin among the T places.
        implementation: A name in ``APPENDS``, or ``"auto"`` for the first that accepts.

    Returns:
        The pools with the new cells written and every other cell, the null page apart, unchanged.
        XLA writes in place if the pools are donated and ``k`` and ``v`` depend on what the layer
        before read, as they do in a model; a write that could overtake a read costs a copy.

    Raises:
        ValueError: ``k`` has other rows than the table, and the places are not shared; ``k`` and
            ``v`` have other heads than the pool; or what says where is not int32, one for each row.
    """
    check_places("new tokens", k.shape[0], table, start, length, first)
    check_new_tokens(pools, k, v)
    with jax.named_scope("append"):
        k, v = _as_held(pools, k, v)
        return dispatch(
            "append",
            APPENDS,
            implementation,
            pools,
            k,
            v,
            table,
            start,
            length,
            layer=layer,
            first=first,
        )


def rope_append(
    pools: Pools,
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    rope: Float[Array, "2 R T half"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    first: Int[Array, " F"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "R T N H"], Pools]:
    """Rotates queries and keys by their positions (``apply_rope``), and appends keys and values.

    Args:
        pools: As in ``append``, for all that is not said here.
        q: Queries, not rotated.
        k: Keys, not rotated.
        v: Values.
        rope: Cosine and sine of every pair's angle, for each place, in float32.
        table: Pages of each row.
        start: Position of each row's first new token.
        length: Real new tokens of each row.
        layer: Which layer's pages.
        first: Of ragged rows: where each one's new tokens begin among the T places.
        implementation: A name in ``ROPE_APPENDS``, or ``"auto"`` for the first that accepts.

    Returns:
        The queries, rotated, those of padding too; and the pools.

    Raises:
        ValueError: What ``append`` refuses; queries or angles that do not belong to the keys.
    """
    check_places("new tokens", k.shape[0], table, start, length, first)
    check_new_tokens(pools, k, v)
    check_rope(pools, q, k, rope)
    return dispatch(
        "rope_append",
        ROPE_APPENDS,
        implementation,
        pools,
        q,
        k,
        v,
        rope,
        table,
        start,
        length,
        layer=layer,
        first=first,
    )


def rotate(numbers: Float[Array, "*B H"], implementation: str = "auto") -> Float[Array, "*B H"]:
    """Multiplies heads by an orthonormal Walsh-Hadamard matrix, which is its own inverse.

    See ``formats`` for what it is good for. All implementations for CPUs compute the same bits.

    Args:
        numbers: Heads; computed in float32, and returned as they came.
        implementation: A name in ``ROTATIONS``, or ``"auto"`` for the first that accepts.
    """
    return dispatch("rotation", ROTATIONS, implementation, numbers)


def _in_parts(
    write: str,
    pools: Pools,
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    rope: Float[Array, "2 R T half"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    first: Int[Array, " F"] | None = None,
) -> tuple[Float[Array, "R T N H"], Pools]:
    """Computes ``rope_append`` one thing after the other: what it means."""
    with jax.named_scope("rope"):
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    with jax.named_scope("append"):
        k, v = _as_held(pools, k, v)
        return q, APPENDS[write](pools, k, v, table, start, length, layer=layer, first=first)


ROPE_APPENDS = {
    "mosaic": rope_append_mosaic,
    "native": partial(_in_parts, "native"),
    "scatter": partial(_in_parts, "scatter"),
}
"""Of ``rope_append``, by name, best first; all but the first are ``apply_rope`` and that
``append``."""


def _as_held(
    pools: Pools, k: Float[Array, "R T K H"], v: Float[Array, "R T K H"]
) -> tuple[Float[Array, "R T K H"], Float[Array, "R T K H"]]:
    """Keys and values as the implementations of ``append`` take them."""
    # In float32, which is what they are rounded from.
    if pools.rotates_keys:
        k = rotate(k.astype(jnp.float32))
    if pools.rotates_values:
        v = rotate(v.astype(jnp.float32))
    return k, v
