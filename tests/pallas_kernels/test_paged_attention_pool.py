"""The paged pool: what append touches, what read lines up, and that donation leaves no copy."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_attention import (
    NULL_PAGE,
    SCALE_DTYPE,
    Pools,
    append,
    paged_attention,
    pool_shape,
)
from pallas_kernels.paged_attention.pool import read

from .native_here import needs_native

LAYERS, PAGES, KV_HEADS, PAGE_TOKENS, HEAD_DIM = 3, 9, 2, 4, 8
SHAPE = pool_shape(
    layers=LAYERS, pages=PAGES, kv_heads=KV_HEADS, page_tokens=PAGE_TOKENS, head_dim=HEAD_DIM
)
ROWS, QUERY_TOKENS, WIDTH = 2, 3, 4


def _pools(dtype: str = "float32") -> Pools:
    cells = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    return Pools(k=jnp.asarray(cells, dtype), v=jnp.asarray(-cells, dtype), pages=PAGES)


def _new_tokens(seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (ROWS, QUERY_TOKENS, KV_HEADS, HEAD_DIM)
    k, v = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return jnp.asarray(k), jnp.asarray(v)


def test_pool_shape_counts_the_null_page_of_every_layer():
    assert SHAPE == (27, 2, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pages": 1},
            r"pages must be at least 2 \(page 0 of each layer is the null page\), got 1",
        ),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"page_tokens": -4}, "page_tokens must be at least 1, got -4"),
    ],
)
def test_a_pool_without_room_is_refused(change: dict[str, int], message: str):
    sizes = {"layers": 2, "pages": 4, "kv_heads": 2, "page_tokens": 4, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        pool_shape(**{**sizes, **change})


@given(
    pages=st.permutations(range(1, PAGES)),
    start=st.lists(st.integers(0, 20), min_size=ROWS, max_size=ROWS),
    length=st.lists(st.integers(0, QUERY_TOKENS), min_size=ROWS, max_size=ROWS),
    layer=st.integers(0, LAYERS - 1),
)
def test_append_writes_the_new_cells_and_no_others(
    pages: list[int], start: list[int], length: list[int], layer: int
):
    """Positions from 16 on are past the table: they must vanish, not land in the last page."""
    table = np.array(pages[: ROWS * WIDTH]).reshape(ROWS, WIDTH)
    k, v = _new_tokens(seed=layer)
    before = _pools()
    after = append(
        before,
        k,
        v,
        jnp.asarray(table, jnp.int32),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(length, jnp.int32),
        layer=jnp.int32(layer),
    )
    for new, old, written in ((k, before.k, after.k), (v, before.v, after.v)):
        expected = np.array(old)
        for b in range(ROWS):
            for t in range(length[b]):
                page, offset = divmod(start[b] + t, PAGE_TOKENS)
                if page < WIDTH:
                    expected[layer * PAGES + table[b, page], :, offset] = new[b, t]
        # What padding left in the null page of this layer is nobody's business.
        null = layer * PAGES + NULL_PAGE
        expected[null] = np.asarray(written)[null]
        np.testing.assert_array_equal(written, expected)


def test_a_layer_may_be_a_number_or_traced():
    k, v = _new_tokens(seed=0)
    table = jnp.asarray([[1, 2], [3, 4]], jnp.int32)
    start, length = jnp.asarray([0, 5], jnp.int32), jnp.asarray([3, 2], jnp.int32)
    for layer in range(LAYERS):
        number = append(_pools(), k, v, table, start, length, layer=layer)
        traced = jax.jit(append)(_pools(), k, v, table, start, length, layer=jnp.int32(layer))
        jax.tree.map(np.testing.assert_array_equal, number, traced)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_append_rounds_to_the_pools_dtype(dtype: str):
    k, v = _new_tokens(seed=1)
    table = jnp.asarray([[1], [2]], jnp.int32)
    zero, length = jnp.zeros(2, jnp.int32), jnp.full(2, QUERY_TOKENS, jnp.int32)
    pools = append(_pools(dtype), k, v, table, zero, length, layer=0)
    assert pools.k.dtype == pools.v.dtype == dtype
    np.testing.assert_array_equal(pools.k[2, :, :QUERY_TOKENS], k[1].swapaxes(0, 1).astype(dtype))


def test_read_lines_up_pages_in_table_order():
    pools = _pools()
    table = np.array([[5, 2], [7, NULL_PAGE]])
    k, v = read(pools, jnp.asarray(table, jnp.int32), layer=1)
    for b, s in np.ndindex(ROWS, 2 * PAGE_TOKENS):
        page, offset = divmod(s, PAGE_TOKENS)
        cell = pools.k[PAGES + table[b, page], :, offset]
        np.testing.assert_array_equal(k[b, :, s], cell)
        np.testing.assert_array_equal(v[b, :, s], -cell)


def test_pools_are_a_pytree_that_keeps_its_page_count():
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _pools())
    assert specs.pages == PAGES
    assert specs.page_tokens == PAGE_TOKENS
    assert len(jax.tree.leaves(specs)) == 2


def _step(pools: Pools, x, table, start, length, *, scanned: bool, native: bool):
    """Two layers of a model as far as the pool can tell: each writes what the one before read."""
    where = (table, start, length)
    write = partial(append, implementation="native" if native else "scatter")
    attend = partial(paged_attention, implementation="native" if native else "blocked")

    def layer(carry, index):
        pools, x = carry
        kv = x[:, :, :KV_HEADS]
        pools = write(pools, kv, kv, *where, layer=index)
        out = attend(x, pools, *where, layer=index, scale=0.25)
        return (pools, x + out), None

    if scanned:
        return jax.lax.scan(layer, (pools, x), jnp.arange(LAYERS, dtype=jnp.int32))[0]
    for index in range(LAYERS):
        (pools, x), _ = layer((pools, x), index)
    return pools, x


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize(
    ("scanned", "query_tokens", "dtype"),
    [
        (False, 1, "float32"),
        (False, 16, "bfloat16"),
        (True, 1, "bfloat16"),
        (True, 16, "float32"),
        (True, 1, "int8"),
        (False, 16, "int8"),
    ],
)
def test_a_donated_pool_is_updated_in_place(
    dtype: str, query_tokens: int, scanned: bool, native: bool
):
    """No instruction of the compiled program makes a pool but those that write into it."""
    shape = pool_shape(layers=LAYERS, pages=999, kv_heads=KV_HEADS, page_tokens=16, head_dim=64)
    pool = jax.ShapeDtypeStruct(shape, dtype)
    scale = jax.ShapeDtypeStruct(shape[:-1], SCALE_DTYPE) if dtype == "int8" else None
    pools = Pools(pool, pool, pages=999, k_scale=scale, v_scale=scale)
    row = jax.ShapeDtypeStruct((4,), "int32")
    compiled = (
        jax.jit(partial(_step, scanned=scanned, native=native), donate_argnames="pools")
        .lower(
            pools,
            jax.ShapeDtypeStruct((4, query_tokens, 6, 64), "float32" if scale else dtype),
            jax.ShapeDtypeStruct((4, 20), "int32"),
            row,
            row,
        )
        .compile()
    )
    for array in {leaf.shape: leaf for leaf in jax.tree.leaves(pools)}.values():
        dimensions = ",".join(map(str, array.shape))
        results = re.findall(
            rf"= \(?(?:[^(=]*, )?\w+\[{dimensions}\][^(=]* ([\w-]+)\(", compiled.as_text() or ""
        )
        makers = [
            name for name in results if name not in ("parameter", "get-tuple-element", "tuple")
        ]
        writer = "custom-call" if native else "scatter"
        assert writer in makers
        # A fusion or call that makes a pool is a scatter in a wrapper: one per pool and layer.
        wrappers = makers.count("fusion") + makers.count("call")
        writes = makers.count(writer)
        assert len(makers) == writes + wrappers + makers.count("while")
        assert wrappers <= (0 if native else writes)
        assert writes <= 2 * LAYERS

    memory = compiled.memory_analysis()
    assert memory is not None
    pool_bytes = int(np.prod(shape)) * pool.dtype.itemsize
    all_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pools))
    assert memory.alias_size_in_bytes >= all_bytes
    assert memory.temp_size_in_bytes < pool_bytes
