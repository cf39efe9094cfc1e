"""Shapes of grouped products that matter, and where each comes from; tests walk them.

Depths and the sizes of groups are the models'; of the matrices' many rows there are a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized_matmul.cases import LAYERS, Storage, stored


@dataclass(frozen=True)
class Case:
    """Rows of ``depth`` numbers in groups of so many, each with a matrix ``[out, depth]``."""

    name: str
    sizes: tuple[int, ...]
    out: int
    depth: int
    padding: int = 0
    """Rows behind the last group."""

    def __str__(self) -> str:
        """The name, as a test's id."""
        return self.name

    def arrays(
        self, storage: Storage, *, dtype: Any = "float32"
    ) -> tuple[Float[Array, "M I"], Any, Int[Array, " E"]]:
        """Draws activations, a stack of two layers' matrices, and the sizes; the same every time.

        Columns differ in size by a factor of a thousand, so that a scale of the wrong group shows.
        """
        rng = np.random.default_rng(0)
        x = rng.standard_normal((sum(self.sizes) + self.padding, self.depth), np.float32)
        stack = rng.standard_normal((LAYERS, len(self.sizes), self.out, self.depth), np.float32)
        stack *= 10.0 ** rng.uniform(-3, 0, self.depth).astype(np.float32)
        sizes = jnp.asarray(self.sizes, jnp.int32)
        return jnp.asarray(x, dtype), stored(stack, storage), sizes


CASES = (
    # One token takes two of eight experts.
    Case("mixtral-8x7b-decode", (0, 0, 1, 0, 0, 1, 0, 0), 24, 4096),
    # 33 tokens, dealt out unevenly; the hidden numbers of a device of four.
    Case("mixtral-8x7b-down", (13, 0, 9, 31, 1, 2, 0, 10), 16, 3584),
    # Four tokens take eight of 128 experts each.
    Case(
        "qwen3-30b-a3b-decode",
        tuple(int(e % 5 == 0) + int(e % 21 == 3) for e in range(128)),
        8,
        2048,
    ),
    Case("qwen2-57b-a14b-down", (3, 0, 70, 1, 0, 0, 5, 1), 12, 2560),
    Case("one-group", (37,), 67, 64),  # A plain product; no size is a multiple of a block.
    Case("all-in-the-last", (0, 0, 0, 19), 5, 96),
    Case("padded", (2, 0, 3), 7, 32, padding=4),
    Case("nothing", (0, 0), 3, 32, padding=2),
)
