"""Where in a layer's pages the new tokens of a step go."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from pallas_kernels.paged_attention.ragged import places_of

NOWHERE = -1
"""The cell of padding, and of a position that the table has no entry for."""


def cells_of(
    page_tokens: int,
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    tokens: int,
    first: Int[Array, " B"] | None = None,
) -> Int32[Array, "R T"]:
    """Returns ``page * page_tokens + slot`` for each place, the same for every layer.

    Args:
        page_tokens: Tokens in one page.
        table: Pages of each row in position order.
        start: Position of each row's first new token.
        length: Real new tokens of each row.
        tokens: Places of each row or, with ``first``, of all.
        first: Of ragged rows: where each one's new tokens begin among the places.
    """
    width = table.shape[1]
    if first is None:
        token_RT = jnp.arange(tokens, dtype=jnp.int32)[None, :]
        is_real_RT = token_RT < length[:, None]
        of_RT = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
        position_RT = start[:, None] + token_RT
    else:
        of_RT, token_RT, is_real_RT = (x[None] for x in places_of(first, length, tokens))
        position_RT = start[of_RT] + token_RT
    is_real_RT = is_real_RT & (position_RT < width * page_tokens)
    entry_RT = jnp.clip(position_RT // page_tokens, 0, width - 1)
    cell_RT = table[of_RT, entry_RT] * page_tokens + position_RT % page_tokens
    return jnp.where(is_real_RT, cell_RT, NOWHERE).astype(jnp.int32)
