"""What is fixed when the GPU kernel of paged attention is traced: its tiling and its shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LINES


@dataclass(frozen=True)
class Config:
    """How the kernel is tiled; results do not depend on it beyond rounding."""

    tiles: int
    """Tiles of 64 packed query rows, each with a warpgroup that attends: 1 or 2."""
    columns: int
    """Parts that the columns of values, and of answers, are divided into, each with a warpgroup of
    its own that computes the scores for itself: 1, or 2 of one tile, whose registers hold half."""
    tile_keys: int
    """Tokens of one turn of the loop: 64 or 128."""
    stages: int
    """Tiles of keys and values in the ring."""
    query_stages: int
    """Tiles of queries: 2 lets the next unit's arrive early."""
    blocks: int
    """Thread blocks, one for each multiprocessor."""

    @property
    def warpgroups(self) -> int:
        """That attend."""
        return self.tiles * self.columns


@dataclass(frozen=True)
class Launch:
    """What is fixed when the kernel is traced."""

    config: Config
    units: int
    out_lines: int
    """Rows of each warpgroup's that are written, a multiple of 8."""
    out_dtype: Any
    group: int
    scale: float
    softcap: float
    has_window: bool
    one_query: bool
    """Every row has one new token: one position for all of a tile."""
    dtype: Any
    """Of queries, and of the tensor cores' operands."""
    pages: Any
    """Dtype of the pool's numbers."""
    head_dim: int
    kv_heads: int
    page_tokens: int
    table_width: int

    @property
    def has_scales(self) -> bool:
        """Whether the pool's numbers have scales."""
        return self.pages != self.dtype

    @property
    def width(self) -> int:
        """Columns of values that one warpgroup weighs."""
        return self.head_dim // self.config.columns

    @property
    def cells(self) -> int:
        """Columns of cells in the widest swizzle that they may lie in.

        Of int4 twice as many are in a swizzle, and in registers at once: too many beside the sums
        of heads of 256.
        """
        is_tight = self.config.columns > 1 and jax.dtypes.itemsize_bits(self.pages) < 8
        return self.width // 2 if is_tight else self.width

    @property
    def part(self) -> int:
        """Columns of cells that are in registers at once: whole swizzles of both dtypes."""
        of = ((self.cells, self.pages), (self.width, self.dtype))
        bits = ((width, jax.dtypes.itemsize_bits(dtype)) for width, dtype in of)
        return math.lcm(*(8 * plgpu.find_swizzle(width * b) // b for width, b in bits))


def shared_bytes(config: Config, head_dim: int, pages: Any, compute: Any, out: Any) -> int:
    """Shared memory that a config needs, but for a few hundred bytes of barriers."""
    lines = config.tiles * LINES
    bits = jax.dtypes.itemsize_bits
    cell = bits(pages) * head_dim // 8
    narrow = bits(pages) < 16
    ring = config.stages * config.tile_keys * 2 * (cell + (2 if narrow else 0))
    wide = 2 * config.tile_keys * head_dim * 2 if narrow else 0
    queries = config.query_stages * lines * head_dim * bits(compute) // 8
    return ring + wide + queries + lines * (head_dim * bits(out) // 8 + 4)
