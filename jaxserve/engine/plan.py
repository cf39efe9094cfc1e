"""What a step may compute (``SchedulerConfig``) and what one does (``StepPlan``)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.engine.sequence import LiveSequence


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one step and of the pool."""

    max_rows: int
    """Sequences running at once, in each data shard."""
    step_tokens: int
    """Tokens of one step at most, decode rows included, in each data shard; above ``max_rows``.
    Small: prompts take long. Large: running answers stutter while a prompt is computed."""
    max_chunks: int
    """Prompt chunks of one step at most, in each data shard."""
    chunk_tokens: int | None = None
    """Prompt tokens of one step at most, in each data shard: the longest prefill bucket. None:
    ``step_tokens``."""
    page_tokens: int
    """Tokens in one page."""
    num_pages: int
    """Pages in the pool of each data shard, counting the null page."""
    data_shards: int = 1
    """Copies of the model, each with rows and pages of its own: the mesh's data axis."""
    prefix_cache: bool = True
    """Share pages between requests with equal prefixes (and salts)."""

    @property
    def longest_chunk(self) -> int:
        """Tokens that one chunk, and all of a step together, may have."""
        return min(self.step_tokens, self.chunk_tokens or self.step_tokens)

    def __post_init__(self) -> None:
        """Refuses what could never plan a prompt."""
        for name in ("max_rows", "max_chunks", "chunk_tokens", "page_tokens", "data_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.step_tokens <= self.max_rows:
            raise ValueError(
                f"step_tokens is {self.step_tokens} and max_rows {self.max_rows}: full rows would "
                "leave no place for prompts; raise step_tokens above max_rows"
            )


@dataclass(slots=True)
class Chunk:
    """Prompt tokens ``start`` to ``start + count`` of one sequence; ``last`` samples a token."""

    sequence: LiveSequence
    row: int
    start: int
    count: int
    last: bool


@dataclass(slots=True)
class StepPlan:
    """What one step computes, shard after shard.

    Rows are copied: a sequence may lose its row before it publishes.
    """

    decode: list[LiveSequence] = field(default_factory=list[LiveSequence])
    decode_rows: list[int] = field(default_factory=list[int])
    decode_positions: list[int] = field(default_factory=list[int])
    """Position of the token that each decode row feeds in."""
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    admitted: list[LiveSequence] = field(default_factory=list[LiveSequence])
    """Sequences that got their row in this plan: their row data has to be set up."""
    grown: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(row, table index, page) of every page added to a running row since the last plan."""

    @property
    def empty(self) -> bool:
        """True when there is nothing to compute."""
        return not self.decode and not self.chunks

    def sequences(self) -> list[LiveSequence]:
        """Every sequence that the step computes something for."""
        return [*self.decode, *(chunk.sequence for chunk in self.chunks)]
