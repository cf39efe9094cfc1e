"""The paged pool: what append touches, what read lines up, and that donation leaves no copy."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config as type_checks

from pallas_kernels import native
from pallas_kernels.paged_attention import (
    NULL_PAGE,
    SCALE_DTYPE,
    Pools,
    append,
    paged_attention,
    pool_shape,
    rope_append,
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


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in service: shapes are not compared with annotations before a function begins."""
    monkeypatch.setattr(type_checks, "jaxtyping_disable", True)


def _wrong(**changes: Any) -> dict[str, Any]:
    """Arguments of ``rope_append``, some of them changed."""
    heads = jnp.zeros((ROWS, QUERY_TOKENS, KV_HEADS, HEAD_DIM))
    rows = jnp.zeros(ROWS, jnp.int32)
    given: dict[str, Any] = {
        "pools": _pools(),
        "q": heads,
        "k": heads,
        "v": heads,
        "rope": jnp.zeros((2, ROWS, QUERY_TOKENS, HEAD_DIM // 2)),
        "table": jnp.zeros((ROWS, WIDTH), jnp.int32),
        "start": rows,
        "length": rows,
    }
    return given | changes


ONE_HEAD = jnp.zeros((ROWS, QUERY_TOKENS, 1, HEAD_DIM))
WRONG_NEW = [
    (
        {"k": ONE_HEAD, "v": ONE_HEAD},
        "new tokens have 1 key/value heads and the pool 2; they must agree",
    ),
    ({"v": ONE_HEAD}, r"new keys have the shape \[2, 3, 2, 8\] and new values \[2, 3, 1, 8\]"),
    (
        {"v": jnp.zeros((ROWS, QUERY_TOKENS, KV_HEADS, 4))},
        r"new keys have the shape \[2, 3, 2, 8\] and new values \[2, 3, 2, 4\]; give both",
    ),
]
WRONG_PLACES = [
    ({"start": jnp.zeros(1, jnp.int32)}, r"start is int32\[1\] and the table has 2 rows; give in"),
    ({"start": jnp.zeros(ROWS, jnp.int16)}, r"start is int16\[2\].*give int32\[2\], a number for"),
    ({"length": jnp.zeros((ROWS, 1), jnp.int32)}, r"length is int32\[2, 1\].*give int32\[2\]"),
    ({"length": jnp.zeros(ROWS)}, r"length is float32\[2\].*give int32\[2\]"),
    ({"table": jnp.zeros((ROWS, WIDTH), jnp.uint32)}, r"the table is uint32\[2, 4\]; it must be"),
    ({"table": jnp.zeros(ROWS, jnp.int32)}, r"the table is int32\[2\]; it must be int32 \[rows, p"),
]
WRONG_FIRST = {"first": jnp.zeros(ROWS, jnp.int16)}, r"first is int16\[2\].*give int32\[2\]"


def _shared(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with one row of places for all."""
    places = {name: given[name][:1] for name in "qkv"}
    return given | places | {"rope": given["rope"][:, :1]}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [*WRONG_NEW, *WRONG_PLACES, WRONG_FIRST])
def test_what_would_be_read_past_its_end_is_not_appended(changes: dict[str, Any], message: str):
    given = _wrong(**changes)
    given = _shared(given) if "first" in changes else given
    with pytest.raises(ValueError, match=message):
        rope_append(**given, layer=0)
    del given["q"], given["rope"]
    with pytest.raises(ValueError, match=message):
        append(**given, layer=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": jnp.zeros((ROWS, 1, KV_HEADS, HEAD_DIM))},
            r"queries have \[2, 1\] places and new keys \[2, 3\]; give a query and a key for each",
        ),
        (
            {"q": jnp.zeros((ROWS, QUERY_TOKENS, KV_HEADS, 4))},
            "queries have head_dim 4 and the pool 8; they must agree",
        ),
    ],
)
def test_queries_of_other_places_or_heads_than_the_keys_are_not_rotated(
    changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        rope_append(**_wrong(**changes), layer=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [*WRONG_PLACES, WRONG_FIRST])
def test_what_would_be_read_past_its_end_is_not_attended_to(changes: dict[str, Any], message: str):
    given = _wrong(**changes)
    given = _shared(given) if "first" in changes else given
    for name in ("k", "v", "rope"):
        del given[name]
    with pytest.raises(ValueError, match=message):
        paged_attention(**given, layer=0, scale=0.25)


def test_pages_that_are_no_whole_layers_are_not_appended_to():
    given = _wrong(pools=replace(_pools(), pages=5))
    del given["q"], given["rope"]
    with pytest.raises(ValueError, match=r"27 rows, not a multiple of its 5 pages per layer; make"):
        append(**given, layer=0)


WIDE = 16
"""A head_dim that native attention takes."""


def _handled(symbol: str, **changes: Any) -> None:
    """Calls a handler of the library with no check of Python's in between."""
    pool = jnp.zeros((*SHAPE[:3], WIDE))
    heads = jnp.zeros((ROWS, QUERY_TOKENS, KV_HEADS, WIDE))
    rows, none, zero = jnp.zeros(ROWS, jnp.int32), jnp.zeros(0, jnp.int32), jnp.int32(0)
    given = {"k_pool": pool, "v_pool": pool, "k": heads, "v": heads, "start": rows, "length": rows}
    given |= {"first": none, "pages": np.int64(PAGES)} | changes
    k_pool, v_pool, k, v = (given[name] for name in ("k_pool", "v_pool", "k", "v"))
    where = (jnp.zeros((ROWS, WIDTH), jnp.int32), given["start"], given["length"], given["first"])

    def result(like: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype)

    if symbol == "jaxserve_append":
        results = native.call(
            symbol,
            [result(k_pool), result(v_pool)],
            *(k_pool, v_pool, k, v, *where, zero),
            aliases={0: 0, 1: 1},
            pages=given["pages"],
        )
    else:
        results = native.call(
            symbol,
            [result(given.get("out", k))],
            *(k, k_pool, v_pool, *where, zero, zero),
            pages=given["pages"],
            scale=np.float32(1),
            softcap=np.float32(0),
            narrow=np.bool_(False),
        )
    jax.block_until_ready(results)


def _heads(*shape: int) -> jax.Array:
    return jnp.zeros(shape)


@needs_native
@pytest.mark.parametrize(
    ("symbol", "changes", "message"),
    [
        *(
            (symbol, changes, "pools, or rows, that do not belong together")
            for symbol in ("jaxserve_append", "jaxserve_paged_attention")
            for changes in (
                {"start": jnp.zeros(1, jnp.int32)},
                {"length": jnp.zeros(1, jnp.int32)},
                {"first": jnp.zeros(1, jnp.int32)},
                {"v_pool": jnp.zeros((*SHAPE[:3], 8))},
                {"pages": np.int64(5)},
                {"pages": np.int64(0)},
            )
        ),
        *(
            ("jaxserve_append", changes, "keys and values that are not of the pool's cells")
            for changes in (
                {"k": ONE_HEAD, "v": ONE_HEAD},
                {"v": _heads(ROWS, QUERY_TOKENS, KV_HEADS, 8)},
                dict.fromkeys("kv", _heads(ROWS, QUERY_TOKENS, 1, WIDE)),
                dict.fromkeys("kv", _heads(1, QUERY_TOKENS, KV_HEADS, WIDE)),
                dict.fromkeys("kv", _heads(ROWS * QUERY_TOKENS, KV_HEADS, WIDE)),
                dict.fromkeys("kv", jnp.zeros((ROWS, 1, KV_HEADS, WIDE), jnp.float16)),
                {"first": jnp.zeros(ROWS, jnp.int32)},
            )
        ),
        *(
            ("jaxserve_paged_attention", changes, "queries that are not of the pool's cells")
            for changes in (
                {"k": _heads(ROWS, QUERY_TOKENS, KV_HEADS, 32)},
                {"k": _heads(1, QUERY_TOKENS, KV_HEADS, WIDE)},
                {"k": _heads(ROWS, QUERY_TOKENS, WIDE)},
                {"out": _heads(ROWS, 1, KV_HEADS, WIDE)},
                {"first": jnp.zeros(ROWS, jnp.int32)},
            )
        ),
    ],
)
def test_the_library_reads_nothing_past_its_end(symbol: str, changes: dict[str, Any], message: str):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        _handled(symbol, **changes)


@needs_native
@pytest.mark.parametrize("symbol", ["jaxserve_append", "jaxserve_paged_attention"])
def test_what_belongs_together_the_library_takes(symbol: str):
    """Nothing else makes it refuse above."""
    _handled(symbol)
