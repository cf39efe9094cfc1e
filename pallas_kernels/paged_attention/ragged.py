"""Rows that share one line of places: where each row's tokens stand, and attention row by row.

A step's prompt chunks are of unlike lengths. Padded to one length each they would cost what the
longest does; side by side they cost what they are. Row ``b`` has the places from ``first[b]`` to
``first[b] + length[b]``; places that no row has are padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32


class Places(NamedTuple):
    """Whose each place is."""

    row: Int32[Array, " T"]
    """Of padding: any row."""
    token: Int32[Array, " T"]
    """Which of the row's new tokens, from 0."""
    is_real: Bool[Array, " T"]


def places_of(first: Int[Array, " B"], length: Int[Array, " B"], count: int) -> Places:
    """Finds the row of each of so many places."""
    place_T1 = jnp.arange(count, dtype=jnp.int32)[:, None]
    is_of_TB = (place_T1 >= first[None, :]) & (place_T1 < (first + length)[None, :])
    row_T = jnp.argmax(is_of_TB, axis=1).astype(jnp.int32)
    return Places(row_T, place_T1[:, 0] - first[row_T], jnp.any(is_of_TB, axis=1))


def row_by_row(
    attend: Callable[..., Float[Array, "1 T N H"]],
    q: Float[Array, "1 T N H"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    first: Int[Array, " B"],
) -> Float[Array, "1 T N H"]:
    """Attends for one row after the other, so that memory is one row's.

    Each row costs what a row of all places would. Rows after the last real one cost nothing.

    Args:
        attend: ``attend(q, table, start, length)`` of one row with places of its own.
        q: queries of all rows.
        table: pages of each row.
        start: position of each row's first query.
        length: real queries of each row.
        first: place of each row's first query.
    """
    places = q.shape[1]
    # As many places behind the last: a row's window of all places begins anywhere.
    padded_q = jnp.pad(q, ((0, 0), (0, places), (0, 0), (0, 0)))
    is_here_T = jnp.arange(places, dtype=jnp.int32)

    def one(b: Int32[Array, ""], out: Float[Array, "1 T2 N H"]) -> Float[Array, "1 T2 N H"]:
        row = jax.lax.dynamic_slice_in_dim
        window = row(padded_q, first[b], places, axis=1)
        answer = attend(window, row(table, b, 1), row(start, b, 1), row(length, b, 1))
        others = row(out, first[b], places, axis=1)
        own = (is_here_T < length[b])[None, :, None, None]
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(own, answer, others), first[b], axis=1
        )

    numbers = jnp.arange(1, length.shape[0] + 1, dtype=jnp.int32)
    rows = jnp.max(jnp.where(length > 0, numbers, 0))
    # From q and not from its shape: inside shard_map the answers vary over the mesh as q does.
    return jax.lax.fori_loop(0, rows, one, jnp.zeros_like(padded_q))[:, :places]
