"""One layer's matrix, left where it is in the stack of all layers.

A loop over stacked layers would otherwise copy each matrix out of its stack before it is used; a
product that is told the stack and the layer's number reads it in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pallas_kernels.quantized_matmul import Matrix


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
