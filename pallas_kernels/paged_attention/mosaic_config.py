"""How the GPU kernel of paged attention is tiled for which shapes: what a search found, or a rule.

A tiling follows from a model's shapes and never from a step's rows, whose answers are to have the
same bits in any company.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic import SHARED_BYTES, cores
from pallas_kernels.paged_attention.mosaic_launch import Config, shared_bytes
from pallas_kernels.searched import numbers_of, read_record

RECORD = Path(__file__).with_name("configs.json")
"""Written by a search on a GPU (``bench.kernels --search``); need not be there."""
ROOM_BYTES = 4_096
"""Of shared memory, for barriers and for aligning what is in it."""
TILE_KEYS = 64
PIECE_TOKENS = 512
"""A row with one query is cut into pieces of at least so many keys."""


@dataclass(frozen=True)
class Problem:
    """What a tiling is chosen for."""

    head_dim: int
    group: int
    """Query heads of one key head."""
    page_tokens: int
    pages: Any
    """dtype of the numbers in the pool."""
    one_query: bool
    """Whether every row has one new token."""

    @property
    def compute(self) -> jnp.dtype:
        """The dtype of the tensor cores' operands."""
        return compute_dtype(self.pages)

    @property
    def key(self) -> str:
        """What a tiling is recorded under, such as ``128 group 4 page 64 int8 decode``."""
        kind = "decode" if self.one_query else "prompt"
        pages = jnp.dtype(self.pages).name
        return f"{self.head_dim} group {self.group} page {self.page_tokens} {pages} {kind}"

    def why_not(self, config: Config) -> str | None:
        """Says why the kernel cannot be tiled this way; None when it can."""
        if config.tiles not in (1, 2) or config.columns not in (1, 2) or config.warpgroups > 2:
            return f"{config.tiles} tiles by {config.columns} columns are no 1 or 2 warpgroups"
        if config.tiles == 2 and (self.one_query or self.pages != self.compute):
            return "2 tiles are of several queries, over pages of 16 bits"
        if (config.columns == 2) != (self.head_dim > 128):
            return f"head_dim {self.head_dim} does not go with {config.columns} columns"
        keys = config.tile_keys
        if keys not in (64, 128) or (keys % self.page_tokens and self.page_tokens % keys):
            return f"tiles of {keys} keys do not go with pages of {self.page_tokens}"
        if config.stages < 1 or config.query_stages not in (1, 2):
            return f"{config.stages} stages and {config.query_stages} of queries are no ring"
        needed = self.shared_bytes(config)
        if needed > SHARED_BYTES - ROOM_BYTES:
            return f"{needed} bytes of shared memory are more than there are"
        return None

    def shared_bytes(self, config: Config) -> int:
        """Of one thread block, without barriers."""
        out = jnp.dtype(jnp.float32) if self.one_query else self.compute
        return shared_bytes(config, self.head_dim, self.pages, self.compute, out)


def compute_dtype(numbers: Any) -> jnp.dtype:
    """The dtype of the tensor cores' operands."""
    if numbers == jnp.float8_e4m3fn:
        return jnp.dtype(jnp.float16)  # The processor cannot make bfloat16 of e4m3.
    if jnp.issubdtype(numbers, jnp.integer):
        return jnp.dtype(jnp.bfloat16)  # float16 of int8 takes a slower unit.
    return jnp.dtype(numbers)


@cache
def _recorded() -> dict[str, Any]:
    """By kind of device and key: what a search on such a device found."""
    return read_record(RECORD)


def best_known(problem: Problem, kind: str) -> Config | None:
    """Returns the tiling that was fastest for a problem on a kind of device; None: not known.

    One that is recorded and cannot be used is not known.
    """
    found = numbers_of(_recorded(), kind, problem.key, Config, ["blocks"])
    if found is None:
        return None
    config = Config(**found, blocks=cores())
    return config if problem.why_not(config) is None else None


def rule(problem: Problem) -> Config:
    """Returns how to tile where nothing was searched: as deep a ring as shared memory holds."""
    is_wide = problem.head_dim > 128
    config = Config(
        tiles=1 if problem.one_query or is_wide or problem.pages != problem.compute else 2,
        columns=2 if is_wide else 1,
        tile_keys=TILE_KEYS,
        stages=6,
        query_stages=1 if is_wide else 2,
        blocks=cores(),
    )
    while problem.shared_bytes(config) > SHARED_BYTES - ROOM_BYTES:
        config = replace(config, stages=config.stages - 1)
    return config
