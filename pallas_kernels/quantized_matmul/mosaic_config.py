"""How the product on Hopper is cut into pieces, and which way for which shapes.

What decides the order in which an answer is summed, ``depth``, ``chains`` and ``parts``, follows
from a matrix's shape and format, and from whether there are more than ``FEW`` rows of activations:
up to there a row's answer has the same bits in a batch of any size, and beyond it too. The rest may
follow from anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic import CORES, LINES, SHARED_BYTES

TOKENS = (8, 16, 32, 64, 128)
"""Rows of activations that a tile may have."""
FEW = 64
"""Up to so many rows the memory's speed is the limit, and beyond it that of the tensor cores."""
DEPTHS = (128, 192, 64)
"""Columns of a tile, best first."""
CHAINS = (4, 3, 2, 1)
MOST_STAGES = 16
MOST_PARTS = 8
SPARE_BYTES = 2048
"""Of shared memory, for barriers and alignment."""
LEAST_DEPTH = 512
"""Columns of a part: one with fewer spends its time on beginning and ending."""


@dataclass(frozen=True)
class Config:
    """How the kernel is tiled."""

    tokens: int
    """Rows of activations in a tile."""
    depth: int
    """Columns in a tile."""
    rows: int
    """Times 64: rows of the matrix in a tile, and warpgroups beside each other."""
    chains: int
    """Warpgroups that take turns at the tiles of the same rows; their sums are added in order."""
    parts: int
    """Of the depth, that thread blocks of their own compute, and XLA adds in order."""
    stages: int
    """Tiles in the ring, a multiple of ``chains``."""
    programs: int = CORES
    """Thread blocks, one for each multiprocessor."""


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for."""

    rows: int
    """Of the activations."""
    outs: int
    depth: int
    groups: int
    values: Any
    """dtype of the matrix as stored."""
    activations: Any
    """dtype in which activations meet it."""
    has_minimum: bool
    scale: Any
    """dtype of scales."""
    programs: int = CORES

    @property
    def by_row(self) -> bool:
        """Whether the scale is applied once, at the end."""
        return self.groups == 1 and not self.has_minimum

    def why_not(self, config: Config) -> str | None:
        """Says why the problem cannot be cut this way; None when it can."""
        block = config.rows * LINES
        if self.outs % block:
            return f"{self.outs} rows of the matrix are no multiple of {block}"
        if self.depth % (config.depth * config.parts * config.chains):
            return (
                f"{self.depth} columns are no {config.parts} parts of {config.chains} times "
                f"{config.depth}"
            )
        group = self.depth // self.groups
        if max(group, config.depth) % min(group, config.depth):
            return f"tiles of {config.depth} columns and groups of {group} do not fit each other"
        if config.stages % config.chains:
            return f"{config.stages} stages are no multiple of {config.chains} chains"
        if (needed := self.shared_bytes(config)) > SHARED_BYTES - SPARE_BYTES:
            return f"{needed} bytes of shared memory are more than there are"
        return None

    def shared_bytes(self, config: Config) -> int:
        """Of one thread block, without barriers."""
        stage = self.stage_bytes(config)
        strips = config.rows * LINES
        between = (config.chains - 1) * strips * config.tokens * 4
        return config.stages * stage + between + strips * config.tokens * 4

    def stage_bytes(self, config: Config) -> int:
        """Of one tile with everything that comes with it."""
        block = config.rows * LINES
        values = block * config.depth * bits(self.values) // 8
        x = config.tokens * config.depth * bits(self.activations) // 8
        groups = max(1, config.depth * self.groups // self.depth)
        scales = 0 if self.by_row else groups * block * jnp.dtype(self.scale).itemsize
        return values + x + scales * (2 if self.has_minimum else 1)


def bits(dtype: Any) -> int:
    """Of one number."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else jnp.dtype(dtype).itemsize * 8


def choose(problem: Problem) -> Config:
    """Returns the configuration for a problem.

    Raises:
        NotImplementedError: There is none; the text says why.
    """
    tokens = next((size for size in TOKENS if size >= problem.rows), TOKENS[-1])
    few = problem.rows <= FEW
    reasons = []
    for depth in DEPTHS:
        if few:
            cuts = [(1, chains, _parts(problem, depth * chains)) for chains in CHAINS]
        else:
            cuts = [(2, 1, 1), (1, 1, 1)]
        for rows, chains, parts in cuts:
            for rounds in range(MOST_STAGES // chains, 0, -1):
                stages = rounds * chains
                config = Config(tokens, depth, rows, chains, parts, stages, problem.programs)
                reason = problem.why_not(config)
                if reason is None:
                    return config
                reasons.append(reason)
    raise NotImplementedError(reasons[-1])


def _parts(problem: Problem, step: int) -> int:
    """How many parts of the depth, each of whole steps, keep the most multiprocessors busy.

    Rows of the activations do not matter here, see the top of the file; 16 are assumed.
    """
    blocks = problem.outs // LINES

    def cost(parts: int) -> float:
        turns = -(-blocks * parts // problem.programs) * problem.programs / (blocks * parts)
        moved = problem.depth * bits(problem.values) / 8
        return turns * (1 + (parts > 1) * (0.05 + parts * 16 * 8 / moved))

    possible = [
        parts
        for parts in range(1, MOST_PARTS + 1)
        if problem.depth % (parts * step) == 0
        and (parts == 1 or problem.depth // parts >= LEAST_DEPTH)
    ]
    return min(possible, key=cost, default=1)
