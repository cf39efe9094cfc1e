"""Products with stored matrices: every implementation equals numpy's sums in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import config as type_checks

from pallas_kernels import native
from pallas_kernels.quantized_matmul import (
    Format,
    Quantized,
    best_product,
    bytes_per_weight,
    dequantized,
    feed_forward,
    quantized,
    quantized_matmul,
    quantized_on_device,
)
from pallas_kernels.quantized_matmul.cases import CASES, LAYER, STORAGES, Case, Storage, stored
from pallas_kernels.quantized_matmul.on_gpu import for_gpu

from .native_here import needs_native, usable

IMPLEMENTATIONS = usable(["native", "xla", "reference"])
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}
"""Of the sum of the products' sizes: float32 sums in any order, then one rounding."""

BY_NAME = {case.name: case for case in CASES}
FLOAT16_TOLERANCE = 2**-10
"""Likewise, of float16 sums: numbers and sums are rounded to 2^-11."""
IN_ORDER_TOLERANCE = 6e-6
"""Likewise, of one float32 sum of 800 pairs in order, in place of 16 shorter ones."""
compiled = jax.jit(quantized_matmul, static_argnames=("dtype", "implementation", "narrow"))
narrow = partial(compiled, implementation="native", narrow=True)


def numbers(matrix: object) -> np.ndarray:
    """What a stack stands for, taken apart value by value."""
    if not isinstance(matrix, Quantized):
        return np.asarray(matrix, np.float64)
    scale = np.asarray(matrix.scale, np.float64).repeat(32, axis=-1)
    values = np.asarray(matrix.values)
    if matrix.minimum is None:
        return values * scale
    out = np.zeros(scale.shape)
    for column in range(out.shape[-1]):
        group, place = divmod(column, 32)
        byte = values[..., group * 16 + place % 16]
        out[..., column] = byte & 15 if place < 16 else byte >> 4
    return out * scale + np.asarray(matrix.minimum, np.float64).repeat(32, axis=-1)


def check(case: Case, storage: Storage, implementation: str, dtype: str = "float32") -> None:
    x, stack = case.arrays(storage, dtype=dtype)
    answer = compiled(x, stack, layer=jnp.int32(LAYER), implementation=implementation)
    assert answer.dtype == x.dtype
    wide, matrix = np.asarray(x, np.float64), numbers(stack)[LAYER]
    size = np.abs(wide) @ np.abs(matrix).T
    error = np.abs(np.asarray(answer, np.float64) - wide @ matrix.T)
    assert (error <= TOLERANCE[dtype] * size).all(), (error / size).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_the_numbers_that_are_stored(
    case: Case, storage: Storage, implementation: str
):
    check(case, storage, implementation)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_products_on_every_instruction_set(case: Case, storage: Storage, isa: native.Isa):
    check(case, storage, "native")


@needs_native
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["bfloat16", "int4"])
def test_native_activations_of_16_bits_are_rounded_once(dtype: str, storage: Storage):
    check(BY_NAME["chunk"], storage, "native", dtype)


def test_a_matrix_of_int8_rows_meets_activations_of_int8() -> None:
    """In XLA. Of integers, so the answer has the same digits whatever the sums' order."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 96), np.float32) * np.array([[1], [100], [1e-3], [0], [7]], "f4")
    stack = jax.tree.map(
        lambda *layers: jnp.stack(layers),
        *(quantized(rng.standard_normal((7, 96), np.float32), "int8/row") for _ in range(2)),
    )
    answer = compiled(jnp.asarray(x), stack, layer=jnp.int32(1), implementation="xla", narrow=True)
    largest = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    steps = np.rint(np.divide(x * 127.0, largest, out=np.zeros(x.shape), where=largest > 0))
    values, scale = np.asarray(stack.values[1], np.int64), np.asarray(stack.scale[1], np.float64)
    expected = steps.astype(np.int64) @ values.T * (largest / 127) * scale[:, 0]
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=0)
    exact = compiled(jnp.asarray(x), stack, layer=jnp.int32(1), implementation="xla")
    assert np.abs(np.asarray(exact) - expected)[[0, 1, 2, 4]].max(axis=-1).min() > 0


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_row_that_is_not_finite_shows_in_its_own_answer(odd: float) -> None:
    matrix = quantized(np.ones((3, 32), np.float32), "int8/row")
    x = jnp.ones((2, 32)).at[1, 4].set(odd)
    answer = np.asarray(compiled(x, matrix, implementation="xla", narrow=True))
    assert np.isfinite(answer[0]).all()
    assert np.isnan(answer[1]).all()


def rounding(storage: Storage, isa: native.Isa) -> str:
    """How narrow products round activations for a matrix stored so."""
    if storage in ("int8", "int4"):
        return "int8" if isa >= native.Isa.AVX512VNNI else "float32"
    if storage == "float32" or isa < native.Isa.AVX512BF16:
        return "float32"
    if isa is native.Isa.AVX512FP16:
        return "float16"
    return "bfloat16" if storage == "bfloat16" else "float32"


def rounded_by_group(x: np.ndarray) -> np.ndarray:
    """The nearest of 255 evenly spread numbers, for each 32 of a row up to their largest size."""
    grouped = x.astype(np.float32).reshape(len(x), -1, 32)
    largest = np.abs(grouped).max(axis=-1, keepdims=True)
    per_step = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    steps = np.rint(grouped * per_step).astype(np.float64)
    return (steps * (largest / np.float32(127))).reshape(x.shape)


@needs_native
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_products_are_those_of_rounded_activations(
    case: Case, storage: Storage, isa: native.Isa
):
    if storage == "float16" and isa is native.Isa.PORTABLE:
        pytest.skip("portable products take no float16")
    x, stack = case.arrays(storage)
    answer = np.asarray(narrow(x, stack, layer=LAYER))
    wide, matrix = np.asarray(x, np.float64), numbers(stack)[LAYER]
    how = rounding(storage, isa)
    if how == "float32":
        exact = compiled(x, stack, layer=LAYER, implementation="native")
        np.testing.assert_array_equal(answer, exact)
        return
    tolerance = FLOAT16_TOLERANCE if how == "float16" else IN_ORDER_TOLERANCE
    if how == "int8":
        wide = rounded_by_group(np.asarray(x))
    elif how == "bfloat16":
        wide = np.asarray(x.astype(jnp.bfloat16), np.float64)
    error = np.abs(answer - wide @ matrix.T)
    size = np.abs(wide) @ np.abs(matrix).T
    assert (error <= tolerance * size).all(), (error / size).max()


needs_float16 = pytest.mark.skipif(
    native.is_built() and native.isa() is not native.Isa.AVX512FP16,
    reason="this machine has no arithmetic in float16",
)
needs_bytes = pytest.mark.skipif(
    native.is_built() and native.isa() < native.Isa.AVX512VNNI,
    reason="this machine has no sums of products of bytes",
)


@needs_native
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e34])
def test_narrow_products_of_rows_of_any_size(size: float, storage: Storage):
    x, stack = BY_NAME["smollm2-few"].arrays(storage)
    # A power of two changes no bit but those of the exponent.
    factor = 2.0 ** round(np.log2(size))
    np.testing.assert_array_equal(
        narrow(x * factor, stack, layer=LAYER), narrow(x, stack, layer=LAYER) * factor
    )


@needs_native
@needs_bytes
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_largest_of_a_group_does_not_coarsen_another_group(format: Format):
    x = np.full((1, 96), 1 / 64, np.float32)
    x[0, 40] = 1e30
    matrix = np.ones((3, 96), np.float32)
    matrix[:, 32:64] = 0
    exact = np.full((1, 3), 1.0, np.float32)
    np.testing.assert_allclose(narrow(x, quantized(matrix, format)), exact, rtol=1e-3)


@needs_native
@needs_bytes
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_values_of_both_sides_do_not_overflow(format: Format, sign: int):
    """A group's sum of bytes is 32 * 255 * 127 at most, which no instruction may clip."""
    values = np.full((1, 1, 32), 127 * sign if format == "int8" else 255)
    stored_as = np.int8 if format == "int8" else np.uint8
    scale = np.ones((1, 1, 1), np.float16)
    if format == "int8":
        stack = Quantized(values.astype(stored_as), scale)
    else:
        stack = Quantized(values[..., :16].astype(stored_as), scale, np.zeros_like(scale))
    of_each = 127 * sign if format == "int8" else 15
    for x in (np.full((1, 32), 127.0), np.full((1, 32), -127.0)):
        answer = narrow(jnp.asarray(x, jnp.float32), stack, layer=0)
        assert answer[0, 0] == x.sum() * of_each


@needs_native
@needs_bytes
def test_groups_of_zeros_and_of_next_to_nothing_are_zeros():
    matrix = quantized(np.ones((3, 64), np.float32), "int8")
    x = np.zeros((2, 64), np.float32)
    x[1, 3] = 1e-37  # Less than 127 / 3.4e38: its scale would have no inverse.
    np.testing.assert_array_equal(narrow(x, matrix), np.zeros((2, 3)))


@needs_native
@needs_float16
@pytest.mark.parametrize("rows", [1, 3])
def test_what_float16_cannot_hold_is_summed_in_float32(rows: int):
    x = np.ones((rows, 96), np.float32)
    matrix = np.ones((5, 96), np.float32)
    matrix[1, :40] = 2.0**14  # Its sums end beyond 65504.
    matrix[2, 3] = 2.0**17  # No float16 itself.
    matrix[3, :] = 2.0**120
    exact = np.array([96, 40 * 2.0**14 + 56, 2.0**17 + 95, 96 * 2.0**120, 96], np.float32)
    np.testing.assert_array_equal(
        narrow(x, jnp.asarray(matrix, jnp.bfloat16)), np.broadcast_to(exact, (rows, 5))
    )


@needs_native
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_a_row_that_is_not_finite_spoils_no_other(storage: Storage, value: float):
    x, stack = BY_NAME["chunk"].arrays(storage)
    sound = np.asarray(narrow(x, stack, layer=LAYER))
    spoilt = np.asarray(narrow(x.at[2, 5].set(value), stack, layer=LAYER))
    assert not np.isfinite(spoilt[2]).any()
    np.testing.assert_array_equal(np.delete(spoilt, 2, axis=0), np.delete(sound, 2, axis=0))


@needs_native
@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_has_the_same_bits_alone_and_in_company(storage: Storage, is_narrow: bool):
    case = replace(BY_NAME["chunk"], depth=848)  # More than one chain, and half a vector.
    if storage in ("int8", "int4"):
        case = replace(case, depth=864)
    x, stack = case.arrays(storage)
    product = partial(compiled, layer=LAYER, implementation="native", narrow=is_narrow)
    together = np.asarray(product(x, stack))
    for rows in (1, 2, 6, 7, 64):
        np.testing.assert_array_equal(product(x[-rows:], stack), together[-rows:])


@needs_native
@pytest.mark.parametrize("is_narrow", [False, True])
def test_scales_below_the_normal_numbers_are_not_lost(isa: native.Isa, is_narrow: bool):
    """2^-24 is the least float16; a product of it is a normal float32."""
    stack = Quantized(np.full((1, 1, 32), 64, np.int8), np.full((1, 1, 1), 2.0**-24, np.float16))
    product = partial(compiled, layer=0, implementation="native", narrow=is_narrow)
    out = product(jnp.full((1, 32), 127.0), stack)
    assert out[0, 0] == 32 * 127 * 64 * 2.0**-24


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rounding_is_to_the_nearest_number_of_the_group(format: str):
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((5, 96)).astype(np.float32)
    matrix[2, 32:64] = 0  # A group of one number has no spread.
    rounded = quantized(matrix, format)  # pyright: ignore[reportArgumentType]
    found = np.asarray(dequantized(rounded, jnp.float32))
    np.testing.assert_allclose(found, numbers(rounded), rtol=1e-6, atol=1e-7)
    step = np.asarray(rounded.scale, np.float32).repeat(32, axis=-1)
    # Half a step, and what float16 makes of the step and of the least number.
    assert (np.abs(found - matrix) <= step * 0.52 + 2e-3 * np.abs(matrix)).all()
    assert (found[2, 32:64] == 0).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_not_rounded(format: Format, value: float):
    matrix = np.ones((2, 96), np.float32)
    matrix[1, 40] = value
    shown = str(abs(value) if format == "int8" else value)
    with pytest.raises(ValueError, match=f"the matrix has a number that is {shown}, and only fi"):
        quantized(matrix, format)


@pytest.mark.parametrize(
    ("format", "numbers", "message"),
    [
        ("int8", (0.0, -127 * 65_520), "a group's scale would be 65520 as int8, and float16, "),
        ("int4", (0.0, 15 * 65_520), "a group's scale would be 65520 as int4, .* ends at 65504"),
        ("int4", (-65_520, 0.0), "a group's minimum would be -65520 as int4, .* keep the matrix"),
        ("int4", (-3e38, 3e38), "a group's scale would be inf as int4"),
    ],
)
def test_scales_and_minima_beyond_float16_are_refused(
    format: Format, numbers: tuple[float, float], message: str
):
    matrix = np.ones((3, 64), np.float32)
    matrix[1, 32:] = numbers[0]
    matrix[1, 50] = numbers[1]
    with pytest.raises(ValueError, match=message):
        quantized(matrix, format)
    # One that still rounds down to the largest float16 is not.
    fits = quantized(np.clip(matrix, -65_519, 65_519), format)
    assert np.isfinite(np.asarray(dequantized(fits, jnp.float32))).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_matrix_without_rows_is_rounded_to_one_without_rows(format: Format):
    assert quantized(np.ones((2, 0, 64), np.float32), format).shape == (2, 0, 64)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rounding_on_a_device_gives_the_same_numbers(format: Format):
    """A compiler may divide by way of a reciprocal, which moves a scale by a last place."""
    matrix = np.random.default_rng(2).standard_normal((3, 5, 96)).astype(np.float32)
    matrix[1, 2, 32:64] = 0
    expected = quantized(matrix, format)
    found = jax.jit(quantized_on_device, static_argnames="format")(matrix, format=format)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    step = np.asarray(expected.scale, np.float32).repeat(32, axis=-1)
    difference = dequantized(found, jnp.float32) - dequantized(expected, jnp.float32)
    assert (np.abs(difference) <= 2e-3 * np.abs(matrix) + 1.01 * step).all()
    assert (np.abs(difference) > 2e-3 * np.abs(matrix)).mean() < 0.01


def test_a_quantized_matrix_is_reshaped_and_indexed_as_the_matrix_is():
    matrix = np.arange(4 * 3 * 64, dtype=np.float32).reshape(4, 3, 64)
    for format in ("int8", "int4"):
        whole = quantized(matrix, format)
        assert (whole.shape, whole.ndim) == ((4, 3, 64), 3)
        expected = np.asarray(dequantized(whole, jnp.float32))
        for found, like in (
            (whole.reshape(12, 64), expected.reshape(12, 64)),
            (whole.reshape(4, -1), expected.reshape(4, -1)),
            (whole.reshape(4, 192), expected.reshape(4, 192)),
            (whole[2], expected[2]),
        ):
            assert found.shape == like.shape
            np.testing.assert_array_equal(dequantized(found, jnp.float32), like)
        shapes = jax.eval_shape(partial(quantized_on_device, format=format), jnp.asarray(matrix))
        assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, shapes)
        assert whole.nbytes == {"int8": 816, "int4": 480}[format]
        assert whole.nbytes == matrix.size * bytes_per_weight(format)


@needs_native
def test_products_are_the_same_on_every_device_of_a_mesh():
    """Each device multiplies by its own rows: the matrix is split, the activations are not."""
    x, stack = BY_NAME["smollm2-batch"].arrays("int4")
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    split = jax.shard_map(
        partial(quantized_matmul, layer=LAYER, implementation="native"),
        mesh=mesh,
        in_specs=(P(), P(None, "tensor")),
        out_specs=P(None, "tensor"),
        check_vma=False,
    )
    whole = compiled(x, stack, layer=LAYER, implementation="native")
    placed = jax.device_put(stack, jax.NamedSharding(mesh, P(None, "tensor")))
    np.testing.assert_array_equal(jax.jit(split)(x, placed), whole)


def test_whole_numbers_are_no_activations(monkeypatch: pytest.MonkeyPatch):
    # Tests are told of a wrong type before the function is.
    monkeypatch.setattr(type_checks, "jaxtyping_disable", True)
    _, stack = BY_NAME["three-outputs"].arrays("int4")
    for multiply in (
        lambda x: quantized_matmul(x, stack, layer=0),
        lambda x: best_product(x, stack[0], count=None),
        lambda x: feed_forward(x, stack, stack, layer=0, activation="silu"),
    ):
        with pytest.raises(ValueError, match="activations are int32; give float32, bfloat16 or fl"):
            multiply(jnp.ones((2, 96), jnp.int32))


def test_what_no_implementation_could_take_is_refused():
    x, stack = BY_NAME["three-outputs"].arrays("int4")
    assert isinstance(stack, Quantized)
    refuse = partial(pytest.raises, ValueError)
    with refuse(
        match=r"the matrix is \[2, 3, 96\]; with activations \[2, 96\] it must be \[O, I\]"
    ):
        quantized_matmul(x, stack)
    with refuse(match=r"must be \[L, O, I\] with I = 64"):
        quantized_matmul(x[:, :64], stack, layer=0)
    with refuse(match=r"the matrix is int32; give floats, or a Quantized"):
        quantized_matmul(x, jnp.ones((3, 96), jnp.int32))
    with refuse(match=r"values of int4 are uint8, got int8"):
        quantized_matmul(x, replace(stack, values=stack.values.astype(np.int8)), layer=0)
    with refuse(match=r"values of int8 are int8, and of fp8 float8_e4m3fn, got uint8"):
        quantized_matmul(x, replace(stack, minimum=None), layer=0)
    with refuse(match=r"minimum is float32\[2, 3, 3\]; it must be float16\[2, 3, 3\]"):
        wide = stack.minimum.astype(np.float32)
        quantized_matmul(x, replace(stack, minimum=wide), layer=0)
    with refuse(match=r"scales are \[2, 3, 3\], and values \[2, 3, 32\] of int4 are a matrix"):
        quantized_matmul(x, replace(stack, values=stack.values[..., :32]), layer=0)
    with refuse(match="the last axis has 33 entries, not a multiple of the group of 32"):
        quantized(np.ones((3, 33)), "int8")


@needs_native
def test_what_native_was_not_written_for_is_declined(monkeypatch: pytest.MonkeyPatch):
    def declined(x: object, matrix: object) -> str:
        with pytest.raises(ExceptionGroup) as caught:
            quantized_matmul(x, matrix, implementation="native")  # pyright: ignore
        return str(caught.value.exceptions[0])

    ones = jnp.ones((2, 24))
    assert declined(ones, jnp.ones((3, 24))) == "the last axis must be a multiple of 16, got 24"
    double = np.ones((3, 32))
    with jax.enable_x64(True):
        assert declined(jnp.ones((2, 32)), jnp.asarray(double)) == (
            "dtypes are float32, bfloat16 and float16, got float64"
        )
    repacked = for_gpu(quantized(np.ones((64, 64), np.float32), "int8"))
    assert declined(jnp.ones((2, 64)), repacked) == "the matrix was repacked for GPUs"
    monkeypatch.setattr(native, "has_amx", lambda: True)
    assert declined(jnp.ones((16, 32)), jnp.ones((3, 32), jnp.bfloat16)) == (
        "XLA multiplies 16 rows or more with AMX"
    )
    native.limit_isa(native.Isa.PORTABLE)
    try:
        half = jnp.ones((3, 32), jnp.float16)
        assert declined(jnp.ones((2, 32)), half) == "float16 needs AVX2 at least"
    finally:
        native.limit_isa(max(native.Isa))


def test_a_matrix_without_layers_may_be_stored_in_any_form():
    x = jnp.ones((2, 64))
    for storage in STORAGES:
        matrix = stored(np.eye(3, 64, dtype=np.float32), storage)
        np.testing.assert_allclose(quantized_matmul(x, matrix), np.ones((2, 3)), rtol=1e-3)
