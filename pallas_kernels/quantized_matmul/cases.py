"""Shapes of products that matter, and where each comes from; tests walk them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.matrix import Matrix, quantized

type Storage = Literal["float32", "bfloat16", "float16", "int8", "int4"]
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
"""What a matrix may be stored as."""

LAYERS = 2
LAYER = 1
"""The layer that a case multiplies by: not the first, so that a lost offset shows."""


@dataclass(frozen=True)
class Case:
    """One product: activations ``[rows, depth]`` with a matrix ``[out, depth]``."""

    name: str
    rows: int
    out: int
    depth: int

    def __str__(self) -> str:
        """The name, as a test's id."""
        return self.name

    def arrays(
        self, storage: Storage, *, dtype: Any = "float32"
    ) -> tuple[Float[Array, "B I"], Any]:
        """Draws activations and a stack of two matrices; the same ones every time.

        Columns differ in size by a factor of a thousand, so that a scale of the wrong group shows.
        """
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self.rows, self.depth), np.float32)
        stack = rng.standard_normal((LAYERS, self.out, self.depth), np.float32)
        stack *= 10.0 ** rng.uniform(-3, 0, self.depth).astype(np.float32)
        return jnp.asarray(x, dtype), stored(stack, storage)


def stored(matrix: np.ndarray, storage: Storage) -> Matrix:
    """A float32 matrix in one of the forms that products take."""
    if storage in ("int8", "int4"):
        return quantized(matrix, storage)
    return jnp.asarray(matrix, storage)


CASES = (
    Case("smollm2-decode", 1, 960, 576),
    Case("smollm2-few", 5, 96, 1536),
    Case("smollm2-batch", 64, 144, 576),
    Case("chunk", 131, 67, 64),  # Neither rows nor outputs are a multiple of a block.
    Case("one-output", 7, 1, 32),
    Case("three-outputs", 2, 3, 96),
    Case("llama-8b-down", 3, 8, 14_336),  # More groups than are converted at a time.
)
