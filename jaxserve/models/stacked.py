"""One layer's matrix, left where it is in the stack of all layers.

A loop over stacked layers would otherwise copy each matrix out of its stack before it is used; a
product that is told the stack and the layer's number reads it in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from pallas_kernels.quantized_matmul import Matrix, OnGpu


@dataclass(frozen=True)
class LayerOf:
    """Stands for ``stack[number]`` in a product."""

    stack: Matrix
    """``[L, ..., I]``"""
    number: Any
    """Of the layer; may be traced."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer's matrix."""
        return tuple(self.stack.shape[1:])

    def reshape(self, *shape: int) -> LayerOf:
        """The same matrix with other axes; one of them may be -1."""
        known = -math.prod(shape) if -1 in shape else 1
        sizes = [math.prod(self.shape) // known if size == -1 else size for size in shape]
        return LayerOf(self.stack.reshape(self.stack.shape[0], *sizes), self.number)

    def __getitem__(self, index: Any) -> LayerOf:
        """Itself, for ``[...]``."""
        assert index is Ellipsis
        return self


def in_rows(stack: Matrix, inputs: int) -> Matrix:
    """A stack as products take it, if it was repacked for GPUs; any other as it is.

    Args:
        stack: values ``[L, *O, *I]``; scales of a repacked one ``[L, *groups, *O]``.
        inputs: how many axes a product sums over.
    """
    if not isinstance(stack, OnGpu):
        return stack
    layers, *axes = stack.scale.shape
    groups, outs = math.prod(axes[:inputs]), math.prod(axes[inputs:])
    scale, minimum = jax.tree.map(
        lambda array: array.reshape(layers, groups, outs), (stack.scale, stack.minimum)
    )
    order = None if stack.order is None else stack.order.reshape(layers, 1, -1)
    return replace(
        stack,
        values=stack.values.reshape(layers, outs, -1),
        scale=scale,
        minimum=minimum,
        order=order,
    )
