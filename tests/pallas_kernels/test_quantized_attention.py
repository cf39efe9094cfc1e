"""Pages of int8: what is stored, what is read back, and attention over them on every path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import native
from pallas_kernels.paged_attention import (
    IMPLEMENTATIONS,
    NULL_PAGE,
    SCALE_DTYPE,
    Pools,
    cell_bytes,
    paged_attention,
)
from pallas_kernels.paged_attention.cases import Inputs, Row
from pallas_kernels.paged_attention.int8 import LEAST, dequantize, quantize
from pallas_kernels.quantized_attention import append, dequantized, quantized, quantized_attention
from pallas_kernels.quantized_attention.cases import CASES, LAYER, Case, arrays

from . import attending
from .attending import (
    BY_NAME,
    LONG,
    SHARING,
    STATIC,
    TOLERANCE,
    appending,
    expect_any_chunk,
    expect_dense,
    expect_rows_alone,
    expect_rows_alone_in_the_bucket,
    expect_sharing_to_change_no_bit,
    make_mesh,
)
from .native_here import needs_native, usable

NAMES = ("k", "v", "k_scale", "v_scale")
attend = partial(attending.attend, jax.jit(quantized_attention, static_argnames=STATIC))


def rounded(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An oracle in numpy: int8 values and their scales, for finite numbers."""
    largest = np.abs(numbers).max(axis=-1)
    scale = (largest * np.float32(1 / 127)).astype(SCALE_DTYPE)
    scale[largest < LEAST] = 0
    step = scale.astype(np.float32)[..., None]
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    return np.rint(numbers * inverse).astype(np.int8), scale


# -- the numbers -----------------------------------------------------------------------------------


def test_a_token_is_rounded_to_its_largest_number_over_127():
    numbers = np.array([[127.0, -127.0, 0.5, 1.5, 2.5, -2.5, 63.7, 0.0]], np.float32)
    values, scale = quantize(jnp.asarray(numbers))
    np.testing.assert_array_equal(scale, np.ones(1, SCALE_DTYPE))
    np.testing.assert_array_equal(values, [[127, -127, 0, 2, 2, -2, 64, 0]])


@given(seed=st.integers(0, 99), exponent=st.integers(-100, 120))
def test_no_number_is_off_by_more_than_half_a_step(seed: int, exponent: int):
    rng = np.random.default_rng(seed)
    numbers = np.ldexp(rng.standard_normal((4, 3, 48), np.float32), exponent)
    values, scale = quantize(jnp.asarray(numbers))
    expected, expected_scale = rounded(numbers)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(scale, expected_scale)
    step = np.asarray(scale, np.float64)[..., None]
    largest = np.abs(numbers).max(axis=-1, keepdims=True)
    assert np.all(step <= largest * (1 + 2**-8) / 126.999), "the scale's rounding"
    off = np.abs(np.asarray(values, np.float64) * step - numbers)
    assert np.all(off <= step * (0.5 + 1e-5))
    np.testing.assert_array_equal(
        dequantize(values, scale), np.asarray(values, np.float32) * np.asarray(step, np.float32)
    )


def test_zeros_tiny_numbers_and_numbers_that_are_not_finite():
    pairs = [[0, -0.0], [1e-31, 1e-45], [1, np.nan], [np.inf, 1], [3e38, -1]]
    numbers = np.array(pairs, np.float32)
    values, scale = quantize(jnp.asarray(numbers))
    np.testing.assert_array_equal(values[:4], np.zeros((4, 2), np.int8))
    read = np.asarray(dequantize(values, scale))
    np.testing.assert_array_equal(read[:2], np.zeros((2, 2)))
    assert np.isnan(read[2:4]).all(), "a token that is not finite must show"
    np.testing.assert_allclose(read[4], [3e38, 0], rtol=0.005)


def test_bytes_of_a_cell_count_its_scale():
    assert cell_bytes(64, np.dtype("int8")) == 66
    assert cell_bytes(64, np.dtype(jnp.bfloat16)) == 128
    assert cell_bytes(64, np.dtype("float32")) == 256


# -- append ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", usable(("native", "scatter")))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("query_tokens", [1, 7, 200])
def test_append_rounds_the_new_cells_and_writes_no_others(
    implementation: str, dtype: str, query_tokens: int
):
    case, table_width = appending(query_tokens)
    inputs = arrays(case, seed=7)
    pools, table = inputs.pools, np.asarray(inputs.table)[:, :table_width]
    new = [
        (inputs.q[:, :, 3 * i : 3 * i + 3] * 10.0 ** (2 * i - 1)).astype(dtype) for i in range(2)
    ]
    after = jax.jit(append, static_argnames="implementation")(
        pools,
        *new,
        jnp.asarray(table),
        inputs.start,
        inputs.length,
        layer=jnp.int32(LAYER),
        implementation=implementation,
    )
    for name, numbers in zip(("k", "v"), new, strict=True):
        values, scale = np.array(getattr(pools, name)), np.array(getattr(pools, f"{name}_scale"))
        new_values, new_scale = rounded(np.asarray(numbers, np.float32))
        for b, row in enumerate(case.rows):
            for t in range(row.length):
                entry, offset = divmod(row.start + t, case.page_tokens)
                if entry < table.shape[1]:
                    page = LAYER * pools.pages + table[b, entry]
                    values[page, :, offset] = new_values[b, t]
                    scale[page, :, offset] = new_scale[b, t]
        real = np.arange(values.shape[0]) % pools.pages != NULL_PAGE
        written = [np.asarray(getattr(after, part))[real] for part in (name, f"{name}_scale")]
        np.testing.assert_array_equal(written[0], values[real])
        np.testing.assert_array_equal(written[1], scale[real])


@needs_native
@given(seed=st.integers(0, 999), exponent=st.integers(-126, 126))
def test_native_and_xla_round_to_the_same_bits(seed: int, exponent: int):
    """Also what is too small, and what is not finite."""
    rng = np.random.default_rng(seed)
    numbers = np.ldexp(rng.standard_normal((1, 24, 2, 16), np.float32), exponent)
    numbers[0, 3, 0] = 0
    numbers[0, 5, 1, rng.integers(16)] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    case = replace(BY_NAME["tiny"], query_tokens=24, rows=(Row(0, 24),))
    inputs = arrays(case, seed=0)
    new, where = jnp.asarray(numbers), (inputs.table, inputs.start, inputs.length)
    ours, theirs = (
        append(inputs.pools, new, -new, *where, layer=LAYER, implementation=name)
        for name in ("native", "scatter")
    )
    for name in NAMES:
        left, right = (np.asarray(getattr(pools, name)) for pools in (ours, theirs))
        if name.endswith("scale"):
            left, right = left.astype(np.float32), right.astype(np.float32)
        np.testing.assert_array_equal(left, right)


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_the_reference(case: Case, dtype: str, isa: native.Isa):
    """Cells that no row sees have scales of NaN and infinity, so a leak of one shows."""
    if dtype == "float16" and isa is native.Isa.PORTABLE:
        pytest.skip("declined: float16 needs AVX2")
    inputs = arrays(case, seed=0, dtype=dtype)
    answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
    assert np.isfinite(reference).all()
    np.testing.assert_allclose(answer, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocked_equals_the_reference(case: Case):
    inputs = arrays(case, seed=0)
    answer, reference = attend(case, inputs, "blocked"), attend(case, inputs, "reference")
    np.testing.assert_allclose(answer, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_that_of_the_floats_that_the_pages_stand_for(case: Case):
    inputs = arrays(case, seed=0)
    floats = inputs._replace(pools=dequantized(inputs.pools))
    paged = jax.jit(paged_attention, static_argnames=STATIC)
    np.testing.assert_array_equal(
        attend(case, inputs, "reference"), attending.attend(paged, case, floats, "reference")
    )


@pytest.mark.parametrize("head_dim", [16, 48, 80, 112, 240])
def test_every_head_dim_has_its_remainders(head_dim: int, isa: native.Isa):
    """int8 is unpacked four at a time, which divides none of these on every instruction set."""
    case = replace(BY_NAME["smollm2-chunk"], head_dim=head_dim, q_heads=8, kv_heads=1, window=37)
    inputs = arrays(case, seed=1)
    answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
    np.testing.assert_allclose(answer, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_answer_is_dense_attention_over_what_the_pages_stand_for(
    case: Case, implementation: str
):
    inputs = arrays(case, seed=1)
    answer = attend(case, inputs, implementation)
    pools = inputs.pools
    with np.errstate(invalid="ignore"):  # Cells that nobody sees: zeros times infinity.
        k_pool, v_pool = (
            np.asarray(values, np.float64) * np.asarray(scale, np.float64)[..., None]
            for values, scale in ((pools.k, pools.k_scale), (pools.v, pools.v_scale))
        )
    expect_dense(case, inputs, k_pool, v_pool, answer)


@pytest.mark.parametrize("implementation", usable(("native", "blocked")))
def test_appended_tokens_answer_almost_as_in_pages_of_floats(implementation: str):
    """What int8 loses of normal numbers, head_dim 64: 0.6 % of their size, and 1 % of answers'."""
    case = BY_NAME["smollm2-decode"]
    floats = case.arrays(seed=3, dtype="float32")
    inputs = floats._replace(pools=quantized(floats.pools))
    exact = np.asarray(
        paged_attention(*floats, layer=LAYER, scale=case.scale, implementation="reference")
    )
    off = attend(case, inputs, implementation) - exact
    assert np.sqrt(np.mean(off**2) / np.mean(exact**2)) < 0.015
    pages = inputs.table[6, :4] + LAYER * inputs.pools.pages
    stored, meant = (
        np.asarray(pools.k)[pages] for pools in (dequantized(inputs.pools), floats.pools)
    )
    assert np.sqrt(np.mean((stored - meant) ** 2)) < 0.007


@pytest.mark.parametrize("window", [0, 300])
def test_a_row_has_the_same_bits_alone_and_in_company(window: int, isa: native.Isa):
    case = replace(LONG, window=window)
    expect_rows_alone(attend, case, arrays(case, seed=3))


def test_pages_that_rows_share_are_computed_once_with_the_same_bits(isa: native.Isa):
    expect_sharing_to_change_no_bit(attend, arrays(SHARING, seed=11))


@pytest.mark.parametrize("name", ["smollm2-decode", "smollm2-chunk", "gemma3-270m-local"])
def test_in_plain_xla_a_row_has_the_same_bits_alone_and_in_company(name: str):
    case = BY_NAME[name]
    expect_rows_alone_in_the_bucket(attend, case, arrays(case, seed=2))


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("window", [0, 300])
def test_a_query_has_the_same_bits_in_any_chunk(chunk: int, window: int, isa: native.Isa):
    case = replace(LONG, window=window)
    expect_any_chunk(attend, case, arrays(case, seed=4), chunk)


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
def test_a_token_that_is_not_finite_spoils_the_answers_that_see_it(implementation: str):
    """The engine finds out by it: a sum that swallowed a NaN would answer with nonsense."""
    case = replace(BY_NAME["tiny"], rows=(Row(20, 4),))
    inputs = arrays(case, seed=6)
    page = LAYER * inputs.pools.pages + int(inputs.table[0, 1])
    for name in ("k_scale", "v_scale"):
        for spoiler in (jnp.nan, jnp.inf):
            cells = getattr(inputs.pools, name).at[page, :, 3].set(spoiler)
            values = getattr(inputs.pools, name[0]).at[page, :, 3].set(0)
            pools = replace(inputs.pools, **{name: cells, name[0]: values})
            answer = attend(case, inputs._replace(pools=pools), implementation)
            assert np.isnan(answer).all(), (name, spoiler)


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
def test_a_step_of_padding_only_answers_zeros(implementation: str):
    case = replace(BY_NAME["tiny"], rows=(Row(0, 0), Row(0, 0)))
    answer = attend(case, arrays(case, seed=0), implementation)
    np.testing.assert_array_equal(answer, np.zeros_like(answer))


@pytest.mark.parametrize("implementation", usable(("native", "blocked")))
@pytest.mark.parametrize("mesh_shape", [(1, 3), (2, 3)], ids=str)
def test_shards_of_rows_and_heads_answer_as_the_whole(
    mesh_shape: tuple[int, int], implementation: str
):
    """Scales are on the shard of their head; the same for ``append``."""
    case = BY_NAME["smollm2-chunk"]
    inputs = arrays(case, seed=8)
    heads, pool, rows = P("data", None, "tensor"), P(None, "tensor"), P("data")
    specs = Inputs(heads, Pools(pool, pool, inputs.pools.pages, pool, pool), rows, rows, rows)  # pyright: ignore
    write = "native" if implementation == "native" else "scatter"

    def step(local: Inputs):
        q, pools, *where = local
        # Each data shard has a copy of the pools to write in, of which it reads its own rows.
        pools = jax.tree.map(lambda array: jax.lax.pcast(array, "data", to="varying"), pools)
        new = q[:, :, ::3]
        pools = append(pools, new, -new, *where, layer=LAYER, implementation=write)
        return quantized_attention(
            q, pools, *where, layer=LAYER, scale=case.scale, implementation=implementation
        )

    sharded = jax.jit(
        jax.shard_map(
            step,
            mesh=make_mesh(mesh_shape),
            in_specs=(specs,),
            out_specs=heads,
        )
    )
    q, pools, *where = inputs
    new = q[:, :, ::3]
    pools = append(pools, new, -new, *where, layer=LAYER, implementation=write)
    whole = attend(case, inputs._replace(pools=pools), implementation)
    np.testing.assert_allclose(sharded(inputs), whole, rtol=2e-6, atol=2e-6)


# -- what is refused -------------------------------------------------------------------------------


def _refused(change: Callable[[Pools], Pools], **options: object) -> Callable[[], object]:
    inputs = arrays(BY_NAME["tiny"], seed=0)
    inputs = inputs._replace(pools=change(inputs.pools))
    return lambda: quantized_attention(*inputs, **{"layer": 0, "scale": 0.25, **options})


def _with(**changes: object) -> Callable[[Pools], Pools]:
    return lambda pools: replace(pools, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            _refused(_with(k_scale=None, v_scale=None)),
            "the pool is int8 without scales; make it of quantized()",
        ),
        (_refused(_with(v_scale=None)), r"v_scale is missing; the scales of a pool int8\["),
        (
            _refused(_with(k_scale=jnp.zeros((2, 8), jnp.float32))),
            r"k_scale is float32\[2, 8\]; the scales of a pool int8\[\d+, 2, 8, 16\] are bfloat16",
        ),
        (
            _refused(lambda pools: replace(dequantized(pools), k_scale=pools.k_scale)),
            "the pool is float32; only int8 pools have scales",
        ),
        (_refused(lambda pools: pools, scale=0.0), r"scale must be above 0, got 0\.0"),
        (
            _refused(lambda pools: pools, implementation="fast"),
            "paged_attention has no implementation 'fast'; choose 'auto' or one of 'native'",
        ),
    ],
)
def test_what_is_wrong_for_anyone_is_refused_in_words(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        call()
