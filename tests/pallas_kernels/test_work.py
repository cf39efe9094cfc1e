"""The attention kernel's list of work: every query meets every tile of keys it sees, once."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import work
from pallas_kernels.paged_attention.work import Shape, most_units, pack, plan_work

MOST_ROWS, MOST_TOKENS = 5, 90
ROWS = st.lists(
    st.tuples(st.integers(0, 700), st.integers(0, MOST_TOKENS)), min_size=1, max_size=MOST_ROWS
)
SHAPES = st.sampled_from(
    [
        # Group, queries and keys of a tile, least tiles of a piece, pieces.
        Shape(1, 64, 64, 8, 1),
        Shape(3, 128, 64, 1, 1),
        Shape(4, 64, 128, 2, 4),
        Shape(72, 64, 64, 1, 16),
    ]
)
_plan = jax.jit(plan_work, static_argnums=(0, 1))


def listed(
    shape: Shape, rows: list[tuple[int, int]], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real units, where packed queries of rows begin, and how many pieces they have."""
    padded = rows + [(0, 0)] * (MOST_ROWS - len(rows))
    start, length = (np.asarray(numbers, np.int32) for numbers in zip(*padded, strict=True))
    room = -(-length * shape.group // work.ALIGNED) * work.ALIGNED
    begin = (np.cumsum(room) - room).astype(np.int32)
    units = most_units(shape, MOST_ROWS, MOST_ROWS * MOST_TOKENS, None)
    made = _plan(shape, units, begin, start, length, window)
    least = most_units(shape, len(rows), max(int(length.sum()), 1), None)
    assert int(made.real) <= least, "more units than there is room for"
    return np.asarray(made.units)[: int(made.real)], begin, np.asarray(made.pieces)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, rows=ROWS, window=st.sampled_from([0, 1, 50, 200]))
def test_every_query_meets_every_tile_it_sees_once(
    shape: Shape, rows: list[tuple[int, int]], window: int
):
    units, begin, _ = listed(shape, rows, window)
    met = Counter[tuple[int, int, int]]()
    for unit in units:
        row, query = int(unit[work.ROW]), int(unit[work.QUERY])
        start, length = rows[row]
        assert unit[work.FIRST_QUERY] == begin[row] + query
        assert unit[work.FIRST_QUERY] % work.ALIGNED == 0
        assert (unit[work.START], unit[work.END]) == (start, start + length)
        # Launches cut only rows with one query into pieces; of others some would be of nothing.
        least = 0 if shape.most_pieces > 1 and length > 1 else 1
        assert unit[work.TO] - unit[work.FROM] >= least
        tokens = range(
            query // shape.group,
            min((query + shape.tile_queries - 1) // shape.group + 1, length),
        )
        first_seen = min(max(start + t - window + 1, 0) if window else 0 for t in tokens)
        assert unit[work.SEEN] == first_seen
        for line in range(query, min(query + shape.tile_queries, length * shape.group)):
            for tile in range(unit[work.FROM], unit[work.TO]):
                met[row, line, tile] += 1
    for row, (start, length) in enumerate(rows):
        for line in range(length * shape.group):
            position = start + line // shape.group
            least = max(position - window + 1, 0) if window else 0
            for tile in range(least // shape.tile_keys, position // shape.tile_keys + 1):
                assert met[row, line, tile] == 1, (row, line, tile)
    assert max(met.values(), default=1) == 1


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, rows=ROWS)
def test_how_a_row_is_cut_depends_on_that_row_alone(shape: Shape, rows: list[tuple[int, int]]):
    units, _, pieces = listed(shape, rows, 0)
    own = [work.QUERY, work.START, work.SEEN, work.END, work.FROM, work.TO]
    for row, numbers in enumerate(rows):
        alone, _, alone_pieces = listed(shape, [numbers], 0)
        together = units[units[:, work.ROW] == row]
        np.testing.assert_array_equal(together[:, own], alone[:, own])
        assert pieces[row] == alone_pieces[0]


@pytest.mark.parametrize("group", [1, 3, 8])
def test_packed_queries_stand_token_after_token(group: int):
    rng = np.random.default_rng(0)
    kv_heads, head_dim, tile = 2, 16, 64
    lengths, first = np.array([3, 0, 5, 1]), np.array([1, 0, 6, 5])
    q = rng.standard_normal((1, 13, kv_heads * group, head_dim), np.float32)
    packed, begin = pack(
        jnp.asarray(q),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(first, jnp.int32),
        kv_heads,
        tile,
    )
    for row, length in enumerate(lengths):
        assert begin[row] % work.ALIGNED == 0
        assert begin[row] + tile <= packed.shape[1], "a tile cannot be read whole"
        for token in range(length):
            for head in range(kv_heads * group):
                line = begin[row] + token * group + head % group
                np.testing.assert_array_equal(
                    packed[head // group, line], q[0, first[row] + token, head]
                )
