"""Grouped products: every implementation equals numpy's sums in float64, group by group."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import native
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.cases import CASES, Case
from pallas_kernels.quantized_matmul import Quantized, quantized_matmul
from pallas_kernels.quantized_matmul.cases import LAYER, STORAGES, Storage

from .native_here import needs_native, usable
from .test_quantized_matmul import TOLERANCE, numbers

IMPLEMENTATIONS = usable(["native", "xla", "reference"])
BY_NAME = {case.name: case for case in CASES}
compiled = jax.jit(grouped_matmul, static_argnames=("dtype", "implementation", "narrow"))


def expected_of(case: Case, x: np.ndarray, stack: object) -> tuple[np.ndarray, np.ndarray]:
    """The products, and the sums of the sizes of what was added; zeros behind the last group."""
    matrices = numbers(stack)[LAYER]
    out, size = np.zeros((2, len(x), case.out))
    start = 0
    for group, rows in enumerate(case.sizes):
        mine = slice(start, start + rows)
        out[mine] = x[mine] @ matrices[group].T
        size[mine] = np.abs(x[mine]) @ np.abs(matrices[group]).T
        start += rows
    return out, size


def check(case: Case, storage: Storage, implementation: str, dtype: str = "float32") -> None:
    x, stack, sizes = case.arrays(storage, dtype=dtype)
    answer = compiled(x, stack, sizes, layer=jnp.int32(LAYER), implementation=implementation)
    assert answer.dtype == x.dtype
    expected, size = expected_of(case, np.asarray(x, np.float64), stack)
    error = np.abs(np.asarray(answer, np.float64) - expected)
    assert (error <= TOLERANCE[dtype] * size).all(), error.max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_row_meets_the_matrix_of_its_group(case: Case, storage: Storage, implementation: str):
    check(case, storage, implementation)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral-8x7b-down", "padded"])
def test_native_products_on_every_instruction_set(name: str, storage: Storage, isa: native.Isa):
    check(BY_NAME[name], storage, "native")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", ["bfloat16", "int4"])
def test_activations_of_16_bits_are_rounded_once(storage: Storage, implementation: str):
    if implementation == "xla" and storage == "int4":
        storage = "bfloat16"  # It rounds dequantized numbers, too, as its dtype says.
    check(BY_NAME["all-in-the-last"], storage, implementation, "bfloat16")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_layer_the_matrices_are_no_stack(implementation: str):
    x, stack, sizes = BY_NAME["padded"].arrays("int8")
    alone = compiled(x, stack[LAYER], sizes, implementation=implementation)
    layered = compiled(x, stack, sizes, layer=LAYER, implementation=implementation)
    np.testing.assert_array_equal(alone, layered)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_layer_that_is_not_there_becomes_the_nearest(storage: Storage, implementation: str):
    x, stack, sizes = BY_NAME["padded"].arrays(storage)
    beyond = compiled(x, stack, sizes, layer=jnp.int32(9), implementation=implementation)
    last = compiled(x, stack, sizes, layer=jnp.int32(1), implementation=implementation)
    np.testing.assert_array_equal(beyond, last)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", ["float32", "int4"])
def test_an_answer_is_the_same_in_any_company(storage: Storage, implementation: str):
    """A row alone, first of its group, and in the middle of many with other groups before it."""
    case = BY_NAME["mixtral-8x7b-down"]
    x, stack, sizes = case.arrays(storage)
    run = partial(compiled, layer=LAYER, implementation=implementation)
    together = np.asarray(run(x, stack, sizes))
    row = sum(case.sizes[:3]) + 17
    alone = np.zeros(len(case.sizes), np.int32)
    alone[3] = 1
    one = np.asarray(run(x[row : row + 1], stack, jnp.asarray(alone)))
    pair = np.asarray(run(x[row - 1 : row + 1], stack, jnp.asarray(2 * alone)))
    if implementation == "native":
        np.testing.assert_array_equal(one[0], together[row])
        np.testing.assert_array_equal(pair[1], together[row])
    else:
        size = np.abs(np.asarray(x[row])) @ np.abs(numbers(stack)[LAYER][3]).T
        for other in (one[0], pair[1]):
            assert (np.abs(other - together[row]) <= 2 * TOLERANCE["float32"] * size).all()


@needs_native
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_narrow_products_are_those_of_one_matrix(storage: Storage):
    """Bit for bit what ``quantized_matmul`` gives each group; how it rounds is tested there."""
    case = BY_NAME["mixtral-8x7b-down"]
    x, stack, sizes = case.arrays(storage)
    options = {"implementation": "native", "narrow": True}
    answer = compiled(x, stack, sizes, layer=LAYER, **options)
    start = 0
    for group, rows in enumerate(case.sizes):
        mine = slice(start, start + rows)
        if rows:
            one = quantized_matmul(x[mine], stack[LAYER][group], **options)
            np.testing.assert_array_equal(answer[mine], one)
        start += rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_is_not_finite_spoils_no_other(implementation: str):
    x, stack, sizes = BY_NAME["padded"].arrays("float32")
    run = partial(compiled, layer=LAYER, implementation=implementation)
    spoilt = np.asarray(run(x.at[3].set(jnp.nan).at[-1].set(jnp.inf), stack, sizes))
    sound = np.asarray(run(x, stack, sizes))
    assert np.isnan(spoilt[3]).all()
    others = np.arange(len(x)) != 3
    np.testing.assert_array_equal(spoilt[others], sound[others])
    np.testing.assert_array_equal(sound[-4:], 0)


@needs_native
def test_native_reads_no_matrix_of_an_empty_group():
    x, stack, sizes = BY_NAME["padded"].arrays("float32")
    spoilt = stack.at[:, 1].set(jnp.nan)
    run = partial(compiled, layer=LAYER, implementation="native")
    np.testing.assert_array_equal(run(x, spoilt, sizes), run(x, stack, sizes))


@needs_native
@pytest.mark.parametrize("sizes", [(9, 9, 9), (-5, 2, 3)])
def test_sizes_that_cannot_be_stay_within_the_rows(sizes: tuple[int, ...]):
    x, stack, _ = BY_NAME["padded"].arrays("float32")
    answer = compiled(x, stack, jnp.asarray(sizes, jnp.int32), layer=LAYER, implementation="native")
    assert np.isfinite(answer).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shards_multiply_by_their_own_rows_of_every_matrix(implementation: str):
    x, stack, sizes = BY_NAME["mixtral-8x7b-down"].arrays("int8")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
    rows = P(None, None, "tensor")

    def run(x, stack, sizes):
        return grouped_matmul(x, stack, sizes, layer=LAYER, implementation=implementation)

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(), Quantized(rows, rows), P()),
        out_specs=P(None, "tensor"),
        check_vma=False,
    )
    whole = np.asarray(jax.jit(run)(x, stack, sizes))
    np.testing.assert_allclose(jax.jit(sharded)(x, stack, sizes), whole, rtol=2e-5, atol=2e-5)


def test_shapes_that_do_not_belong_together_are_refused():
    x, stack, sizes = BY_NAME["padded"].arrays("float32")
    with pytest.raises(ValueError, match=r"matrices are \[2, 3, 7, 32\].*\[E, O, I\] with I = 32"):
        grouped_matmul(x, stack, sizes)
    with pytest.raises(ValueError, match=r"must be \[L, E, O, I\] with I = 16"):
        grouped_matmul(x[:, :16], stack, sizes, layer=0)
    with pytest.raises(ValueError, match=r"sizes are int32\[2\]; there are 3 matrices"):
        grouped_matmul(x, stack, sizes[:2], layer=0)
    with pytest.raises(ValueError, match=r"sizes are int16\[3\].*must be int32\[3\]"):
        grouped_matmul(x, stack, sizes.astype(jnp.int16), layer=0)
    with pytest.raises(ValueError, match="no implementation 'fast'; choose 'auto'"):
        grouped_matmul(x, stack, sizes, layer=0, implementation="fast")


@pytest.mark.parametrize("layer", [None, LAYER])
def test_columns_in_an_order_of_their_own_are_refused(layer: int | None):
    x, stack, sizes = BY_NAME["padded"].arrays("int8")
    assert isinstance(stack, Quantized)
    order = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32)[::-1], (2, 3, 1, 32))
    ordered = replace(stack, order=order)
    if layer is None:
        ordered = ordered[0]
    shape = r"\[2, 3, 1, 32\]" if layer else r"\[3, 1, 32\]"
    with pytest.raises(ValueError, match=f"an order of their columns, int32{shape}.* put the colu"):
        grouped_matmul(x, ordered, sizes, layer=layer)


@needs_native
def test_the_native_kernel_says_what_it_was_not_written_for():
    x, stack, sizes = BY_NAME["padded"].arrays("float32")
    with pytest.raises(ExceptionGroup) as caught:
        grouped_matmul(x[:, :8], stack[..., :8], sizes, layer=0, implementation="native")
    assert "the last axis must be a multiple of 16, got 8" in str(caught.value.exceptions[0])
    np.testing.assert_allclose(
        grouped_matmul(x[:, :8], stack[..., :8], sizes, layer=0),
        grouped_matmul(x[:, :8], stack[..., :8], sizes, layer=0, implementation="reference"),
        rtol=1e-5,
        atol=1e-5,
    )
