"""Pages with scales: what is stored, what is read back, and attention over them on every path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
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
    abstract_pools,
    cell_bytes,
    formats,
    paged_attention,
    rotate,
)
from pallas_kernels.paged_attention.cases import Inputs, Row
from pallas_kernels.paged_attention.formats import (
    FORMATS,
    FP8,
    INT4,
    INT8,
    LEAST,
    Format,
    dequantize,
    format_of,
    quantize,
    rotate_xla,
)
from pallas_kernels.quantized_attention import append, dequantized, quantized, quantized_attention
from pallas_kernels.quantized_attention.cases import CASES, LAYER, Case, arrays
from pallas_kernels.target import Target

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


def hadamard(head_dim: int) -> np.ndarray:
    """An oracle: Sylvester's construction, in blocks of the largest power of two that divides."""
    block = 1
    while head_dim % (2 * block) == 0:
        block *= 2
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(head_dim // block), matrix / np.sqrt(block))


def rounded(numbers: np.ndarray, format: Format = INT8) -> tuple[np.ndarray, np.ndarray]:
    """An oracle in numpy: stored values and their scales, for finite numbers."""
    largest = np.abs(numbers).max(axis=-1)
    if format is INT4:
        most = np.take_along_axis(numbers, np.argmax(np.abs(numbers), -1)[..., None], -1)[..., 0]
        scale = (most / np.float32(-8)).astype(SCALE_DTYPE)
    else:
        scale = (largest * np.float32(1 / {INT8: 127, FP8: 448}[format])).astype(SCALE_DTYPE)
    scale[largest < LEAST] = 0
    step = scale.astype(np.float32)[..., None]
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    ratio = numbers * inverse
    if format is FP8:
        return ratio.astype(ml_dtypes.float8_e4m3fn), scale
    if format is INT8:
        return np.rint(ratio).astype(np.int8), scale
    codes = np.clip(np.rint(ratio), -8, 7).astype(np.int64) % 16
    return (codes[..., ::2] + 16 * codes[..., 1::2]).astype(np.uint8), scale


def meant(pools: Pools, name: str) -> np.ndarray:
    """An oracle: the numbers that stored keys, or values, stand for, not rotated any more."""
    pool, scale = getattr(pools, name), getattr(pools, f"{name}_scale")
    stored = values = np.asarray(pool)
    if stored.dtype == np.uint8:
        nibbles = np.stack((stored % 16, stored // 16), axis=-1).reshape(*stored.shape[:-1], -1)
        values = np.where(nibbles > 7, nibbles - 16.0, nibbles)
    with np.errstate(invalid="ignore"):  # Cells that nobody sees: zeros times infinity.
        numbers = values.astype(np.float64) * np.asarray(scale, np.float64)[..., None]
        is_rotated = stored.dtype == np.uint8 or (stored.dtype == np.int8 and name == "k")
        return numbers @ hadamard(numbers.shape[-1]) if is_rotated else numbers


every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
every_format_on_each_isa = pytest.mark.parametrize(
    "format",
    # fp8 is read like int8 up to the last instruction.
    [INT8, pytest.param(FP8, marks=pytest.mark.prove), INT4],
    ids=lambda format: format.name,
)


# -- the numbers -----------------------------------------------------------------------------------


def test_a_token_is_rounded_to_its_largest_number_over_127():
    numbers = np.array([[127.0, -127.0, 0.5, 1.5, 2.5, -2.5, 63.7, 0.0]], np.float32)
    values, scale = quantize(jnp.asarray(numbers), INT8)
    np.testing.assert_array_equal(scale, np.ones(1, SCALE_DTYPE))
    np.testing.assert_array_equal(values, [[127, -127, 0, 2, 2, -2, 64, 0]])


def test_int4_makes_the_number_of_largest_size_minus_eight():
    numbers = np.array([[4, -3.9, 0.25, -0.75, 0, 1, 3.7, -4], [-2, 1.9, 0, 0, 0, 0, 0, 0]])
    values, scale = quantize(jnp.asarray(numbers, jnp.float32), INT4)
    np.testing.assert_array_equal(scale, np.array([-0.5, 0.25], SCALE_DTYPE))
    read = np.asarray(dequantize(values, scale))
    np.testing.assert_array_equal(read[0], [4, -3.5, 0, -1, 0, 1, 3.5, -3.5])
    np.testing.assert_array_equal(read[1, :2], [-2, 1.75])
    np.testing.assert_array_equal(np.asarray(values)[0, :2], [0x78, 0x20], "low nibbles are first")


@given(seed=st.integers(0, 99), exponent=st.integers(-90, 115), format=st.sampled_from([*FORMATS]))
def test_numbers_are_rounded_as_an_oracle_does(seed: int, exponent: int, format: str):
    rng = np.random.default_rng(seed)
    numbers = np.ldexp(rng.standard_normal((4, 3, 48), np.float32), exponent)
    values, scale = quantize(jnp.asarray(numbers), FORMATS[format])
    expected, expected_scale = rounded(numbers, FORMATS[format])
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(
        np.asarray(values).view(np.uint8), expected.view(np.uint8), strict=True
    )


@given(seed=st.integers(0, 99), exponent=st.integers(-100, 120), format=st.sampled_from([*FORMATS]))
def test_no_number_is_off_by_more_than_half_a_step(seed: int, exponent: int, format: str):
    rng = np.random.default_rng(seed)
    numbers = np.ldexp(rng.standard_normal((4, 3, 48), np.float32), exponent)
    values, scale = quantize(jnp.asarray(numbers), FORMATS[format])
    step = np.abs(np.asarray(scale, np.float64))[..., None]
    largest = np.abs(numbers).max(axis=-1, keepdims=True)
    levels = abs(FORMATS[format].most)
    assert np.all(step <= largest * (1 + 2**-8) / (levels * 0.99999)), "the scale's rounding"
    off = np.abs(np.asarray(dequantize(values, scale), np.float64) - numbers)
    # fp8 has three bits behind the first, and below 2^-6 so many 512ths. int4 has no 8: what is
    # next to the largest, on the other side, is off by a whole step and the scale's rounding.
    half = {
        "int8": step / 2,
        "fp8": np.maximum(np.abs(numbers) * 2**-4, step * 2**-10),
        "int4": np.where(np.sign(numbers) == np.sign(scale)[..., None], step * 1.04, step / 2),
    }[format]
    assert np.all(off <= half * (1 + 1e-5))


@pytest.mark.parametrize("implementation", usable(("native", "xla")))
@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128, 7, 256])
def test_a_rotation_is_a_hadamard_matrix_and_its_own_inverse(head_dim: int, implementation: str):
    numbers = np.random.default_rng(0).standard_normal((5, 3, head_dim)).astype(np.float32)
    once = rotate(jnp.asarray(numbers), implementation)
    np.testing.assert_allclose(once, numbers @ hadamard(head_dim), rtol=0, atol=2e-6)
    np.testing.assert_allclose(rotate(once, implementation), numbers, rtol=0, atol=2e-6)
    assert rotate(jnp.ones((1, 64), jnp.bfloat16), implementation).dtype == jnp.bfloat16


@needs_native
@pytest.mark.parametrize(
    "shape", [(300, 2, 64), (70, 1, 96), (1, 5, 256), (9, 16), (3, 4), (0, 64)]
)
def test_every_rotation_has_the_same_bits(shape: tuple[int, ...]):
    numbers = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    np.testing.assert_array_equal(rotate(numbers, "native"), rotate(numbers, "xla"))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_product_rotates_on_gpus(head_dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Computed here: of bfloat16 the sums are exact, and so are the bits those of the others."""
    numbers = jnp.asarray(np.random.default_rng(2).standard_normal((5, 3, head_dim)), dtype)
    with pytest.raises(ExceptionGroup, match="rotation"):
        rotate(numbers, "product")
    monkeypatch.setattr(formats, "target", lambda: Target("gpu", "NVIDIA H200", None))
    answer, expected = (
        np.asarray(rotate(numbers, name), np.float32) for name in ("product", "xla")
    )
    atol = 0 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(answer, expected, rtol=0, atol=atol)


@needs_native
def test_a_head_that_is_too_large_is_rotated_by_xla():
    numbers = jnp.ones((2, 512))
    with pytest.raises(ExceptionGroup) as caught:
        rotate(numbers, "native")
    assert "head_dim is at most 256, got 512" in str(caught.value.exceptions[0])
    np.testing.assert_array_equal(rotate(numbers)[:, 1:], np.zeros((2, 511)))


@every_format
def test_zeros_tiny_numbers_and_numbers_that_are_not_finite(format: Format):
    pairs = [[0, -0.0], [1e-31, 1e-45], [1, np.nan], [np.inf, 1], [1, -np.inf], [3e38, -1]]
    numbers = np.array(pairs, np.float32)
    values, scale = quantize(jnp.asarray(numbers), format)
    read = np.asarray(dequantize(values, scale))
    np.testing.assert_array_equal(read[:2], np.zeros((2, 2)))
    assert np.isnan(read[2:5]).all(), "a token that is not finite must show"
    np.testing.assert_allclose(read[5], [3e38, 0], rtol=0.005)


def test_bytes_of_a_cell_count_its_scale():
    assert cell_bytes(64, INT8.dtype) == cell_bytes(64, FP8.dtype) == 66
    assert cell_bytes(64, INT4.dtype) == cell_bytes(64, INT4.storage) == 34
    assert cell_bytes(64, np.dtype(jnp.bfloat16)) == 128
    assert cell_bytes(64, np.dtype("float32")) == 256


def test_a_format_is_known_by_its_numbers_and_by_what_holds_them():
    for format in FORMATS.values():
        assert format_of(format.dtype) is format_of(format.storage) is format
    assert format_of(np.dtype(jnp.bfloat16)) is None


@every_format
def test_pools_are_made_of_shapes(format: Format):
    pools = abstract_pools(
        layers=2, pages=5, copies=3, kv_heads=4, page_tokens=8, head_dim=16, dtype=format.dtype
    )
    assert pools.k.shape == pools.v.shape == (30, 4, 8, format.width(16))
    assert (pools.k.dtype, pools.pages, pools.head_dim) == (format.storage, 5, 16)
    assert pools.k_scale.shape == pools.v_scale.shape == (30, 4, 8)
    assert pools.format is format
    floats = abstract_pools(
        layers=2, pages=5, kv_heads=4, page_tokens=8, head_dim=16, dtype=np.dtype("float32")
    )
    assert (floats.k.shape, floats.k_scale, floats.format) == ((10, 4, 8, 16), None, None)


# -- append ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", usable(("native", "scatter")))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("query_tokens", [1, 7, 200])
@every_format
def test_append_rounds_the_new_cells_and_writes_no_others(
    implementation: str, dtype: str, query_tokens: int, format: Format
):
    case, table_width = appending(query_tokens)
    inputs = arrays(case, seed=7, format=format)
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
        exact = np.asarray(numbers, np.float32)
        # Rotated by what is tested above: a last bit would be another number.
        is_rotated = format.rotates_keys if name == "k" else format.rotates_values
        new_values, new_scale = rounded(
            np.asarray(rotate_xla(jnp.asarray(exact))) if is_rotated else exact, format
        )
        for b, row in enumerate(case.rows):
            for t in range(row.length):
                entry, offset = divmod(row.start + t, case.page_tokens)
                if entry < table.shape[1]:
                    page = LAYER * pools.pages + table[b, entry]
                    values[page, :, offset] = new_values[b, t]
                    scale[page, :, offset] = new_scale[b, t]
        real = np.arange(values.shape[0]) % pools.pages != NULL_PAGE
        for part, expected in ((name, values), (f"{name}_scale", scale)):
            written = np.asarray(getattr(after, part))[real]
            # As bits: cells that no row has hold NaN, which equals nothing.
            np.testing.assert_array_equal(written.view(np.uint8), expected[real].view(np.uint8))


@needs_native
@given(
    seed=st.integers(0, 999), exponent=st.integers(-126, 122), format=st.sampled_from([*FORMATS])
)
def test_native_and_xla_round_to_the_same_bits(seed: int, exponent: int, format: str):
    """Also what is too small, and what is not finite."""
    rng = np.random.default_rng(seed)
    numbers = np.ldexp(rng.standard_normal((1, 24, 2, 16), np.float32), exponent)
    numbers[0, 3, 0] = 0
    numbers[0, 5, 1, rng.integers(16)] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    case = replace(BY_NAME["tiny"], query_tokens=24, rows=(Row(0, 24),))
    inputs = arrays(case, seed=0, format=FORMATS[format])
    new, where = jnp.asarray(numbers), (inputs.table, inputs.start, inputs.length)
    ours, theirs = (
        append(inputs.pools, new, -new, *where, layer=LAYER, implementation=name)
        for name in ("native", "scatter")
    )
    for name in NAMES:
        left, right = (np.asarray(getattr(pools, name)) for pools in (ours, theirs))
        if name.endswith("scale"):
            left, right = left.astype(np.float32), right.astype(np.float32)
        else:
            left, right = left.view(np.uint8), right.view(np.uint8)
        np.testing.assert_array_equal(left, right)


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (INT8, "float32"),
        (INT8, "bfloat16"),
        (INT8, "float16"),
        pytest.param(FP8, "float32", marks=pytest.mark.prove),
        (INT4, "float32"),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else value,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_the_reference(case: Case, dtype: str, isa: native.Isa, format: Format):
    """Cells that no row sees have scales of NaN and infinity, so a leak of one shows."""
    if dtype == "float16" and isa is native.Isa.PORTABLE:
        pytest.skip("declined: float16 needs AVX2")
    inputs = arrays(case, seed=0, dtype=dtype, format=format)
    answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
    assert np.isfinite(reference).all()
    np.testing.assert_allclose(answer, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
@every_format
def test_blocked_equals_the_reference(case: Case, format: Format):
    inputs = arrays(case, seed=0, format=format)
    answer, reference = attend(case, inputs, "blocked"), attend(case, inputs, "reference")
    np.testing.assert_allclose(answer, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@every_format
def test_the_reference_is_that_of_the_floats_that_the_pages_stand_for(case: Case, format: Format):
    inputs = arrays(case, seed=0, format=format)
    floats = inputs._replace(pools=dequantized(inputs.pools))
    paged = jax.jit(paged_attention, static_argnames=STATIC)
    ours = attend(case, inputs, "reference")
    theirs = attending.attend(paged, case, floats, "reference")
    # Rotations there and back have their own rounding.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 if format.rotates_keys else 0)


@pytest.mark.parametrize("head_dim", [16, 48, 80, 112, 240])
@every_format_on_each_isa
def test_every_head_dim_has_its_remainders(head_dim: int, isa: native.Isa, format: Format):
    """int8 is unpacked four at a time, which divides none of these on every instruction set."""
    case = replace(BY_NAME["smollm2-chunk"], head_dim=head_dim, q_heads=8, kv_heads=1, window=37)
    inputs = arrays(case, seed=1, format=format)
    answer, reference = attend(case, inputs, "native"), attend(case, inputs, "reference")
    np.testing.assert_allclose(answer, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=str)
@every_format
def test_the_answer_is_dense_attention_over_what_the_pages_stand_for(
    case: Case, implementation: str, format: Format
):
    inputs = arrays(case, seed=1, format=format)
    answer = attend(case, inputs, implementation)
    k_pool, v_pool = meant(inputs.pools, "k"), meant(inputs.pools, "v")
    expect_dense(case, inputs, k_pool, v_pool, answer)


LOST = {"int8": (0.007, 0.015), "fp8": (0.03, 0.05), "int4": (0.12, 0.25)}
"""Of normal numbers, head_dim 64, and of answers: bounds of the share of their size."""


@pytest.mark.parametrize("implementation", usable(("native", "blocked")))
@every_format
def test_appended_tokens_answer_almost_as_in_pages_of_floats(implementation: str, format: Format):
    case = BY_NAME["smollm2-decode"]
    floats = case.arrays(seed=3, dtype="float32")
    inputs = floats._replace(pools=quantized(floats.pools, format))
    exact = np.asarray(
        paged_attention(*floats, layer=LAYER, scale=case.scale, implementation="reference")
    )
    of_numbers, of_answers = LOST[format.name]
    off = attend(case, inputs, implementation) - exact
    assert np.sqrt(np.mean(off**2) / np.mean(exact**2)) < of_answers
    pages = inputs.table[6, :4] + LAYER * inputs.pools.pages
    stored, exactly = (
        np.asarray(pools.k)[pages] for pools in (dequantized(inputs.pools), floats.pools)
    )
    assert np.sqrt(np.mean((stored - exactly) ** 2)) < of_numbers


@pytest.mark.parametrize("window", [0, 300])
@every_format_on_each_isa
def test_a_row_has_the_same_bits_alone_and_in_company(window: int, isa: native.Isa, format: Format):
    case = replace(LONG, window=window)
    expect_rows_alone(attend, case, arrays(case, seed=3, format=format))


@every_format_on_each_isa
def test_pages_that_rows_share_are_computed_once_with_the_same_bits(
    isa: native.Isa, format: Format
):
    expect_sharing_to_change_no_bit(attend, arrays(SHARING, seed=11, format=format))


@pytest.mark.parametrize("name", ["smollm2-decode", "smollm2-chunk", "gemma3-270m-local"])
@every_format
def test_in_plain_xla_a_row_has_the_same_bits_alone_and_in_company(name: str, format: Format):
    case = BY_NAME[name]
    expect_rows_alone_in_the_bucket(attend, case, arrays(case, seed=2, format=format))


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("window", [0, 300])
@every_format_on_each_isa
def test_a_query_has_the_same_bits_in_any_chunk(
    chunk: int, window: int, isa: native.Isa, format: Format
):
    case = replace(LONG, window=window)
    expect_any_chunk(attend, case, arrays(case, seed=4, format=format), chunk)


@pytest.mark.parametrize("implementation", usable(IMPLEMENTATIONS))
@every_format
def test_a_token_that_is_not_finite_spoils_the_answers_that_see_it(
    implementation: str, format: Format
):
    """The engine finds out by it: a sum that swallowed a NaN would answer with nonsense."""
    case = replace(BY_NAME["tiny"], rows=(Row(20, 4),))
    inputs = arrays(case, seed=6, format=format)
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
@every_format
def test_shards_of_rows_and_heads_answer_as_the_whole(
    mesh_shape: tuple[int, int], implementation: str, format: Format
):
    """Scales are on the shard of their head; the same for ``append``."""
    case = BY_NAME["smollm2-chunk"]
    inputs = arrays(case, seed=8, format=format)
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


def test_every_option_of_attention_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    """By name, kind and default the options are the same, and each arrives as it was given."""
    ours, theirs = (
        {name: (one.kind, one.default) for name, one in inspect.signature(of).parameters.items()}
        for of in (quantized_attention, paged_attention)
    )
    assert ours == theirs
    options = {
        "layer": LAYER,
        "scale": 0.25,
        "first": jnp.zeros(2, jnp.int32),
        "window": 7,
        "softcap": 3.0,
        "narrow": True,
        "sinks": jnp.zeros(4),
        "implementation": "reference",
    }
    assert {*Inputs._fields, *options} == {*ours}
    arrived: dict[str, object] = {}

    def instead(*given: object, **options: object) -> object:
        arrived.update(zip(Inputs._fields, given, strict=True), **options)
        return given[0]

    monkeypatch.setattr("pallas_kernels.quantized_attention.paged_attention", instead)
    inputs = TINY._asdict()
    quantized_attention(*TINY, **options)  # pyright: ignore[reportArgumentType]
    assert arrived.keys() == ours.keys()
    assert all(arrived[name] is given for name, given in (inputs | options).items())


# -- what is refused -------------------------------------------------------------------------------


def _refused(
    change: Callable[[Pools], Pools], format: Format = INT8, **options: object
) -> Callable[[], object]:
    inputs = arrays(BY_NAME["tiny"], seed=0, format=format)
    inputs = inputs._replace(pools=change(inputs.pools))
    return lambda: quantized_attention(*inputs, **{"layer": 0, "scale": 0.25, **options})


TINY, WIDE = arrays(BY_NAME["tiny"], seed=0), jnp.zeros((2, 4, 2, 32))


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
            "the pool is float32; only pools of int8, fp8, int4 have scales",
        ),
        (
            _refused(_with(k_scale=None, v_scale=None), FP8),
            "the pool is float8_e4m3fn without scales; make it of quantized",
        ),
        (
            _refused(lambda pools: replace(pools, k=pools.k[..., :4], v=pools.v[..., :4]), INT4),
            "queries have head_dim 16 and the pool 8; they must agree",
        ),
        (
            _refused(_with(k_scale=jnp.zeros((2, 8), SCALE_DTYPE)), INT4),
            r"k_scale is bfloat16\[2, 8\]; the scales of a pool uint8\[\d+, 2, 8, 8\] are bfloat16",
        ),
        (
            lambda: INT4.width(15),
            "head_dim is 15, and pages of int4 hold 2 numbers in a byte; choose int8 or fp8",
        ),
        (
            lambda: quantize(jnp.zeros((3, 15)), INT4),
            "head_dim is 15, and pages of int4 hold 2 numbers in a byte; choose int8 or fp8",
        ),
        (
            lambda: append(TINY.pools, WIDE, WIDE, TINY.table, TINY.start, TINY.length, layer=0),
            "new tokens have head_dim 32 and the pool 16; they must agree",
        ),
        (_refused(lambda pools: pools, scale=0.0), r"scale must be above 0, got 0\.0"),
        (
            _refused(lambda pools: pools, implementation="fast"),
            "paged_attention has no implementation 'fast'; choose 'auto' or one of 'mosaic'",
        ),
    ],
)
def test_what_is_wrong_for_anyone_is_refused_in_words(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        call()
