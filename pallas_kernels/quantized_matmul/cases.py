"""Shapes of products that matter, and where each comes from; tests walk them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.formats import Format
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


@dataclass(frozen=True)
class GpuCase:
    """One product on a GPU: activations ``[rows, depth]`` with ``[out, depth]`` in some format."""

    format: Format
    rows: int
    out: int
    depth: int
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of activations."""
    answers: Literal["bfloat16", "float16", "float32"] = "float32"
    narrow: bool = False

    def __str__(self) -> str:
        """What it is, as a test's id."""
        parts = [self.format.replace("/", "-"), f"{self.rows}x{self.out}x{self.depth}"]
        parts += [self.dtype, self.answers, "narrow" if self.narrow else ""]
        return "-".join(part for part in parts if part)


INTERPRETED = (
    # Every kind meets one row, a full tile, one row more, more than a tile; every group meets
    # tiles of 64, 128 and 192 columns that are smaller, equal and larger, as far as there are such.
    GpuCase("int4", 1, 64, 128),
    GpuCase("int4", 17, 192, 320, answers="bfloat16"),
    GpuCase("int4", 64, 64, 256),
    GpuCase("int4", 70, 256, 128),
    GpuCase("int4/64", 8, 128, 192, dtype="float16", answers="float16"),
    GpuCase("int4/64", 33, 64, 512),
    GpuCase("int4/128", 3, 64, 1024, answers="bfloat16"),
    GpuCase("int4/128", 130, 128, 256),
    GpuCase("int4/256", 9, 64, 512),
    GpuCase("int8", 1, 64, 64),
    GpuCase("int8", 17, 192, 576),
    GpuCase("int8/64", 9, 128, 256, answers="bfloat16"),
    GpuCase("int8/128", 33, 64, 512, dtype="float16"),
    GpuCase("int8/row", 5, 128, 256, answers="bfloat16"),
    GpuCase("int8/row", 12, 320, 192, narrow=True),
    GpuCase("int8/row", 70, 128, 128, narrow=True, answers="bfloat16"),
    GpuCase("int8/row", 130, 64, 192),
    GpuCase("fp8", 1, 64, 512),
    GpuCase("fp8", 33, 192, 192, narrow=True),
    GpuCase("fp8", 100, 128, 128, answers="bfloat16"),
    GpuCase("fp8/64", 9, 128, 320, dtype="float16"),
    GpuCase("fp8/128", 64, 64, 256),
)
"""Run in the interpreter of GPU kernels."""
