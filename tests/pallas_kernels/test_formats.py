"""Groups of any size, floats of eight bits, and columns in another order."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import (
    Format,
    Quantized,
    Spec,
    best_product,
    bytes_per_weight,
    dequantized,
    feed_forward,
    has_native_best,
    quantized,
    quantized_matmul,
    quantized_on_device,
    spec,
)

FORMATS = ("int8/64", "int8/row", "int4/64", "int4/128", "fp8", "fp8/128")
DEPTH = 256


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def numbers(matrix: Quantized) -> np.ndarray:
    """What a matrix stands for in the order of the activations, taken apart value by value."""
    values, depth = np.asarray(matrix.values), matrix.shape[-1]
    of_column = np.zeros(matrix.shape)
    for column in range(depth):
        if matrix.minimum is None:
            of_column[..., column] = values[..., column].astype(np.float64)
        else:
            part, place = divmod(column, 32)
            byte = values[..., part * 16 + place % 16]
            of_column[..., column] = byte & 15 if place < 16 else byte >> 4
    group = depth // matrix.scale.shape[-1]
    out = of_column * np.asarray(matrix.scale, np.float64).repeat(group, axis=-1)
    if matrix.minimum is not None:
        out += np.asarray(matrix.minimum, np.float64).repeat(group, axis=-1)
    if matrix.order is None:
        return out
    back = np.empty_like(out)
    np.put_along_axis(back, np.broadcast_to(matrix.order, out.shape), out, axis=-1)
    return back


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_is_to_the_nearest_number_of_the_group(format: Format):
    matrix = drawn(0, 3, DEPTH)
    its = spec(format)
    group = its.group or DEPTH
    stored = quantized(matrix, format)
    assert (stored.kind, stored.group, stored.shape) == (its.kind, group, matrix.shape)
    assert stored.nbytes == pytest.approx(
        matrix.size * bytes_per_weight(format), abs=4 * len(matrix)
    )
    scale = np.asarray(stored.scale, np.float64).repeat(group, axis=-1)
    error = np.abs(numbers(stored) - matrix)
    if its.kind == "fp8":  # Half of the last of three binary places, or of the least there is.
        assert (error <= np.maximum(np.abs(matrix) * 2**-4, scale * 2**-10) * 1.0001).all()
    else:  # A largest number may be cut off by what its scale and minimum lost in float16.
        assert (error <= scale * 0.51).all()
    again = jax.jit(partial(quantized_on_device, format=format))(matrix)
    # A quotient's last bit may be another there, and a value in the middle between two.
    assert (np.asarray(stored.values) != np.asarray(again.values)).mean() < 0.01
    last_bit = np.finfo(its.scale_dtype).eps
    np.testing.assert_allclose(again.scale, stored.scale, rtol=last_bit)
    if its.kind == "int4":
        np.testing.assert_allclose(again.minimum, stored.minimum, rtol=last_bit)


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_numbers_that_are_stored(format: Format, implementation: str):
    x, stack = drawn(1, 5, DEPTH), quantized(drawn(2, 3, 8, DEPTH), format)
    answer = quantized_matmul(jnp.asarray(x), stack, layer=1, implementation=implementation)
    matrix = numbers(stack)[1]
    size = np.abs(x) @ np.abs(matrix).T
    assert (np.abs(answer - x.astype(np.float64) @ matrix.T) <= 2e-6 * size).all()


def ordered(matrix: np.ndarray, format: Format, seed: int) -> Quantized:
    order = np.random.default_rng(seed).permutation(matrix.shape[-1]).astype(np.int32)
    stored = quantized(matrix[..., order], format)
    return replace(stored, order=np.broadcast_to(order, (*matrix.shape[:-2], 1, len(order))))


@pytest.mark.parametrize("format", ["int4", "int4/128", "int8"])
def test_an_order_is_that_of_the_activations(format: Format):
    x, stack = jnp.asarray(drawn(3, 5, DEPTH)), ordered(drawn(4, 3, 8, DEPTH), format, 9)
    product = jax.jit(quantized_matmul)
    answer = np.asarray(product(x, stack, layer=jnp.int32(2)))
    matrix = numbers(stack)[2]
    np.testing.assert_allclose(answer, np.asarray(x) @ matrix.T, rtol=1e-4, atol=1e-4)
    folded = stack.reshape(3, 4, 2, DEPTH).reshape(3, 8, -1)
    np.testing.assert_array_equal(product(x, folded, layer=jnp.int32(2)), answer)
    np.testing.assert_array_equal(product(x, stack[2]), answer)
    best = best_product(x, stack[2])
    np.testing.assert_array_equal(best.place, answer.argmax(axis=-1))
    assert has_native_best(x, stack[2]) == has_native_best(x, replace(stack[2], order=None))


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
def test_both_matrices_of_a_feed_forward_may_have_an_order(implementation: str):
    x = drawn(5, 3, 64)
    gate_up, down = ordered(drawn(6, 2, 128, 64), "int4", 1), ordered(drawn(7, 2, 8, 64), "int4", 2)
    answer = feed_forward(
        jnp.asarray(x), gate_up, down, layer=1, activation="silu", implementation=implementation
    )
    gate, up = np.split(x @ numbers(gate_up)[1].T, 2, axis=-1)
    expected = (gate / (1 + np.exp(-gate)) * up) @ numbers(down)[1].T
    np.testing.assert_allclose(answer, expected, rtol=2e-3, atol=2e-2)


def test_names_of_formats_say_what_they_say():
    for name, says in {
        "int8": Spec("int8", 32),
        "int4": Spec("int4", 32),
        "int4/128": Spec("int4", 128),
        "int8/row": Spec("int8", None),
        "fp8": Spec("fp8", None),
        "fp8/128": Spec("fp8", 128),
        "int4/ordered": Spec("int4", 32, True),
        "int4/128/ordered": Spec("int4", 128, True),
    }.items():
        assert (spec(name), says.name) == (says, name)
    for wrong in ("", "int2", "int4/row", "int4/48", "int4/0", "int4/x", "int4/32/64", "awq"):
        with pytest.raises(ValueError, match="is no format; write int8, int4, fp8, and where need"):
            spec(wrong)
    with pytest.raises(ValueError, match="int4/ordered is read from checkpoints; nothing is round"):
        quantized(np.ones((2, 32)), "int4/ordered")


def test_floats_of_eight_bits_hold_the_largest_of_a_row_and_rows_of_zeros():
    matrix = np.array([[1.0, -448.0, 3.5, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    stored = quantized(matrix, "fp8")
    assert stored.values.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(dequantized(stored, jnp.float32)), matrix)
    with pytest.raises(ValueError, match="a number that is inf"):
        quantized(np.full((1, 4), np.inf), "fp8")


def test_what_does_not_belong_together_is_refused():
    x, stored = jnp.ones((2, 96)), quantized(np.ones((3, 96), np.float32), "int8")
    with pytest.raises(ValueError, match=r"values of int8 are int8, .* float8_e4m3fn, got float16"):
        quantized_matmul(x, replace(stored, values=stored.values.astype(np.float16)))
    with pytest.raises(ValueError, match=r"scales are \[3, 5\], and values \[3, 96\] of int8"):
        quantized_matmul(x, replace(stored, scale=np.ones((3, 5), np.float16)))
    few = quantized(np.ones((3, 96), np.float32), "int4")
    odd = np.ones((3, 2), np.float16)  # Groups of 48.
    with pytest.raises(ValueError, match="equal groups of a multiple of 32"):
        quantized_matmul(x, replace(few, scale=odd, minimum=odd))
    for order in (np.zeros((3, 96), np.int32), np.zeros((1, 96), np.int8)):
        with pytest.raises(ValueError, match=r"it must be int32\[1, 96\]"):
            quantized_matmul(x, replace(stored, order=order))


@pytest.mark.parametrize("format", FORMATS)
def test_native_declines_what_it_does_not_read(format: Format):
    stored = quantized(drawn(0, 4, DEPTH), format)
    with pytest.raises(ExceptionGroup) as caught:
        quantized_matmul(jnp.ones((2, DEPTH)), stored, implementation="native")
    reason = str(caught.value.exceptions[0])
    its = spec(format)
    assert f"{its.kind} in groups of {its.group or DEPTH}" in reason or "built" in reason
