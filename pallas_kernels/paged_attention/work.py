"""What a launch of the GPU kernel has to do, as a list that thread blocks take turns at.

A step's rows are of unlike lengths. Dividing them evenly is done here, in the program that launches
the kernel, and not by the kernel's grid: each *unit* is one tile of queries of one row against one
*piece* of that row's context. A long context of a row with one query is cut into several pieces,
whose answers are merged by what their softmaxes summed to (Dao et al. 2023, "Flash-Decoding").

How a row is cut depends on that row alone, so that its answer has the same bits beside any others.
The queries of one key head are packed, token after token and within it the group's members; a tile
is so many of one row's, so that neither a group nor a prompt chunk needs to fill one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

FIELDS = 8
"""Numbers of a unit."""
ROW, FIRST_QUERY, QUERY, START, SEEN, END, FROM, TO = range(FIELDS)
"""Columns of ``Work.units``: the row; where the tile's queries begin among all packed ones; the
same among the row's own; the position of the row's first query; the first key that any of the
tile's sees; one past the row's last key; the first tile of keys, and one past the last."""

ALIGNED = 8
"""Each row's packed queries begin at a multiple of it, as the hardware's copies do."""

NOTHING = -1e30
"""Log of a softmax's sum over no key at all; finite, so that two of them differ by 0."""


class Shape(NamedTuple):
    """What is fixed when a launch is traced."""

    group: int
    """Query heads of one key head."""
    tile_queries: int
    """Packed query rows of a unit."""
    tile_keys: int
    """Tokens of one turn of the kernel's loop."""
    piece_tiles: int
    """A row with one query is cut into pieces of at least so many tiles of keys."""
    most_pieces: int
    """Of one row; 1: nothing is cut."""


class Work(NamedTuple):
    """Every unit of a launch, and where each row's are."""

    units: Int32[Array, "U 8"]
    count: Int32[Array, ""]
    """Real units; they are the first."""
    pieces: Int32[Array, " B"]
    """Of each tile of a row."""
    offset: Int32[Array, " B"]
    """Units of the rows before."""


def most_units(shape: Shape, rows: int, places: int, tokens: int | None) -> int:
    """Bounds the units of a launch.

    Args:
        shape: of the launch.
        rows: of the step.
        places: of all queries.
        tokens: of each row at most, or None where only the places bound them.
    """
    if tokens is None:
        return (-(-places * shape.group // shape.tile_queries) + rows) * shape.most_pieces
    return rows * -(-tokens * shape.group // shape.tile_queries) * shape.most_pieces


def pack(
    q: Float[Array, "R T N H"],
    length: Int[Array, " B"],
    first: Int[Array, " B"] | None,
    kv_heads: int,
    tile_queries: int,
) -> tuple[Float[Array, "K Q H"], Int32[Array, " B"]]:
    """Packs queries, with a tile's worth of anything behind the last.

    Args:
        q: of every place.
        length: queries of each row.
        first: place of each row's first, where rows share places.
        kv_heads: of the pool.
        tile_queries: of a launch.

    Returns:
        The packed queries, and where each row's begin.
    """
    group, head_dim, rows = q.shape[2] // kv_heads, q.shape[3], length.shape[0]
    heads = q.reshape(-1, kv_heads, group, head_dim)
    if first is None:
        room = q.shape[1] * group
        packed = heads.transpose(1, 0, 2, 3).reshape(kv_heads, rows, room, head_dim)
        space = -room % ALIGNED
        packed = jnp.pad(packed, ((0, 0), (0, 0), (0, space), (0, 0)))
        packed = packed.reshape(kv_heads, -1, head_dim)
        begin_B = jnp.arange(rows, dtype=jnp.int32) * (room + space)
        return jnp.pad(packed, ((0, 0), (0, tile_queries), (0, 0))), begin_B
    room_B = -(-length * group // ALIGNED) * ALIGNED
    end_B = jnp.cumsum(room_B).astype(jnp.int32)
    begin_B = end_B - room_B
    count = -(-(len(heads) * group + (ALIGNED - 1) * rows) // ALIGNED) * ALIGNED + tile_queries
    query_Q = jnp.arange(count, dtype=jnp.int32)
    row_Q = _owner(query_Q, end_B)
    token_Q, member_Q = jnp.divmod(query_Q - begin_B[row_Q], group)
    place_Q = jnp.clip(first[row_Q] + token_Q, 0, len(heads) - 1)
    return heads[place_Q, :, member_Q].transpose(1, 0, 2), begin_B


def plan_work(
    shape: Shape,
    units: int,
    begin: Int[Array, " B"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    window: int | Int[Array, ""],
) -> Work:
    """Lists the units of a launch.

    Args:
        shape: of the launch.
        units: room for so many; see ``most_units``.
        begin: of each row's packed queries.
        start: position of the first.
        length: queries of each row; 0 has no unit.
        window: keys that a query sees at most; 0 for all.
    """
    group, tile_queries, tile_keys, piece_tiles, most_pieces = shape
    tiles_B = -(-length * group // tile_queries)
    seen_B = _first_seen(start, window)
    keys_B = -(-(start + length) // tile_keys) - seen_B // tile_keys
    wanted_B = jnp.clip(-(-keys_B // piece_tiles), 1, most_pieces)
    # Pieces are equally long, so that fewer may do.
    pieces_B = -(-keys_B // jnp.maximum(-(-keys_B // wanted_B), 1))
    pieces_B = jnp.where(length > 0, pieces_B, 1)
    end_of_B = jnp.cumsum(tiles_B * pieces_B)
    offset_B = end_of_B - tiles_B * pieces_B

    unit_U = jnp.arange(units, dtype=jnp.int32)
    row_U = _owner(unit_U, end_of_B)
    tile_U, piece_U = jnp.divmod(unit_U - offset_B[row_U], pieces_B[row_U])
    query_U = tile_U * tile_queries
    start_U, length_U = start[row_U], length[row_U]
    token_U = query_U // group
    last_U = jnp.minimum((query_U + tile_queries - 1) // group, length_U - 1)
    seen_U = _first_seen(start_U + token_U, window)
    begin_U, end_U = seen_U // tile_keys, -(-(start_U + last_U + 1) // tile_keys)
    piece_keys_U = -(-(end_U - begin_U) // pieces_B[row_U])
    from_U = begin_U + piece_U * piece_keys_U
    columns = {
        ROW: row_U,
        FIRST_QUERY: begin[row_U] + query_U,
        QUERY: query_U,
        START: start_U,
        SEEN: seen_U,
        END: start_U + length_U,
        FROM: from_U,
        TO: jnp.minimum(from_U + piece_keys_U, end_U),
    }
    stacked = jnp.stack([columns[field].astype(jnp.int32) for field in range(FIELDS)], axis=1)
    return Work(stacked, end_of_B[-1], pieces_B, offset_B)


def merge(
    shape: Shape,
    work: Work,
    outs: Float[Array, "U K M H"],
    sums: Float32[Array, "U K M"],
    row: Int[Array, " P"],
    token: Int[Array, " P"],
    is_real: Bool[Array, " P"],
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "P N H"]:
    """Gathers each place's answers, and merges those of several pieces in their order.

    Args:
        shape: of the launch.
        work: that it did.
        outs: answer of each unit and key head.
        sums: log2 of what the weights of each answer summed to.
        row: of each place.
        token: which of its row's.
        is_real: whether anybody's; others are zeros.
        sinks: a logit per query head that joins the sum alone.
    """
    packed_PG = token[:, None] * shape.group + jnp.arange(shape.group, dtype=jnp.int32)[None, :]
    tile_PG, line_PG = jnp.divmod(packed_PG, shape.tile_queries)
    pieces_P1 = work.pieces[row][:, None]
    slot_PG = work.offset[row][:, None] + tile_PG * pieces_P1
    slot_PG = jnp.where(is_real[:, None], slot_PG, 0)

    def one(piece: int) -> tuple[Float[Array, "P G K H"], Float32[Array, "P G K"]]:
        is_there_PG = is_real[:, None] & (piece < pieces_P1)
        here_PG = jnp.where(is_there_PG, slot_PG + piece, 0)
        out_PGKH = jnp.where(
            is_there_PG[..., None, None], outs[here_PG, :, line_PG].astype(jnp.float32), 0
        )
        sum_PGK = jnp.where(is_there_PG[..., None], sums[here_PG, :, line_PG], NOTHING)
        return out_PGKH, sum_PGK

    out, total = one(0)
    if shape.most_pieces > 1:
        parts = [(out, total), *(one(piece) for piece in range(1, shape.most_pieces))]
        stacked_SPGK = jnp.stack([part[1] for part in parts])
        most_PGK = jnp.max(stacked_SPGK, axis=0)
        weight_SPGK = jnp.exp2(stacked_SPGK - most_PGK[None])
        whole_PGK = jnp.sum(weight_SPGK, axis=0)
        out = sum(weight_SPGK[s][..., None] * part[0] for s, part in enumerate(parts))
        out, total = out / whole_PGK[..., None], most_PGK + jnp.log2(whole_PGK)
    kv_heads = outs.shape[1]
    if sinks is not None:
        sink_GK = sinks.astype(jnp.float32).reshape(kv_heads, shape.group).T * LOG2E
        out = out / (1 + jnp.exp2(sink_GK[None] - total))[..., None]
    out_PNH = out.transpose(0, 2, 1, 3).reshape(len(row), -1, outs.shape[-1])
    return jnp.where(is_real[:, None, None], out_PNH, 0)


LOG2E = 1.4426950408889634
"""Of ``exp(x) = exp2(LOG2E * x)``: the processor has the latter."""


def _first_seen(position: Int[Array, "*B"], window: int | Int[Array, ""]) -> Int[Array, "*B"]:
    return jnp.where(window == 0, 0, jnp.maximum(position - window + 1, 0)).astype(jnp.int32)


def _owner(number: Int32[Array, " U"], end: Int32[Array, " B"]) -> Int32[Array, " U"]:
    """The row whose share of a row of numbers one is, or the last row."""
    row = jnp.sum(number[:, None] >= end[None, :], axis=1, dtype=jnp.int32)
    return jnp.minimum(row, end.shape[0] - 1)
