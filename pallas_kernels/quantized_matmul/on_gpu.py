"""Quantized matrices in the order in which GPUs read them.

A repack at load makes them of ``Quantized``; nothing is rounded, and ``stored`` is the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.quantized_matmul.matrix import Leaf, Quantized

BLOCK = 32
"""Columns whose values of int4 share 16 bytes, lower halves first."""
SIGNS = 0x88
"""Turns two values of 0 to 15 in a byte into values of -8 to 7, less by 8, and back."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnGpu:
    """A ``Quantized`` matrix ``[..., O, I]`` as the kernel for Hopper reads it.

    Scales of neighbouring rows lie beside each other, and come in one bulk copy with a tile of
    values. Values of int4 are signed, which the processor widens in fewer instructions, and stay in
    the order of their bytes: a product puts its activations into ``columns``'s order, which is much
    less than to put the matrix into theirs.
    """

    values: Leaf
    """int8 or float8_e4m3fn ``[..., O, I]``, or uint8 ``[..., O, I / 2]``: bytes of ``Quantized``
    with the highest bit of each half turned over."""
    scale: Leaf
    """``[..., I / group, O]``."""
    minimum: Leaf = None
    """As ``scale``; int4 alone has one."""
    order: Leaf = None
    """As in ``Quantized``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        *rows, stored = self.values.shape
        return (*rows, stored * (1 if self.minimum is None else 2))

    @property
    def ndim(self) -> int:
        """Axes of the matrix."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of single values: int4, int8 or float8_e4m3fn."""
        return jnp.dtype(self.values.dtype if self.minimum is None else jnp.int4)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[-1] // self.scale.shape[-2]

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> OnGpu:
        """Matrices of a stack: an index of the axes before the last two."""
        return jax.tree.map(lambda array: array[index], self)

    def stored(self) -> Quantized:
        """The same matrix as it was."""
        return _quantized(self, self.values if self.minimum is None else self.values ^ SIGNS)

    def codes(self) -> Shaped[Array, "*L O I"]:
        """Values one by one, in the order of ``columns``; those of int4 are signed."""
        if self.minimum is None:
            return self.values
        return jax.lax.bitcast_convert_type(self.values, jnp.int4).reshape(self.shape)

    def columns(self, x: Shaped[Array, "*B I"]) -> Shaped[Array, "*B I"]:
        """Puts activations into the order of ``codes``."""
        if self.minimum is None:
            return x
        halves = x.reshape(*x.shape[:-1], -1, 2, BLOCK // 2)
        return jnp.swapaxes(halves, -1, -2).reshape(x.shape)


def for_gpu(matrix: Quantized) -> OnGpu:
    """Repacks a matrix, or a stack of them, for GPUs; may be traced, with donated arrays."""
    values = matrix.values if matrix.minimum is None else matrix.values ^ SIGNS
    return OnGpu(
        values, *(_turned(array) for array in (matrix.scale, matrix.minimum)),
        order=getattr(matrix, "order", None),
    )


def _quantized(matrix: OnGpu, values: Array) -> Quantized:
    scale, minimum = (_turned(array) for array in (matrix.scale, matrix.minimum))
    ordered = {} if matrix.order is None else {"order": matrix.order}
    return Quantized(values, scale, minimum, **ordered)


def _turned(array: Leaf) -> Leaf:
    return None if array is None else array.swapaxes(-1, -2)
