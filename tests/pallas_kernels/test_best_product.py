"""The best of products: the largest, where it stands, and whether all are finite."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import native
from pallas_kernels.quantized_matmul import (
    Best,
    Matrix,
    best_product,
    has_native_best,
    quantized_matmul,
)
from pallas_kernels.quantized_matmul.cases import CASES, LAYER, STORAGES, Case, Storage, stored

from .native_here import needs_native, usable

IMPLEMENTATIONS = usable(["native", "xla", "reference"])
BY_NAME = {case.name: case for case in CASES}
compiled = jax.jit(quantized_matmul, static_argnames=("dtype", "implementation", "narrow"))
compiled_best = jax.jit(best_product, static_argnames=("implementation", "narrow"))
VOCABULARY = Case("vocabulary", 9, 3001, 64)
"""So many panels that a thread takes several at a time."""


def expect_best(found: Best, answers: np.ndarray) -> None:
    """``found`` is the best of finite answers ``[B, O]``, to the bit."""
    assert [array.dtype.name for array in found] == ["float32", "int32", "bool"]
    np.testing.assert_array_equal(found.answer, answers.max(axis=-1))
    np.testing.assert_array_equal(found.place, answers.argmax(axis=-1))
    assert np.asarray(found.is_finite).all()


@needs_native
@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("case", [*CASES, VOCABULARY], ids=str)
def test_the_best_native_product_is_that_of_native_products_to_the_bit(
    case: Case, storage: Storage, is_narrow: bool, isa: native.Isa
):
    x, stack = case.arrays(storage)
    matrix = stack[LAYER]
    options = {"implementation": "native", "narrow": is_narrow}
    answers = np.asarray(compiled(x, matrix, **options))
    expect_best(compiled_best(x, matrix, **options), answers)
    expect_best(compiled_best(x[-1:], matrix, **options), answers[-1:])
    for count in sorted({1, (case.out + 1) // 2, case.out}):
        found = compiled_best(x, matrix, count=jnp.int32(count), **options)
        expect_best(found, answers[:, :count])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", STORAGES)
def test_of_equal_products_the_first_is_the_best(storage: Storage, implementation: str):
    """Sums of few small whole numbers are exact, and often equal."""
    rng = np.random.default_rng(3)
    x = rng.integers(-2, 3, (33, 32)).astype(np.float32)
    x[:, 4:] = 0
    matrix = rng.integers(-2, 3, (200, 32)).astype(np.float32)
    # The least and the largest of a group: its scale is 1, and it meets zeros.
    matrix[:, 30:] = -2, 127 if storage == "int8" else 13
    answers = x @ matrix.T
    assert ((answers == answers.max(axis=-1, keepdims=True)).sum(axis=-1) > 1).mean() > 0.5
    best = partial(compiled_best, x, stored(matrix, storage), implementation=implementation)
    for count in (1, 63, 200):
        expect_best(best(count=jnp.int32(count)), answers[:, :count])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_a_row_with_a_product_that_is_not_finite_says_so(value: float, implementation: str):
    x, stack = VOCABULARY.arrays("float32")
    matrix = stack[LAYER].at[-1, 3].set(value)
    spoilt = x.at[2, 5].set(value)
    for is_narrow in (False, True):
        best = partial(compiled_best, implementation=implementation, narrow=is_narrow)
        found = best(spoilt, matrix, count=jnp.int32(VOCABULARY.out - 1))
        np.testing.assert_array_equal(found.is_finite, np.arange(VOCABULARY.rows) != 2)
        sound = best(x, stack[LAYER], count=jnp.int32(VOCABULARY.out - 1))
        for one, other in zip(found, sound, strict=True):
            np.testing.assert_array_equal(np.delete(one, 2), np.delete(other, 2))
        every = best(spoilt, matrix)
        assert not np.asarray(every.is_finite).any()
        for places in (found.place, every.place):
            assert ((places >= 0) & (places < VOCABULARY.out)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_no_products_none_is_the_best(implementation: str):
    x, stack = BY_NAME["smollm2-few"].arrays("int8")
    found = compiled_best(x, stack[LAYER], count=jnp.int32(0), implementation=implementation)
    assert (found.answer == -jnp.inf).all()
    assert found.is_finite.all()
    assert ((found.place >= 0) & (found.place < 96)).all()


def test_a_best_product_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch):
    x, stack = BY_NAME["three-outputs"].arrays("int4")
    with pytest.raises(
        ValueError, match=r"the matrix is \[2, 3, 96\]; .* it must be \[O, I\] with"
    ):
        best_product(x, stack)
    with pytest.raises(ValueError, match=r"\[O, I\] with I = 64"):
        best_product(x[:, :64], stack[LAYER])
    with pytest.raises(ValueError, match=r"the matrix is int32; give floats, or a Quantized"):
        best_product(x, jnp.ones((3, 96), jnp.int32))
    with pytest.raises(ValueError, match="best_product has no implementation 'cublas'"):
        best_product(x, stack[LAYER], implementation="cublas")
    monkeypatch.setattr(native, "_load", lambda: "none here")
    assert not has_native_best(x, stack[LAYER])
    with pytest.raises(ExceptionGroup) as caught:
        best_product(x, stack[LAYER], implementation="native")
    assert str(caught.value.exceptions[0]) == "none here"


@needs_native
def test_the_best_product_is_native_where_products_are():
    ones = jnp.ones((2, 32))
    assert has_native_best(ones, jnp.ones((3, 32)))
    assert has_native_best(ones, jnp.ones((3, 32)), implementation="native")
    assert not has_native_best(ones, jnp.ones((3, 32)), implementation="xla")
    assert not has_native_best(ones[:, :24], jnp.ones((3, 24)))


@needs_native
def test_each_device_of_a_mesh_finds_the_best_of_its_own_tokens():
    """100 tokens are padded to 144: one device has 72 of them, the other 28."""
    x, stack = BY_NAME["smollm2-batch"].arrays("int8")
    matrix = stack[LAYER]
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])

    def own(x: jax.Array, matrix: Matrix) -> jax.Array:
        left = 100 - 72 * jax.lax.axis_index("tensor")
        count = jnp.clip(left, 0, matrix.shape[0]).astype(jnp.int32)
        return best_product(x, matrix, count=count, implementation="native").place[None]

    split = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P("tensor"))
    products = np.asarray(compiled(x, matrix, implementation="native"))
    want = [products[:, :72].argmax(-1), products[:, 72:100].argmax(-1)]
    placed = jax.device_put(matrix, jax.NamedSharding(mesh, P("tensor")))
    np.testing.assert_array_equal(jax.jit(split)(x, placed), want)
