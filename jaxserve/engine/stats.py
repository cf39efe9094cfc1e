"""What the engine says about itself: one snapshot of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ShardStats:
    """One data shard. ``DataShardStats`` has the same names."""

    rows_running: int
    rows_max: int
    pages_total: int
    """Pages that can be allocated: the null page is not counted. = free + used + cached."""
    pages_free: int
    pages_used: int
    pages_cached: int
    prefix_lookup_tokens: int
    """Prompt tokens of admitted requests, since the start."""
    prefix_hit_tokens: int
    """Those that were in the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot taken between two steps. ``GetStatsResponse`` has the same names.

    Rows and pages are sums over the data shards.
    """

    rows_running: int = 0
    rows_max: int = 0
    requests_waiting: int = 0
    tokens_waiting: int = 0
    """Prompt tokens of the waiting requests."""
    pages_total: int = 0
    """Pages that can be allocated: the null page is not counted. = free + used + cached."""
    pages_free: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    """Pages that nobody uses now and whose contents a new prompt may still hit."""
    page_tokens: int = 0
    queue_age_seconds: float = 0.0
    """How long the oldest waiting request has waited; 0 when none waits."""
    output_tokens_per_second: float = 0.0
    """Over the last ten seconds."""
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    requests_accepted_total: int = 0
    requests_finished_total: dict[str, int] = field(default_factory=dict[str, int])
    """By finish reason (``FinishReason`` values)."""
    requests_rejected_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    prefix_hit_rate: float = 0.0
    """Cached prompt tokens / prompt tokens looked up, since the start."""
    compiles_after_ready: int = 0
    padding_waste: float = 0.0
    """Padded token places / token places computed, since the start."""
    phase_seconds_total: dict[str, float] = field(default_factory=dict[str, float])
    """Host time by phase: plan, pack, dispatch, wait, publish."""
    last_step_age_seconds: float = 0.0
    """Since a step last finished while work was there; 0 when idle."""
    healthy: bool = True
    draining: bool = False
    data_shards: tuple[ShardStats, ...] = ()


class RateMeter:
    """Events per second over the last ten seconds, in one-second bins."""

    WINDOW_S = 10

    def __init__(self) -> None:
        """Starts from nothing."""
        self._bins: dict[int, int] = {}

    def add(self, now: float, count: int) -> None:
        """Counts events that happened now; one thread only."""
        second = int(now)
        if second not in self._bins:
            # Replaced as a whole, so that a reader on another thread never sees it change size.
            first = second - self.WINDOW_S
            kept = {key: value for key, value in self._bins.items() if key > first}
            self._bins = {**kept, second: 0}
        self._bins[second] += count

    def rate(self, now: float) -> float:
        """Mean rate over the window, or over the time since the first event if shorter."""
        bins = self._bins
        recent = {key: value for key, value in bins.items() if key > now - self.WINDOW_S}
        if not recent:
            return 0.0
        return sum(recent.values()) / max(1.0, min(self.WINDOW_S, now - min(recent)))
