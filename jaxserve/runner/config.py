"""What a runner compiles: sizes, types, and the names of the programs that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from jaxserve.engine.step import StepShape
from jaxserve.runner.cache import CacheShape
from sharding.rules import ShardingRules

FEW_ROWS, SHORT_TOKENS = 16, 64
"""Sizes between the smallest and the largest that a server should not be without for long."""

MASK_ROWS = 16
"""Rows of each data shard whose masks are set in one call."""


@dataclass(frozen=True, order=True)
class ProgramKey:
    """Names one compiled program. Ordered from cheap to expensive."""

    places: int
    """Token places that it computes."""
    kind: str
    """``decode``, ``prefill``, ``score``, ``embed``, ``set_row`` or ``set_masks``."""
    rows: int
    """Lines, which of ``prefill`` share their token places."""
    tokens: int

    def __str__(self) -> str:
        """Reads like ``decode of 16 rows`` or ``prefill of 256 tokens``."""
        if not self.tokens:
            return self.kind
        size = f"{self.rows} rows" if self.kind == "decode" else f"{self.tokens} tokens"
        return f"{self.kind} of {size}"

    @property
    def file_name(self) -> str:
        """Of the program, without an ending."""
        return f"{self.kind}-{self.rows}x{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """What is compiled."""

    step: StepShape
    cache: CacheShape
    dtype: jnp.dtype
    activations: jnp.dtype | None = None
    """Of what goes from layer to layer; None: the weights' dtype."""
    unrolled_rows: int = 0
    """Decode programs of at most so many rows are compiled layer by layer, on CPUs; the others loop
    over stacked layers. XLA's CPU backend copies a layer's weights out of their stack in each turn
    of a loop, which a step of few rows feels; unrolled programs take three times as long to compile
    and eight times to load."""
    has_native: bool = True
    """Programs may call native kernels, where this machine has them; see ``StepPrograms``."""
    repacked: bool = False
    """Quantized weights are repacked for the kernel of Hopper GPUs when they are loaded; see
    ``repacking``. Then no program is unrolled."""
    kernels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Implementations that programs must be made of, by family of kernels; others are the best that
    accept."""
    rules: ShardingRules = field(default_factory=ShardingRules)
    compiler_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """For XLA, beside those that the platform gets anyway; ``bench.gpu`` tries some."""

    def program_keys(self) -> list[ProgramKey]:
        """Every program of the grid, cheapest first."""
        keys = [ProgramKey(0, "set_row", 1, 0), ProgramKey(0, "set_masks", MASK_ROWS, 0)]
        keys += [ProgramKey(rows, "decode", rows, 1) for rows in self.step.decode_buckets]
        for kind, buckets in (
            ("prefill", self.step.prefill_buckets),
            ("score", self.step.score_buckets),
            ("embed", self.step.embed_buckets),
        ):
            keys += [ProgramKey(tokens, kind, lines, tokens) for lines, tokens in buckets]
        return sorted(keys)

    def first_keys(self) -> list[ProgramKey]:
        """The few programs that every step can be made of, cheapest first.

        The largest of each kind takes whatever may be planned. One row, a few rows and a short
        prompt have a smaller one, so that the first requests do not wait for a step of padding.
        """
        rows, prefill = self.step.decode_buckets, self.step.prefill_buckets
        few = [size for size in rows if size >= FEW_ROWS][:1]
        short = [bucket for bucket in prefill if bucket[1] >= SHORT_TOKENS][:1]
        first = {
            "set_row": {(1, 0)},
            "set_masks": {(MASK_ROWS, 0)},
            "decode": {(size, 1) for size in (*rows[:1], *few, *rows[-1:])},
            "prefill": {*short, *prefill[-1:]},
            "score": {*self.step.score_buckets[-1:]},
            "embed": {*self.step.embed_buckets[-1:]},
        }
        return [key for key in self.program_keys() if (key.rows, key.tokens) in first[key.kind]]
