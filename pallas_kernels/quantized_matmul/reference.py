"""What a product with a stored matrix means, and the same left to XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized_matmul.best import Best, best_of
from pallas_kernels.quantized_matmul.matrix import Matrix, dequantized


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
    narrow: bool,  # Allows it and asks for nothing.
) -> Float[Array, "*B O"]:
    """Computes ``quantized_matmul`` with one product of XLA, in the dtype of ``x``.

    Both operands contract over their last axis: each output is then one dot product of two
    contiguous rows, which XLA's CPU backend runs much faster than ``[in, out]``.
    """
    numbers = dequantized(chosen(matrix, layer), x.dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    out = jax.lax.dot_general(x, numbers, contract, preferred_element_type=jnp.float32)
    return out.astype(dtype)


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
