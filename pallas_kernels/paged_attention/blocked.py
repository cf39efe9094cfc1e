"""Paged attention in plain XLA: a loop over blocks of the context, with a running softmax.

The trip count is traced, so one compiled program serves every context length, and memory is bounded
by the block instead of the context. The method is FlashAttention's (Dao et al. 2022, algorithm 1,
the loop over key blocks); where it tiles queries too, we keep all queries of the step together,
because XLA tiles the products itself. This is what serves on the CPU, and the fallback elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.paged_attention.pool import NULL_PAGE, Pools, read
from pallas_kernels.paged_attention.ragged import row_by_row

BLOCK_TOKENS = 256
"""Context tokens in one turn of the loop. Smaller blocks read less past the end of short rows,
larger ones turn the loop less often: at SmolLM2's shapes, 64 rows decoding at 384 tokens took 11,
15 and 24 ms with 128, 256 and 512; 512 queries at 4,096 took 76, 71 and 71 ms (float32, two CPU
cores shared with other work: an order, not decimals; bench/kernels.py measures again)."""

MASKED = -1e30
"""Score of an invisible key. Finite, so that the difference of two masked scores is 0, not NaN."""

FLOOR = -1e20
"""Where the running maximum starts: far below any real score and far above ``MASKED``. So
``exp(MASKED - maximum)`` is exactly 0 even before a row has seen its first key, a block in which a
row sees nothing leaves that row's state bit for bit as it was, and a row's answer cannot depend on
how many blocks its neighbours make the loop run."""


class Softmax(NamedTuple):
    """Running softmax of every query; ``Q = G * T`` queries of one key/value head side by side."""

    maximum: Float32[Array, "B K Q"]
    total: Float32[Array, "B K Q"]
    weighted: Float32[Array, "B K Q H"]


class Span(NamedTuple):
    """Key positions ``first <= position < end`` that a query, or any query of a row, sees."""

    first: Int32[Array, "*edge"]
    end: Int32[Array, "*edge"]


def paged_attention_blocked(
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
    narrow: bool = False,  # Allows it and asks for nothing.
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R T N H"]:
    """Computes ``paged_attention``; see there for the arguments.

    Everything after the read is float32, whatever the dtypes: both products with their operands
    (probabilities are not rounded to the pool's dtype before they meet V), the softmax, the sums.
    On a CPU that is also the fast way: XLA's bfloat16 products cost more than the cast.
    """
    if first is not None:

        def attend(q: Array, table: Array, start: Array, length: Array) -> Array:
            return paged_attention_blocked(
                q,
                pools,
                table,
                start,
                length,
                layer=layer,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )

        return row_by_row(attend, q, table, start, length, first)
    batch, query_tokens, q_heads, head_dim = q.shape
    kv_heads, page_tokens = pools.k.shape[1:3]
    block_pages = min(max(BLOCK_TOKENS // page_tokens, 1), table.shape[1])
    block_tokens = block_pages * page_tokens
    padded_table = _pad_table(table, block_pages)

    query_BT, row_B = _spans(start, length, query_tokens, window)
    group = q_heads // kv_heads
    q_BKQH = (
        q.astype(jnp.float32)
        .reshape(batch, query_tokens, kv_heads, group, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, group * query_tokens, head_dim)
    )
    query_B1Q1 = Span(*(jnp.tile(edge, (1, group))[:, None, :, None] for edge in query_BT))
    row_B1x1 = Span(*(edge[:, None, None, None] for edge in row_B))

    def block(i: Int32[Array, ""], state: Softmax) -> Softmax:
        with jax.named_scope("read"):
            pages = jax.lax.dynamic_slice_in_dim(padded_table, i * block_pages, block_pages, axis=1)
            k_BKSH, v_BKSH = (x.astype(jnp.float32) for x in read(pools, pages, layer=layer))
        key_S = i * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        with jax.named_scope("scores"):
            scores_BKQS = scale * jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH)
            if softcap:
                scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap)
            scores_BKQS = jnp.where(
                _within(key_S[None, None, None, :], query_B1Q1), scores_BKQS, MASKED
            )
        with jax.named_scope("values"):
            # Zero probability does not silence a NaN. The null page and the unwritten tail of a
            # row's last page (which may be what a poisoned request left) are zeroed themselves.
            seen_v_BKSH = jnp.where(_within(key_S[None, None, :, None], row_B1x1), v_BKSH, 0)
            return _fold(state, scores_BKQS, seen_v_BKSH)

    first_block, end_block = _block_range(row_B, block_tokens, padded_table.shape[1] // block_pages)
    # From q and not from its shape: inside shard_map the state varies over the mesh as q does.
    zeros_BKQH = jnp.zeros_like(q_BKQH)
    zeros_BKQ = zeros_BKQH[..., 0]
    start_state = Softmax(zeros_BKQ + FLOOR, zeros_BKQ, zeros_BKQH)
    if sinks is not None:
        # As after a block whose one key has this score and the value zero.
        sink_KQ = jnp.repeat(sinks.astype(jnp.float32), query_tokens).reshape(kv_heads, -1)
        top_BKQ = zeros_BKQ + jnp.maximum(sink_KQ, FLOOR)
        start_state = Softmax(top_BKQ, jnp.exp(sink_KQ - top_BKQ), zeros_BKQH)
    state = jax.lax.fori_loop(first_block, end_block, block, start_state)
    # A query that saw no key has weighted 0: its answer is 0. Any other total is >= 1.
    out_BKQH = state.weighted / jnp.maximum(state.total, 1e-30)[..., None]
    return (
        out_BKQH.astype(q.dtype)
        .reshape(batch, kv_heads, group, query_tokens, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(batch, query_tokens, q_heads, head_dim)
    )


def _pad_table(table: Int[Array, "B W"], block_pages: int) -> Int[Array, "B W2"]:
    """Widens the table to whole blocks, so that the last block reads the null page, not outside.

    And to two at least: XLA inlines a loop of one turn, and then, with one query, copies the pools.
    """
    width = table.shape[1]
    missing = max(-width % block_pages, 2 * block_pages - width)
    return jnp.pad(table, ((0, 0), (0, missing)), constant_values=NULL_PAGE)


def _spans(
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    query_tokens: int,
    window: int | Int[Array, ""],
) -> tuple[Span, Span]:
    """Keys that each query sees, ``[B, T]``, and keys that any query of a row sees, ``[B]``."""
    token_T = jnp.arange(query_tokens, dtype=jnp.int32)
    end_BT = start[:, None] + token_T[None, :] + 1
    first_BT = jnp.where(window == 0, 0, jnp.maximum(end_BT - window, 0))
    end_BT = jnp.where(token_T[None, :] < length[:, None], end_BT, 0)
    end_B = jnp.where(length > 0, start + length, 0)
    return Span(first_BT, end_BT), Span(first_BT[:, 0], end_B)


def _within(key: Int32[Array, "*key"], span: Span) -> Bool[Array, "*out"]:
    return (span.first <= key) & (key < span.end)


def _block_range(
    row: Span, block_tokens: int, blocks: int
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """First block that any row sees, and one past the last; both 0 when every row is padding."""
    end = jnp.minimum(-(-jnp.max(row.end) // block_tokens), blocks)
    first_seen_B = jnp.where(row.end > 0, row.first // block_tokens, blocks)
    return jnp.minimum(jnp.min(first_seen_B), end), end


def _fold(
    state: Softmax, scores: Float32[Array, "B K Q S"], values: Float32[Array, "B K S H"]
) -> Softmax:
    """Takes one more block of scores and values into the running softmax."""
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1))
    shrink = jnp.exp(state.maximum - maximum)
    weights_BKQS = jnp.exp(scores - maximum[..., None])
    block_BKQH = jnp.einsum("BKQS,BKSH->BKQH", weights_BKQS, values)
    return Softmax(
        maximum,
        state.total * shrink + jnp.sum(weights_BKQS, axis=-1),
        state.weighted * shrink[..., None] + block_BKQH,
    )
