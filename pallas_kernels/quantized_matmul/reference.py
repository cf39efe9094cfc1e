"""What a product with a stored matrix means, and the same left to XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.quantized_matmul.best import Best, best_of
from pallas_kernels.quantized_matmul.formats import MAX_INT8
from pallas_kernels.quantized_matmul.matrix import Matrix, Quantized, dequantized
from pallas_kernels.target import target


def quantized_matmul_reference(
    x: Float[Array, "*B I"],
    matrix: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,  # Allows it and asks for nothing.
) -> Float[Array, "*B O"]:
    """Computes ``quantized_matmul`` in float32: a sum over the last axis of both."""
    numbers = dequantized(chosen(matrix, layer), jnp.float32)
    out = jnp.einsum("...I,OI->...O", x.astype(jnp.float32), numbers, precision="highest")
    return out.astype(dtype)


def quantized_matmul_xla(
    x: Float[Array, "*B I"],
    matrix: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,
) -> Float[Array, "*B O"]:
    """Computes ``quantized_matmul`` with one product of XLA, in the dtype of ``x``.

    Both operands contract over their last axis: each output is then one dot product of two
    contiguous rows, which XLA's CPU backend runs much faster than ``[in, out]``. If ``narrow``
    allows it, an int8 matrix with one scale a row is multiplied by activations of int8.
    """
    matrix = chosen(matrix, layer)
    if narrow and isinstance(matrix, Quantized) and matrix.kind == "int8":
        stored = matrix.stored()
        if stored.scale.shape[-1] == 1:
            return _integer_product(x, stored).astype(dtype)
    numbers = dequantized(matrix, x.dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    # A GPU's products sum in float32 whatever they give, and give this dtype in the same launch.
    given = dtype if target().platform == "gpu" else jnp.float32
    out = jax.lax.dot_general(x, numbers, contract, preferred_element_type=given)
    return out.astype(dtype)


def rounded_rows(
    x: Float[Array, "*B I"], most: int
) -> tuple[Float32[Array, "*B I"], Float32[Array, "*B"]]:
    """Divides each row so that its largest number is ``most``; returns by what, too.

    A row that is not finite has a divisor that is not.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=-1)
    factor = jnp.where(largest == 0, 1, largest / most)
    return jnp.clip(wide / factor[..., None], -most, most), factor


def _integer_product(x: Float[Array, "*B I"], matrix: Quantized) -> Float32[Array, "*B O"]:
    """Rounds activations to int8, each row by itself, and multiplies whole numbers."""
    ratio, factor = rounded_rows(x, MAX_INT8)
    # XLA has no fast product of integers for CPUs. In float32 products are as exact, and sums of
    # thousands are off by a last bit.
    given, sums = (jnp.int8, jnp.int32) if target().platform == "gpu" else (jnp.float32,) * 2
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    whole = jax.lax.dot_general(
        jnp.rint(ratio).astype(given),
        matrix.values.astype(given),
        contract,
        preferred_element_type=sums,
    )
    scale = matrix.scale[:, 0].astype(jnp.float32)
    return whole.astype(jnp.float32) * factor[..., None] * jnp.expand_dims(scale, range(x.ndim - 1))


def best_product_reference(
    x: Float[Array, "B I"], matrix: Matrix, *, count: int | Int[Array, ""] | None, narrow: bool
) -> Best:
    """Computes ``best_product`` of the products of ``quantized_matmul_reference``."""
    dtype = jnp.dtype(jnp.float32)
    return best_of(quantized_matmul_reference(x, matrix, dtype=dtype, narrow=narrow), count)


def best_product_xla(
    x: Float[Array, "B I"], matrix: Matrix, *, count: int | Int[Array, ""] | None, narrow: bool
) -> Best:
    """Computes ``best_product`` of the products of ``quantized_matmul_xla``."""
    dtype = jnp.dtype(jnp.float32)
    return best_of(quantized_matmul_xla(x, matrix, dtype=dtype, narrow=narrow), count)


def chosen(matrix: Matrix, layer: int | Int[Array, ""] | None) -> Matrix:
    """Takes a layer out of a stack; without one, the matrix is no stack."""
    if layer is None:
        return matrix
    return jax.tree.map(
        lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), matrix
    )
