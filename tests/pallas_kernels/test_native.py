"""The native kernels: equal to the reference on every instruction set, bit for bit in any company.

What every implementation must do is in ``test_paged_attention``; this is what native adds.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import native
from pallas_kernels.paged_attention import (
    NULL_PAGE,
    POOL_DTYPES,
    Pools,
    append,
    paged_attention,
)
from pallas_kernels.paged_attention.cases import CASES, LAYER, Case, Inputs, Row

from . import attending
from .attending import (
    BY_NAME,
    LONG,
    SHARING,
    STATIC,
    TOLERANCE,
    appending,
    expect_any_chunk,
    expect_ragged_rows_to_answer_alike,
    expect_rows_alone,
    expect_sharing_to_change_no_bit,
)
from .native_here import needs_native

pytestmark = needs_native

compiled = jax.jit(paged_attention, static_argnames=(*STATIC, "narrow"))
narrow = partial(compiled, narrow=True)


def attend(*given: Any, by: Any = compiled, **options: Any) -> np.ndarray:
    return attending.attend(by, *given, **options)


@pytest.mark.parametrize("dtype", POOL_DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_the_reference(case: Case, dtype: str, isa: native.Isa):
    """Cells that no row sees hold NaN, infinities and huge numbers, so a leak of one shows."""
    if dtype == "float16" and isa is native.Isa.PORTABLE:
        pytest.skip("declined: see test_what_it_was_not_written_for_is_declined")
    inputs = case.arrays(seed=0, dtype=dtype)
    answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
    np.testing.assert_allclose(answer, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", [16, 48, 80, 112, 240])
def test_every_head_dim_has_its_remainders(head_dim: int, isa: native.Isa):
    """Vectors are summed four at a time, bfloat16 is unpacked in pairs: neither divides these."""
    case = replace(BY_NAME["smollm2-chunk"], head_dim=head_dim, q_heads=8, kv_heads=1, window=37)
    for dtype in ("float32", "bfloat16"):
        inputs = case.arrays(seed=1, dtype=dtype)
        answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
        np.testing.assert_allclose(answer, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_float32_queries_read_a_bfloat16_pool():
    case = BY_NAME["smollm2-chunk"]
    inputs = case.arrays(seed=2, dtype="bfloat16")
    inputs = inputs._replace(q=inputs.q.astype(jnp.float32))
    answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
    np.testing.assert_allclose(answer, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_attention_errs_by_what_its_weights_are_rounded_by(case: Case, isa: native.Isa):
    """Queries are rounded first; a weight then errs by 2^-8 of itself at most, and
    the answer by as much of the weighted sizes."""
    inputs = case.arrays(seed=0, dtype="bfloat16")
    inputs = inputs._replace(q=inputs.q.astype(jnp.float32) * (1 + 2**-12))
    answer = attend(case, inputs, "native", by=narrow)
    exact = attend(case, inputs, "native")
    if isa < native.Isa.AVX512BF16:
        np.testing.assert_array_equal(answer, exact)
        return
    rounded = inputs._replace(q=inputs.q.astype(jnp.bfloat16).astype(jnp.float32))
    sizes = rounded._replace(pools=replace(inputs.pools, v=jnp.abs(inputs.pools.v)))
    expected, size = attend(case, rounded, "reference"), attend(case, sizes, "reference")
    assert (np.abs(answer - expected) <= 2**-8 * size + 4e-6).all()
    if case.rows[0].start > 0:
        assert (answer != exact).any()


def test_narrow_weights_are_exponentials_to_a_ten_thousandth(isa: native.Isa):
    """A key with value 1 beside one with value 0: the answer is 1 / (1 + the second's weight).

    Sums take in weights before they are rounded, so their error alone is seen.
    """
    below = np.arange(80, dtype=np.float32) / 8  # Of the first key's score.
    rows, head_dim, page_tokens = len(below), 16, 8
    k = np.zeros((rows + 1, 1, page_tokens, head_dim), np.float32)
    v = np.zeros_like(k)
    k[1:, 0, 1, 0], v[1:, 0, 0] = -below, 1
    answer = narrow(
        jnp.ones((rows, 1, 1, head_dim), jnp.bfloat16).astype(jnp.float32),
        Pools(k=jnp.asarray(k, jnp.bfloat16), v=jnp.asarray(v, jnp.bfloat16), pages=rows + 1),
        jnp.arange(1, rows + 1, dtype=jnp.int32)[:, None],
        jnp.ones(rows, jnp.int32),
        jnp.ones(rows, jnp.int32),
        layer=0,
        scale=1.0,
        implementation="native",
    )
    weight = 1 / np.asarray(answer, np.float64)[:, 0, 0, 0] - 1
    np.testing.assert_allclose(weight, np.exp(-below.astype(np.float64)), rtol=1.2e-4, atol=4e-7)
    assert weight[0] == 1
    if isa >= native.Isa.AVX512BF16:
        assert np.abs(weight * np.exp(below) - 1).max() > 5e-5, "the short exponential is not used"


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_a_narrow_query_has_the_same_bits_in_any_chunk_and_company(chunk: int):
    case = replace(LONG, window=300)
    inputs = case.arrays(seed=4, dtype="bfloat16")
    expect_any_chunk(partial(attend, by=narrow), case, inputs, chunk)
    expect_rows_alone(partial(attend, by=narrow), case, inputs)


@pytest.mark.parametrize("case", [*CASES, LONG, SHARING], ids=str)
def test_ragged_rows_have_the_bits_that_they_have_in_places_of_their_own(
    case: Case, isa: native.Isa
):
    inputs = case.arrays(seed=3, dtype="bfloat16")
    expect_ragged_rows_to_answer_alike(attend, case, inputs, "native", tolerance=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 300])
def test_a_row_has_the_same_bits_alone_and_in_company(dtype: str, window: int, isa: native.Isa):
    case = replace(LONG, window=window)
    inputs = case.arrays(seed=3, dtype=dtype)
    expect_rows_alone(attend, case, inputs)


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("window", [0, 300])
def test_a_query_has_the_same_bits_in_any_chunk(chunk: int, window: int, isa: native.Isa):
    case = replace(LONG, window=window)
    inputs = case.arrays(seed=4, dtype="float32")
    expect_any_chunk(attend, case, inputs, chunk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_that_rows_share_are_computed_once_with_the_same_bits(dtype: str, isa: native.Isa):
    inputs = SHARING.arrays(seed=11, dtype=dtype)
    expect_sharing_to_change_no_bit(attend, inputs)
    expect_sharing_to_change_no_bit(partial(attend, by=narrow), inputs)


def test_the_same_call_has_the_same_bits_however_threads_share_it():
    """Threads take parts as they come; the standalone program also varies how many there are."""
    case = replace(LONG, rows=(Row(2000, 24),))
    inputs = case.arrays(seed=5, dtype="float32")
    first = attend(case, inputs, "native")
    for _ in range(50):
        np.testing.assert_array_equal(attend(case, inputs, "native"), first)


def test_a_token_that_is_not_finite_spoils_the_answers_that_see_it():
    """The engine finds out by it: a sum that swallowed a NaN would answer with nonsense."""
    case = replace(BY_NAME["tiny"], rows=(Row(20, 4),))
    inputs = case.arrays(seed=6, dtype="float32")
    page = LAYER * inputs.pools.pages + int(inputs.table[0, 1])
    for name in ("k", "v"):
        cells = getattr(inputs.pools, name).at[page, :, 3].set(jnp.nan)
        spoiled = inputs._replace(pools=replace(inputs.pools, **{name: cells}))
        assert np.isnan(attend(case, spoiled, "native")).all(), name


@pytest.mark.parametrize("dtype", POOL_DTYPES)
@pytest.mark.parametrize("query_tokens", [1, 7, 200])
def test_append_writes_what_the_scatter_writes(dtype: str, query_tokens: int):
    case, table_width = appending(query_tokens)
    inputs = case.arrays(seed=7, dtype=dtype)
    table = inputs.table[:, :table_width]
    new = inputs.q[:, :, :3].astype(jnp.float32), inputs.q[:, :, 3:6].astype(jnp.float32)
    written: list[Pools] = [
        append(
            inputs.pools, *new, table, inputs.start, inputs.length, layer=LAYER, implementation=name
        )
        for name in ("native", "scatter")
    ]
    real = np.arange(inputs.pools.k.shape[0]) % inputs.pools.pages != NULL_PAGE
    for name in ("k", "v"):
        ours, theirs = (np.asarray(getattr(pools, name), np.float32)[real] for pools in written)
        np.testing.assert_array_equal(ours, theirs)


def test_devices_that_share_the_threads_do_not_wait_for_each_other():
    """Eight devices run the kernel at once on a pool that has a thread for each core."""
    case = replace(LONG, q_heads=24, kv_heads=8)
    inputs = case.arrays(seed=8, dtype="float32")
    heads, pool, rows = P(None, None, "tensor"), P(None, "tensor"), P()
    specs = Inputs(heads, Pools(pool, pool, inputs.pools.pages), rows, rows, rows)  # pyright: ignore

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()[:8]), ("tensor",)),
        in_specs=(specs,),
        out_specs=heads,
    )
    def sharded(local: Inputs):
        def layer(_: int, q: jax.Array) -> jax.Array:
            out = paged_attention(
                q, *local[1:], layer=LAYER, scale=case.scale, implementation="native"
            )
            return local.q + 0 * out

        return paged_attention(
            jax.lax.fori_loop(0, 20, layer, local.q),
            *local[1:],
            layer=LAYER,
            scale=case.scale,
            implementation="native",
        )

    np.testing.assert_array_equal(sharded(inputs), attend(case, inputs, "native"))


def test_a_program_names_the_build_of_the_library_that_it_was_compiled_for():
    """So the compilation cache misses when the library changes."""
    case = BY_NAME["tiny"]
    inputs = case.arrays(seed=0, dtype="float32")
    lowered = compiled.lower(
        *inputs, layer=jnp.int32(0), scale=1.0, implementation="native"
    ).as_text()
    loaded = native._load()
    assert not isinstance(loaded, str)
    assert f"jaxserve_paged_attention.{loaded[1]}" in lowered


def declined(case: Case, dtype: str = "float32") -> str:
    inputs = case.arrays(seed=0, dtype=dtype)
    with pytest.raises(ExceptionGroup) as caught:
        paged_attention(*inputs, layer=0, scale=1.0, implementation="native")
    return str(caught.value.exceptions[0])


def test_what_it_was_not_written_for_is_declined(monkeypatch: pytest.MonkeyPatch):
    tiny = BY_NAME["tiny"]
    assert declined(replace(tiny, head_dim=24)).startswith("head_dim must be a multiple of 16")
    assert "got 272" in declined(replace(tiny, head_dim=272))
    assert "129 query heads share" in declined(replace(tiny, q_heads=129, kv_heads=1))
    native.limit_isa(native.Isa.PORTABLE)
    try:
        assert declined(tiny, "float16") == "float16 needs AVX2 at least"
    finally:
        native.limit_isa(max(native.Isa))
    assert native.build_name().endswith(native.isa().name.lower())
    missing = "the native kernels are not built: `make native`, or install with a C++ compiler"
    monkeypatch.setattr(native, "_load", lambda: missing)
    assert native.why_not() == missing
    assert native.build_name() == "none"
    assert declined(tiny) == missing
    inputs = tiny.arrays(seed=0, dtype="float32")
    paged_attention(*inputs, layer=0, scale=1.0)
