"""How the product on Hopper is cut into pieces, and which way for which shapes.

What decides the order in which an answer is summed, ``depth``, ``chains`` and ``parts``, follows
from shapes and formats alone, and up to ``FEW`` rows of activations not from their number: a row's
answer has the same bits in a batch of any such size. The rest may follow from anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic import CORES, LINES, SHARED_BYTES
from pallas_kernels.searched import numbers_of, read_record

RECORD = Path(__file__).with_name("configs.json")
"""Written by a search on a GPU; need not be there."""
FEW = 64
"""Up to so many rows the memory's speed is the limit, and beyond it that of the tensor cores."""
FEW_TOKENS = (8, 16, 32)
"""Rows of activations in a tile. More do not fit the registers of as many warpgroups as it takes to
widen values at the memory's speed."""
MANY_TOKENS = (128,)
USUAL = 16
"""Rows of a decode step, where their number may not matter."""
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

    @property
    def is_few(self) -> bool:
        """Whether a row's answer has the same bits in any company."""
        return self.rows <= FEW

    @property
    def tokens(self) -> int:
        """Rows of activations in a tile, where nothing better is known."""
        sizes = FEW_TOKENS if self.is_few else MANY_TOKENS
        return next((size for size in sizes if size >= self.rows), sizes[-1])

    @property
    def key(self) -> str:
        """What a configuration is recorded under, such as ``4096x14336 int4/128 bfloat16 few``."""
        rows = "few" if self.is_few else f"{-(-self.rows // self.tokens) * self.tokens} rows"
        values, activations = jnp.dtype(self.values).name, jnp.dtype(self.activations).name
        group = self.depth // self.groups
        return f"{self.outs}x{self.depth} {values}/{group} {activations} {rows}"

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
        sums = groups * config.tokens * 4 if self.has_minimum and not self.is_few else 0
        return values + x + scales * (2 if self.has_minimum else 1) + sums


def bits(dtype: Any) -> int:
    """Of one number."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else jnp.dtype(dtype).itemsize * 8


@cache
def _recorded() -> dict[str, Any]:
    """By kind of device and key: what a search on such a device found."""
    return read_record(RECORD)


def best_known(problem: Problem, kind: str) -> Config | None:
    """Returns the configuration that was fastest for a problem on a kind of device.

    One for few rows is for any number of them; tiles have as many as there are. One that is
    recorded and cannot be used is not known.
    """
    found = numbers_of(_recorded(), kind, problem.key, Config, ["programs"])
    if found is None:
        return None
    config = Config(**found)
    if not _is_searched(config, few=problem.is_few):
        return None
    if problem.is_few:
        config = replace(config, tokens=min(config.tokens, problem.tokens))
    config = replace(config, programs=problem.programs)
    return config if problem.why_not(config) is None else None


def _is_searched(config: Config, *, few: bool) -> bool:
    """Whether it is one of those that a search tries; the kernel was compiled as no other."""
    return (
        config.tokens in (FEW_TOKENS if few else MANY_TOKENS)
        and config.depth in DEPTHS
        and config.rows in ((1,) if few else (1, 2))
        and config.chains in (CHAINS if few else (1,))
        and config.parts <= MOST_PARTS
        and config.stages <= MOST_STAGES
    )


def choose(problem: Problem) -> Config:
    """Returns the configuration for a problem.

    Raises:
        NotImplementedError: There is none; the text says why.
    """
    few, tokens = problem.is_few, problem.tokens
    reasons = []
    # Twice the columns of 8 bits, widened beside the sums of so many rows, do not fit registers.
    is_narrow = few or problem.by_row or bits(problem.values) < 8
    for depth, rows in product(DEPTHS if is_narrow else DEPTHS[-1:], (1,) if few else (2, 1)):
        for chains in CHAINS if few else (1,):
            parts = _parts(problem, rows * LINES, depth * chains, 0 if few else tokens)
            for rounds in range(MOST_STAGES // chains, 0, -1):
                stages = rounds * chains
                config = Config(tokens, depth, rows, chains, parts, stages, problem.programs)
                reason = problem.why_not(config)
                if reason is None:
                    return config
                reasons.append(reason)
    raise NotImplementedError(reasons[-1])


def _parts(problem: Problem, block: int, step: int, tokens: int) -> int:
    """How many parts of the depth, each of whole steps, keep the multiprocessors busiest.

    What it costs to add parts up is put in as a share of what it takes to read the matrix.

    Args:
        problem: See there.
        block: Rows of the matrix in an item.
        step: Columns.
        tokens: Rows of activations in an item; 0: as though there were ``USUAL`` in all.
    """
    rows = problem.rows if tokens else USUAL
    blocks = max(1, problem.outs // block) * (-(-rows // tokens) if tokens else 1)

    def cost(parts: int) -> float:
        turns = -(-blocks * parts // problem.programs) * problem.programs / (blocks * parts)
        matrix = problem.depth * bits(problem.values) / 8
        return turns * (1 + (parts > 1) * (0.05 + parts * rows * 8 / matrix))

    possible = [
        parts
        for parts in range(1, MOST_PARTS + 1)
        if problem.depth % (parts * step) == 0
        and (parts == 1 or problem.depth // parts >= LEAST_DEPTH)
    ]
    return min(possible, key=cost, default=1)
