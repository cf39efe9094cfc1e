"""The gated feed-forward: every implementation equals float64, and one call equals two products."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import native
from pallas_kernels.quantized_matmul import (
    Activation,
    Matrix,
    feed_forward,
    gated,
    quantized_matmul,
)
from pallas_kernels.quantized_matmul.cases import LAYER, LAYERS, Storage, stored

from .native_here import needs_native, usable

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
SHAPES = {
    "one-row": (1, 64, 96, 64),
    "few": (5, 32, 192, 96),
    "batch": (64, 96, 160, 32),
    "odd-rows": (131, 64, 32, 67),
    "wide": (7, 576, 1536, 576),
}
"""Rows, depth, hidden numbers, outputs."""
STORED: tuple[tuple[Storage, Storage], ...] = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("int4", "int8"),
    ("float32", "int8"),
    ("bfloat16", "float32"),
)
TOLERANCE = 1e-5
"""Of the largest answer, for float32 sums and activations within 3e-7."""
compiled = jax.jit(feed_forward, static_argnames=("activation", "implementation", "narrow"))


def arrays(shape: str, storage: tuple[Storage, Storage]) -> tuple[jax.Array, Matrix, Matrix]:
    """Activations and stacks of both matrices, drawn the same every time."""
    rows, depth, hidden, out = SHAPES[shape]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, depth), np.float32)
    gate_up = rng.standard_normal((LAYERS, 2 * hidden, depth), np.float32) * depth**-0.5
    down = rng.standard_normal((LAYERS, out, hidden), np.float32)
    return jnp.asarray(x), stored(gate_up, storage[0]), stored(down, storage[1])


def activated(gate: np.ndarray, activation: Activation) -> np.ndarray:
    """In float64, by the definitions."""
    if activation == "silu":
        return gate / (1 + np.exp(-gate))
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner))


def expected(
    x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, activation: Activation
) -> np.ndarray:
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    return activated(gate, activation) * up @ down.T


def in_float64(matrix: Matrix) -> np.ndarray:
    """The layer's numbers, by products with the rows of the identity."""
    eye = jnp.eye(matrix.shape[-1])
    rows = quantized_matmul(eye, matrix, layer=LAYER, implementation="reference")
    return np.asarray(rows, np.float64).T


def check(shape: str, storage: tuple[Storage, Storage], activation: Activation, how: str) -> None:
    x, gate_up, down = arrays(shape, storage)
    answer = compiled(
        x, gate_up, down, layer=jnp.int32(LAYER), activation=activation, implementation=how
    )
    want = expected(np.asarray(x, np.float64), in_float64(gate_up), in_float64(down), activation)
    np.testing.assert_allclose(answer, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activates_the_first_half_only(activation: Activation):
    gate, up = np.array([-1.5, 0.0, 0.5, 2.0]), np.array([3.0, 5.0, -7.0, 0.25])
    both = jnp.array(np.concatenate([gate, up]), jnp.float32)
    want = activated(gate, activation) * up
    np.testing.assert_allclose(gated(both, activation), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", usable(["native", "parts", "xla", "reference"]))
@pytest.mark.parametrize("storage", STORED, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_the_numbers_that_are_stored(
    shape: str, storage: tuple[Storage, Storage], implementation: str
):
    check(shape, storage, "silu", implementation)


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("storage", [("float32", "float32"), ("int4", "int8")], ids="-".join)
def test_native_answers_on_every_instruction_set(
    storage: tuple[Storage, Storage], activation: Activation, isa: native.Isa
):
    check("odd-rows", storage, activation, "native")


@needs_native
@pytest.mark.parametrize("storage", STORED, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_is_two_narrow_products(
    shape: str, storage: tuple[Storage, Storage], isa: native.Isa
):
    """What is rounded between the products is rounded as the second product rounds its input."""
    x, gate_up, down = arrays(shape, storage)
    product = partial(
        quantized_matmul, layer=LAYER, dtype=jnp.float32, implementation="native", narrow=True
    )
    between = gated(product(x, gate_up), "silu")
    apart = np.asarray(product(between, down))
    answer = compiled(
        x, gate_up, down, layer=LAYER, activation="silu", implementation="native", narrow=True
    )
    # The activations' last bits differ, and may move a number to the next of those that are left.
    np.testing.assert_allclose(answer, apart, rtol=0, atol=2e-3 * np.abs(apart).max())


@needs_native
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("storage", STORED, ids="-".join)
@pytest.mark.parametrize("shape", ["few", "batch", "odd-rows"])
def test_neighbours_do_not_change_a_bit(
    shape: str, storage: tuple[Storage, Storage], narrow: bool, isa: native.Isa
):
    x, gate_up, down = arrays(shape, storage)
    run = partial(compiled, activation="silu", layer=LAYER, implementation="native", narrow=narrow)
    together = np.asarray(run(x, gate_up, down))
    for row in (0, len(x) // 2, len(x) - 1):
        np.testing.assert_array_equal(run(x[row : row + 1], gate_up, down)[0], together[row])


@needs_native
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_native_answers_have_the_dtype_of_the_activations(dtype: str):
    x, gate_up, down = arrays("few", ("bfloat16", "bfloat16"))
    run = partial(compiled, activation="silu", layer=LAYER)
    exact = run(x, gate_up, down, implementation="reference")
    answer = run(x.astype(dtype), gate_up, down, implementation="native")
    assert answer.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(answer, exact, rtol=0, atol=0.02 * np.abs(exact).max())


@needs_native
def test_a_number_that_is_not_finite_stays_in_its_row():
    x, gate_up, down = arrays("few", ("int8", "int8"))
    run = partial(compiled, activation="silu", layer=LAYER, implementation="native", narrow=True)
    clean = np.asarray(run(x, gate_up, down))
    answer = np.asarray(run(x.at[2, 7].set(jnp.nan), gate_up, down))
    assert not np.isfinite(answer[2]).any()
    rest = [0, 1, 3, 4]
    np.testing.assert_array_equal(answer[rest], clean[rest])


def test_without_a_layer_the_matrices_are_one_layers():
    x, gate_up, down = arrays("few", ("float32", "float32"))
    one = feed_forward(x[None], gate_up[LAYER], down[LAYER], activation="silu")
    stacked = feed_forward(x[None], gate_up, down, layer=LAYER, activation="silu")
    np.testing.assert_array_equal(one, stacked)


@needs_native
def test_auto_leaves_each_product_to_whoever_takes_it():
    """No native kernel takes a depth of 24, which the second matrix has."""
    x, gate_up, down = jnp.ones((2, 32)), jnp.ones((48, 32)), jnp.ones((3, 24))
    run = partial(feed_forward, activation="silu")
    gate = 32 / (1 + math.exp(-32))
    np.testing.assert_allclose(run(x, gate_up, down), np.full((2, 3), 24 * gate * 32), rtol=1e-5)
    program = str(jax.make_jaxpr(run)(x, gate_up, down))
    assert program.count("jaxserve_matmul") == 1
    assert "jaxserve_feed_forward" not in program
    with pytest.raises(ExceptionGroup, match="no implementation of feed_forward"):
        run(x, gate_up, down, implementation="native")


@needs_native
def test_what_lies_between_is_not_rounded_to_the_activations_dtype():
    """Only the answer is: two products of float32 in between, rounded to bfloat16 once."""
    x, gate_up, down = arrays("batch", ("float32", "float32"))
    x = x.astype(jnp.bfloat16)
    run = partial(compiled, layer=LAYER, activation="silu", implementation="native")
    exact = np.asarray(run(x.astype(jnp.float32), gate_up, down))
    np.testing.assert_array_equal(run(x, gate_up, down), exact.astype(jnp.bfloat16))


@needs_native
def test_feed_forwards_are_the_same_on_every_device_of_a_mesh():
    """Each device has some of the hidden numbers; their answers are added."""
    x, gate_up, down = arrays("wide", ("bfloat16", "bfloat16"))
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    run = partial(feed_forward, activation="silu", implementation="native")

    def part(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.psum(run(x, gate_up.reshape(-1, gate_up.shape[-1]), down), "tensor")

    split = jax.shard_map(
        part, mesh=mesh, in_specs=(P(), P(None, "tensor"), P(None, "tensor")), out_specs=P()
    )
    assert isinstance(gate_up, jax.Array)
    assert isinstance(down, jax.Array)
    one, other = gate_up[LAYER], down[LAYER]
    placed = jax.device_put(
        (one.reshape(2, -1, one.shape[-1]), other), NamedSharding(mesh, P(None, "tensor"))
    )
    answer = jax.jit(split)(x, *placed)
    whole = np.asarray(run(x, one, other))
    np.testing.assert_allclose(answer, whole, rtol=0, atol=TOLERANCE * np.abs(whole).max())


@pytest.mark.parametrize(
    ("gate_up", "down", "layer"),
    [((8, 16), (3, 5), None), ((8, 15), (3, 4), None), ((2, 8, 16), (3, 4), 0)],
)
def test_shapes_that_do_not_fit_are_refused(
    gate_up: tuple[int, ...], down: tuple[int, ...], layer: int | None
):
    with pytest.raises(ValueError, match="with activations"):
        feed_forward(
            jnp.ones((1, 16)), jnp.ones(gate_up), jnp.ones(down), layer=layer, activation="silu"
        )
