"""Paged attention: blocked equals the reference, both equal a dense oracle, rows stay apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jax.sharding import PartitionSpec as P

from pallas_kernels.paged_attention import (
    APPENDS,
    IMPLEMENTATIONS,
    NULL_PAGE,
    Pools,
    append,
    paged_attention,
    pool_shape,
)
from pallas_kernels.paged_attention.cases import CASES, LAYER, Case, Inputs, Row, share_places

from . import attending
from .attending import (
    BY_NAME,
    STATIC,
    TOLERANCE,
    expect_dense,
    expect_ragged_rows_to_answer_alike,
    expect_rows_alone_in_the_bucket,
    make_mesh,
)
from .dense_attention import dense_attention
from .native_here import needs_native, usable

attend = partial(attending.attend, jax.jit(paged_attention, static_argnames=STATIC))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in CASES),
        # Dtype matters at the two casts only, so grouped heads, a window and a cap cover the rest.
        *((BY_NAME[name], "bfloat16") for name in ("smollm2-chunk", "gemma2-softcap")),
        *((BY_NAME[name], "float16") for name in ("smollm2-decode", "odd-pages")),
    ],
    ids=str,
)
def test_blocked_equals_the_reference(case: Case, dtype: str):
    """Cells that no row sees hold NaN, infinities and huge numbers, so a leak of one shows."""
    inputs = case.arrays(seed=0, dtype=dtype)
    blocked, reference = (attend(case, inputs, name) for name in ("blocked", "reference"))
    assert np.isfinite(reference).all()
    np.testing.assert_allclose(blocked, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_answer_is_dense_attention_over_each_rows_own_tokens(case: Case, implementation: str):
    inputs = case.arrays(seed=1, dtype=np.float32)
    answer = attend(case, inputs, implementation)
    pools = inputs.pools
    expect_dense(case, inputs, np.asarray(pools.k), np.asarray(pools.v), answer)


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
def test_token_by_token_and_in_chunks_equals_one_dense_pass(implementation: str):
    """Appends and attends as the engine does; two sequences in pages dealt out in turn."""
    tokens, q_heads, kv_heads, head_dim, page_tokens = 45, 4, 2, 16, 4
    rng = np.random.default_rng(3)
    q, k, v = (
        rng.standard_normal((2, tokens, heads, head_dim), np.float32)
        for heads in (q_heads, kv_heads, kv_heads)
    )
    pages = 2 * 12 + 1
    shape = pool_shape(
        layers=3, pages=pages, kv_heads=kv_heads, page_tokens=page_tokens, head_dim=head_dim
    )
    table = jnp.asarray(1 + np.arange(24).reshape(12, 2).T, jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def step(pools, window, q, k, v, start, length):
        where = (table, start, length)
        pools = append(pools, k, v, *where, layer=2)
        attend_here = partial(paged_attention, implementation=implementation, scale=0.25)
        return pools, attend_here(q, pools, *where, layer=2, window=window)

    for window in (0, 7):
        pools = Pools(k=jnp.full(shape, 1e4), v=jnp.full(shape, 1e4), pages=pages)
        answer = np.zeros_like(q)
        done = 0
        for chunk in [8, 8, 5, *[1] * 24]:
            new = [
                np.zeros((2, 8 if chunk > 1 else 1, *x.shape[2:]), np.float32) for x in (q, k, v)
            ]
            for padded, x in zip(new, (q, k, v), strict=True):
                padded[:, :chunk] = x[:, done : done + chunk]
            where = (np.full(2, done, np.int32), np.full(2, chunk, np.int32))
            pools, out = step(pools, np.int32(window), *new, *where)
            answer[:, done : done + chunk] = out[:, :chunk]
            done += chunk
        assert done == tokens
        for b in range(2):
            expected = dense_attention(q[b], k[b], v[b], scale=0.25, window=window)
            np.testing.assert_allclose(answer[b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["smollm2-decode", "smollm2-chunk", "gemma3-270m-local"])
def test_a_row_answers_bit_for_bit_the_same_alone_and_in_company(name: str):
    case = BY_NAME[name]
    expect_rows_alone_in_the_bucket(attend, case, case.arrays(seed=2, dtype=np.float32))


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
def test_huge_numbers_in_the_null_page_move_no_answer(implementation: str):
    case = BY_NAME["smollm2-chunk"]
    inputs = case.arrays(seed=4, dtype=np.float32)
    null = jnp.arange(inputs.pools.k.shape[0]) % inputs.pools.pages == NULL_PAGE
    answers = []
    for value in (0.0, 3e38, jnp.nan):
        filled = jnp.where(null[:, None, None, None], value, inputs.pools.k)
        values = jnp.where(null[:, None, None, None], value, inputs.pools.v)
        pools = replace(inputs.pools, k=filled, v=values)
        answers.append(attend(case, inputs._replace(pools=pools), implementation))
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
def test_a_step_of_padding_only_answers_zeros(implementation: str):
    case = replace(BY_NAME["tiny"], rows=(Row(0, 0), Row(0, 0)))
    answer = attend(case, case.arrays(seed=0, dtype=np.float32), implementation)
    np.testing.assert_array_equal(answer, np.zeros_like(answer))


def test_one_program_serves_windowed_and_global_layers_of_any_context():
    """The window, the layer and the contexts are data: a traced window answers as a number does."""
    case = BY_NAME["gemma3-270m-local"]
    inputs = case.arrays(seed=5, dtype=np.float32)
    traces: list[object] = []

    @jax.jit
    def answer(inputs: Inputs, layer: jax.Array, window: jax.Array) -> jax.Array:
        traces.append(inputs.q.shape)
        return paged_attention(*inputs, layer=layer, scale=case.scale, window=window)

    number = jax.jit(partial(paged_attention, layer=LAYER, scale=case.scale, window=100))
    traced = answer(inputs, jnp.int32(LAYER), jnp.int32(100))
    np.testing.assert_array_equal(traced, number(*inputs))
    halved = inputs._replace(start=inputs.start // 2)
    for window in (0, 1, 512, 100_000):
        assert np.isfinite(answer(halved, jnp.int32(LAYER), jnp.int32(window))).all()
    assert len(traces) == 1


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_rows_answer_as_in_places_of_their_own(case: Case, implementation: str):
    inputs = case.arrays(seed=3, dtype=np.float32)
    expect_ragged_rows_to_answer_alike(attend, case, inputs, implementation, tolerance=2e-6)


@pytest.mark.parametrize("implementation", usable(APPENDS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_rows_write_the_same_cells(case: Case, implementation: str):
    inputs = case.arrays(seed=3, dtype=np.float32)
    shared, first = share_places(inputs)
    write = partial(jax.jit(append, static_argnames="implementation"), layer=LAYER)
    heads = case.kv_heads

    def cells(inputs: Inputs, first: Array | None) -> Pools:
        k = inputs.q[:, :, :heads]
        where = inputs[2:]
        pools = write(inputs.pools, k, -k, *where, first=first, implementation=implementation)
        kept = jnp.arange(pools.k.shape[0]) % pools.pages != NULL_PAGE
        return jax.tree.map(lambda pool: pool[kept], pools)

    jax.tree.map(np.testing.assert_array_equal, cells(shared, first), cells(inputs, None))


def test_a_window_that_covers_everything_equals_no_window():
    case = BY_NAME["smollm2-decode"]
    inputs = case.arrays(seed=6, dtype=np.float32)
    np.testing.assert_array_equal(
        attend(case, inputs, "blocked", window=700), attend(case, inputs, "blocked", window=0)
    )


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
def test_pages_below_the_window_are_never_read(implementation: str):
    """They may have been given away: the table may say anything there, the null page for one."""
    case = replace(BY_NAME["gemma3-270m-local"], rows=(Row(600, 8), Row(650, 1)))
    inputs = case.arrays(seed=7, dtype=np.float32)
    forgotten = inputs._replace(table=inputs.table.at[:, : (601 - 100) // 16].set(NULL_PAGE))
    np.testing.assert_array_equal(
        attend(case, inputs, implementation), attend(case, forgotten, implementation)
    )


@pytest.mark.parametrize("implementation", usable(("native", "blocked")))
@settings(max_examples=50)
@given(
    page_tokens=st.sampled_from([8, 96]),
    rows=st.lists(
        st.tuples(st.integers(0, 380), st.integers(0, 3)).map(lambda row: Row(*row)),
        min_size=3,
        max_size=3,
    ),
    window=st.sampled_from([0, 1, 50, 260]),
)
def test_any_rows_agree_with_the_reference(
    implementation: str, page_tokens: int, rows: list[Row], window: int
):
    """Neither table is a whole number of blocks; the pools have one size, for one program each."""
    table_width = {8: 48, 96: 5}[page_tokens]
    case = replace(
        BY_NAME["tiny"],
        page_tokens=page_tokens,
        rows=tuple(rows),
        window=window,
        query_tokens=3,
        table_width=table_width,
    )
    spare_pages = 3 * table_width - sum(map(case.pages_of, rows))
    inputs = case.arrays(seed=9, dtype=np.float32, spare_pages=spare_pages)
    np.testing.assert_allclose(
        attend(case, inputs, implementation),
        attend(case, inputs, "reference"),
        rtol=2e-6,
        atol=2e-6,
    )


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
def test_shards_of_rows_and_heads_answer_as_the_whole(mesh_shape: tuple[int, int]):
    """Rows over data, key/value heads over tensor; the pages are the same for every data shard."""
    case = BY_NAME["smollm2-chunk"]
    inputs = case.arrays(seed=8, dtype=np.float32)
    heads, pool = P("data", None, "tensor"), P(None, "tensor")
    specs = _specs(heads, Pools(pool, pool, inputs.pools.pages))

    @jax.jit
    @partial(jax.shard_map, mesh=make_mesh(mesh_shape), in_specs=(specs,), out_specs=heads)
    def sharded(local: Inputs):
        return paged_attention(*local, layer=LAYER, scale=case.scale)

    np.testing.assert_allclose(
        sharded(inputs), attend(case, inputs, "blocked"), rtol=2e-6, atol=2e-6
    )


def test_each_data_shard_has_pages_of_its_own_and_no_shard_talks():
    """Two replicas of one case side by side, drawn from two seeds, with four tensor shards each."""
    case = replace(BY_NAME["tiny"], q_heads=8, kv_heads=4)
    replicas = [case.arrays(seed=seed, dtype=np.float32) for seed in (10, 11)]
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), *replicas)
    heads, pool = P("data", None, "tensor"), P("data", "tensor")
    specs = _specs(heads, Pools(pool, pool, both.pools.pages))

    def step(inputs: Inputs):
        q, pools, *where = inputs
        new = q[:, :, :: q.shape[2] // pools.k.shape[1]]
        pools = append(pools, new, -new, *where, layer=LAYER)
        return paged_attention(q, pools, *where, layer=LAYER, scale=case.scale)

    sharded = jax.jit(
        jax.shard_map(step, mesh=make_mesh((2, 4)), in_specs=(specs,), out_specs=heads)
    )
    expected = np.concatenate([jax.jit(step)(replica) for replica in replicas])
    np.testing.assert_allclose(sharded(both), expected, rtol=2e-6, atol=2e-6)
    program = sharded.lower(both).compile().as_text() or ""
    assert not re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", program)


def _specs(heads: Any, pools: Pools) -> Inputs:
    rows: Any = P("data")
    return Inputs(heads, pools, rows, rows, rows)


# -- sinks ---------------------------------------------------------------------------------------


def _sinks(case: Case) -> np.ndarray:
    """Far below the scores, among them and far above."""
    return np.linspace(-30, 30, case.q_heads).astype(np.float32)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sink_takes_its_share_of_every_softmax_and_gives_nothing(case: Case, implementation: str):
    inputs = case.arrays(seed=12, dtype=np.float32)
    sinks = _sinks(case)
    answer = paged_attention(
        *inputs,
        layer=jnp.int32(LAYER),
        scale=case.scale,
        window=case.window,
        softcap=case.softcap,
        sinks=jnp.asarray(sinks),
        implementation=implementation,
    )
    k_pool, v_pool = np.asarray(inputs.pools.k), np.asarray(inputs.pools.v)
    expect_dense(case, inputs, k_pool, v_pool, np.asarray(answer), sinks=sinks)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_ragged_rows_have_sinks_too(implementation: str):
    case = BY_NAME["smollm2-chunk"]
    options = {"layer": LAYER, "scale": case.scale, "sinks": jnp.asarray(_sinks(case))}
    options["implementation"] = implementation

    def answers(case: Case, inputs: Inputs, name: str, first: jax.Array | None = None):
        return np.asarray(paged_attention(*inputs, **options, first=first))

    inputs = case.arrays(seed=13, dtype=np.float32)
    expect_ragged_rows_to_answer_alike(answers, case, inputs, implementation, tolerance=2e-6)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_a_sink_of_minus_infinity_is_none_and_padding_stays_zero(implementation: str):
    case = replace(BY_NAME["tiny"], rows=(Row(20, 4), Row(0, 0)))
    inputs = case.arrays(seed=14, dtype=np.float32)
    options = {"layer": LAYER, "scale": case.scale, "implementation": implementation}
    none = jnp.full(case.q_heads, -jnp.inf)
    with_sinks, without = (
        np.asarray(paged_attention(*inputs, **options, sinks=sinks)) for sinks in (none, None)
    )
    np.testing.assert_allclose(with_sinks, without, rtol=0, atol=1e-6)
    large = np.asarray(paged_attention(*inputs, **options, sinks=none.at[:].set(9.0)))
    assert not large[1].any()


@needs_native
def test_native_attention_declines_sinks():
    case = BY_NAME["tiny"]
    inputs, sinks = case.arrays(seed=0, dtype=np.float32), jnp.zeros(case.q_heads)
    options = {"layer": LAYER, "scale": case.scale, "sinks": sinks}
    with pytest.raises(ExceptionGroup) as declined:
        paged_attention(*inputs, **options, implementation="native")
    assert "attention sinks are not written for the CPU" in str(declined.value.exceptions[0])
    assert paged_attention(*inputs, **options).shape == inputs.q.shape


def _refused(change: Callable[[Inputs], Inputs], **options: object) -> Callable[[], object]:
    case = BY_NAME["tiny"]
    inputs = change(case.arrays(seed=0, dtype=np.float32))
    return lambda: paged_attention(*inputs, **{"layer": 0, "scale": 0.25, **options})


def _with_pools(**changes: object) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs._replace(pools=replace(inputs.pools, **changes))


def _same(inputs: Inputs) -> Inputs:
    return inputs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            _refused(_with_pools(v=jnp.zeros((2, 2, 8, 16), jnp.float16))),
            r"the key pool is float32\[12, 2, 8, 16\] and the value pool float16\[2, 2, 8, 16\]",
        ),
        (
            _refused(_with_pools(k=jnp.zeros(4, jnp.int8), v=jnp.zeros(4, jnp.int8))),
            "the pool is int8; choose one of float32, bfloat16, float16",
        ),
        (
            _refused(_same, sinks=jnp.zeros(2)),
            r"sinks have the shape \[2\] and there are 4 query heads; give a logit for each",
        ),
        (_refused(_with_pools(pages=5)), "12 rows, not a multiple of its 5 pages"),
        (
            _refused(lambda inputs: inputs._replace(q=inputs.q[..., :8])),
            "queries have head_dim 8 and the pool 16",
        ),
        (
            _refused(lambda inputs: inputs._replace(q=inputs.q[:, :, :3])),
            "3 query heads cannot be split over 2 key/value heads",
        ),
        (
            _refused(_same, first=jnp.zeros(2, jnp.int32)),
            "queries have 2 rows of places and the table 2 rows; .* or one row of places for all",
        ),
        (
            _refused(lambda inputs: inputs._replace(q=inputs.q[:1]), first=jnp.zeros(1, jnp.int32)),
            r"first has the shape \[1\] and the table 2 rows; give the place of each",
        ),
        (
            _refused(lambda inputs: inputs._replace(q=inputs.q[:1])),
            "queries have 1 rows of places and the table 2 rows; give as many as the table has",
        ),
        (_refused(_same, scale=0.0), r"scale must be above 0, got 0\.0"),
        (_refused(_same, window=-1), r"window must be 0 \(none\) or a number of tokens, got -1"),
        (_refused(_same, softcap=-2.0), r"softcap must be 0 \(none\) or above, got -2\.0"),
        (
            _refused(_same, implementation="fast"),
            "paged_attention has no implementation 'fast'; choose 'auto' or one of 'mosaic', 'nat",
        ),
    ],
)
def test_what_is_wrong_for_anyone_is_refused_in_words(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        call()
