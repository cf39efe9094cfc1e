"""What a grouped product means, and the same left to XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized_matmul import Matrix, dequantized
from pallas_kernels.quantized_matmul.reference import chosen

_ROWS_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
"""Rows ``[M, I]`` with matrices ``[E, O, I]``, both contracted over their last axis."""


def grouped_matmul_reference(
    x: Float[Array, "M I"],
    matrices: Matrix,
    sizes: Int[Array, " E"],
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,  # Allows it and asks for nothing.
) -> Float[Array, "M O"]:
    """Computes ``grouped_matmul`` in float32: every row with every matrix, and its own is kept."""
    numbers = dequantized(chosen(matrices, layer), jnp.float32)
    every = jnp.einsum("MI,EOI->MEO", x.astype(jnp.float32), numbers, precision="highest")
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    own = (row[:, None] >= (ends - sizes)[None]) & (row[:, None] < ends[None])
    return jnp.where(own[..., None], every, 0.0).sum(axis=1).astype(dtype)


def grouped_matmul_xla(
    x: Float[Array, "M I"],
    matrices: Matrix,
    sizes: Int[Array, " E"],
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,  # Allows it and asks for nothing.
) -> Float[Array, "M O"]:
    """Computes ``grouped_matmul`` with one ragged product of XLA, in the dtype of ``x``.

    On a CPU XLA multiplies all rows with all matrices, masked: E times the work.
    """
    numbers = dequantized(chosen(matrices, layer), x.dtype)
    out = jax.lax.ragged_dot_general(
        x, numbers, sizes, _ROWS_BY_GROUP, preferred_element_type=jnp.dtype(jnp.float32)
    )
    # A ragged product promises nothing of rows behind the last group.
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.where(row[:, None] < sizes.sum(), out, 0.0).astype(dtype)
