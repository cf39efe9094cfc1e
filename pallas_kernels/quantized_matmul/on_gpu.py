"""Quantized matrices in the order in which GPUs read them.

A repack at load, ``for_gpu``, makes them of ``Quantized``; nothing is rounded, and ``stored`` is
the way back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.quantized_matmul.formats import GROUP
from pallas_kernels.quantized_matmul.matrix import Leaf, Quantized

SIGNS = 0x88
"""Turns two values of 0 to 15 in a byte into values of -8 to 7, less by 8, and back."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnGpu(Quantized):
    """A ``Quantized`` matrix ``[..., O, I]`` as the kernel for Hopper reads it.

    ``scale`` and ``minimum`` are ``[..., I / group, O]``: those of neighbouring rows lie side by
    side, and come in one bulk copy with a tile of values. Values of int4 have the highest bit of
    each half turned over: they are signed, which the processor widens in fewer instructions. They
    stay in the order of their bytes; a product puts its activations into that order instead, as
    ``columns`` does.
    """

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.shape[-1] // self.scale.shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """Of single values: int4, int8 or float8_e4m3fn."""
        return jnp.dtype(jnp.int4 if self.kind == "int4" else self.values.dtype)

    def reshape(self, *shape: int) -> Quantized:
        """See ``Quantized``; in the layout there, unless these are the axes that it has."""
        known = -math.prod(shape) if -1 in shape else 1
        sizes = (*(math.prod(self.shape) // known if size == -1 else size for size in shape),)
        return self if sizes == self.shape else self.stored().reshape(*shape)

    def __getitem__(self, index: Any) -> Quantized:
        """See ``Quantized``; rows are in the layout there, and layers in that of here."""
        if isinstance(index, int) and self.ndim > 2:
            return jax.tree.map(lambda array: array[index], self)
        if self.ndim > 2 or self.order is not None:
            return self.stored()[index]

        # Only what is asked for is turned back.
        def columns(array: Leaf) -> Leaf:
            return None if array is None else jnp.moveaxis(array[:, index], 0, -1)

        values = self.values[index]
        if self.kind == "int4":
            values = values ^ SIGNS
        return Quantized(values, columns(self.scale), columns(self.minimum))

    def rows(self, start: Any, count: int) -> OnGpu:
        """See ``Quantized``."""
        scale, minimum = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, count, axis=-1),
            (self.scale, self.minimum),
        )
        values = jax.lax.dynamic_slice_in_dim(self.values, start, count)
        return OnGpu(values, scale, minimum)

    def stored(self) -> Quantized:
        """The same matrix in the layout of ``Quantized``."""
        values = self.values ^ SIGNS if self.kind == "int4" else self.values
        return Quantized(values, _turned(self.scale), _turned(self.minimum), self.order)

    def codes(self) -> Shaped[Array, "*L O I"]:
        """Values one by one, in the order of ``columns``; those of int4 are signed."""
        if self.kind != "int4":
            return self.values
        return jax.lax.bitcast_convert_type(self.values, jnp.int4).reshape(self.shape)

    def columns(self, x: Shaped[Array, "*B I"]) -> Shaped[Array, "*B I"]:
        """Puts activations into the order of ``codes``."""
        if self.kind != "int4":
            return x
        halves = x.reshape(*x.shape[:-1], -1, 2, GROUP // 2)
        return jnp.swapaxes(halves, -1, -2).reshape(x.shape)


def for_gpu(matrix: Quantized) -> OnGpu:
    """Repacks a matrix, or a stack of them, for GPUs.

    May be traced: within a jit that is given a loaded matrix, donated, shards stay where they are.
    """
    matrix = matrix.stored()
    values = matrix.values ^ SIGNS if matrix.kind == "int4" else matrix.values
    return OnGpu(values, _turned(matrix.scale), _turned(matrix.minimum), matrix.order)


def _turned(array: Leaf) -> Leaf:
    return None if array is None else array.swapaxes(-1, -2)
