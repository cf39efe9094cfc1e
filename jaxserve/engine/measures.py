"""What no snapshot can tell later: how long things took and how large they were, as they happen.

A ``Histogram`` counts observations by the first bound that they do not exceed, in constant work
and memory. The engine thread alone observes; any thread reads. Every observation replaces the
counts as a whole, so a reader sees an instant and neither side waits. Nothing here knows how the
numbers are told to anybody; ``frontend/metrics/`` does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

from jaxserve.engine.sequence import LiveRequest

PHASES: tuple[str, ...] = ("plan", "pack", "dispatch", "wait", "publish")
STEP_KINDS: tuple[str, ...] = ("decode", "prefill", "mixed")

# vLLM's bounds, so that its dashboards fit, and finer ones below them: a small model's tokens come
# faster than its shortest bucket is long.
FINE_S = (0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075)
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
OUR_TOKEN_S = (*FINE_S, *TOKEN_S)
OUR_REQUEST_S = (0.001, 0.003, 0.01, 0.03, 0.1, *REQUEST_S)
STEP_S = (*FINE_S, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
PHASE_S = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def one_two_five(limit: int) -> tuple[int, ...]:
    """Returns 1, 2, 5, 10, 20, ... up to ``limit``, vLLM's bounds of token counts."""
    bounds: list[int] = []
    decade = 1
    while decade <= limit:
        bounds += [digit * decade for digit in (1, 2, 5) if digit * decade <= limit]
        decade *= 10
    return tuple(bounds)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """The counts of one instant."""

    bounds: tuple[float | int, ...]
    """Ascending; a bound is part of its bucket."""
    counts: tuple[int, ...]
    """By bucket, not added up; the last is of what exceeds every bound."""
    sum: float
    """Of all that was observed."""

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self.counts)

    def cumulative(
        self, bounds: Sequence[float | int] | None = None
    ) -> list[tuple[float | int, int]]:
        """Returns, for each bound, how many observations do not exceed it.

        Args:
            bounds: some of this histogram's; None takes all.
        """
        up_to = dict(zip(self.bounds, accumulate(self.counts), strict=False))
        return [(bound, up_to[bound]) for bound in (self.bounds if bounds is None else bounds)]

    def since(self, earlier: HistogramSnapshot) -> HistogramSnapshot:
        """What was observed after ``earlier``."""
        counts = (now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return HistogramSnapshot(self.bounds, tuple(counts), self.sum - earlier.sum)

    def quantile(self, share: float) -> float | None:
        """Returns about the value that ``share`` of the observations do not exceed.

        Within a bucket values are taken to be spread evenly, as Prometheus does; above the last
        bound it is that bound. None when nothing was observed.
        """
        rank = share * self.count
        if not self.count:
            return None
        below = 0
        for (low, high), count in zip(pairwise((0.0, *self.bounds)), self.counts, strict=False):
            if count and below + count >= rank:
                return low + (high - low) * (rank - below) / count
            below += count
        return self.bounds[-1]


class Histogram:
    """See the top of this file. ``observe`` on one thread only, ``snapshot`` on any."""

    __slots__ = ("_bounds", "_seen")

    def __init__(self, bounds: Sequence[float | int]) -> None:
        """Begins with nothing; ``bounds`` ascend."""
        self._bounds = tuple(bounds)
        self._seen: tuple[list[int], float] = ([0] * (len(bounds) + 1), 0.0)
        """Counts by bucket and the sum. Replaced and never changed."""

    def observe(self, value: float | int, times: int = 1) -> None:
        """Counts a value, as often as it was met."""
        counts, total = self._seen
        counts = counts.copy()
        counts[bisect_left(self._bounds, value)] += times
        self._seen = (counts, total + value * times)

    @property
    def sum(self) -> float:
        """Of all that was observed."""
        return self._seen[1]

    def snapshot(self) -> HistogramSnapshot:
        """Returns what was observed up to now."""
        counts, total = self._seen
        return HistogramSnapshot(self._bounds, tuple(counts), total)


@dataclass(frozen=True, kw_only=True)
class EngineMeasures:
    """Snapshots of everything that the engine measures; each is of one instant."""

    time_to_first_token: HistogramSnapshot
    """Seconds from acceptance to a request's first token."""
    queue: HistogramSnapshot
    """Seconds from acceptance to the first step; of requests that have a first token."""
    prefill: HistogramSnapshot
    """Seconds from the first step to the first token."""
    inter_token_latency: HistogramSnapshot
    """Seconds between two tokens of a choice."""
    time_per_output_token: HistogramSnapshot
    """Mean seconds between the tokens of a choice that was answered."""
    end_to_end: HistogramSnapshot
    """Seconds from acceptance to the end; like all below, of requests whose choices all ended with
    ``stop`` or ``length``."""
    decode: HistogramSnapshot
    """Seconds from the first to the last token."""
    inference: HistogramSnapshot
    """Seconds from the first step to the last token."""
    prompt_tokens: HistogramSnapshot
    output_tokens: HistogramSnapshot
    """Of all choices together."""
    max_tokens: HistogramSnapshot
    """What was asked for, where it was."""
    choices: HistogramSnapshot
    """``n``."""
    step_tokens: HistogramSnapshot
    """Tokens that a step computed, padding left out."""
    step_seconds: Mapping[str, HistogramSnapshot]
    """By ``STEP_KINDS``: from a step's dispatch, or the end of the one before it, to its end."""
    phase_seconds: Mapping[str, HistogramSnapshot]
    """By ``PHASES``: what the host did in one turn."""
    refused: Mapping[str, int]
    """Requests that ``submit`` refused, by the error's ``reason``."""


class Measures:
    """The histograms of one engine. Engine thread only, but for ``snapshot``."""

    def __init__(self, *, context_tokens: int) -> None:
        """Begins with nothing; ``context_tokens`` is the largest count of tokens there can be."""
        tokens = one_two_five(context_tokens)
        self.time_to_first_token = Histogram(FIRST_TOKEN_S)
        self.queue = Histogram(OUR_REQUEST_S)
        self.prefill = Histogram(OUR_REQUEST_S)
        self.inter_token_latency = Histogram(OUR_TOKEN_S)
        self.time_per_output_token = Histogram(OUR_TOKEN_S)
        self.end_to_end = Histogram(OUR_REQUEST_S)
        self.decode = Histogram(OUR_REQUEST_S)
        self.inference = Histogram(OUR_REQUEST_S)
        self.prompt_tokens = Histogram(tokens)
        self.output_tokens = Histogram(tokens)
        self.max_tokens = Histogram(tokens)
        self.choices = Histogram(CHOICES)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.step_seconds = {kind: Histogram(STEP_S) for kind in STEP_KINDS}
        self.phase_seconds = {phase: Histogram(PHASE_S) for phase in PHASES}

    def began(self, live: LiveRequest, first_s: float) -> None:
        """Observes a request's first token."""
        scheduled_s = live.scheduled_s
        assert scheduled_s is not None, "a request has a token before its first step"
        self.time_to_first_token.observe(first_s - live.accepted_s)
        self.queue.observe(scheduled_s - live.accepted_s)
        self.prefill.observe(first_s - scheduled_s)

    def answered(self, live: LiveRequest, now: float) -> None:
        """Observes a request whose choices have all ended as they should."""
        first_s, scheduled_s = live.first_token_s, live.scheduled_s
        if first_s is None or scheduled_s is None:
            return  # Its reader stopped every choice before there was a token.
        sampling, resumed = live.request.sampling, len(live.request.resume)
        last_s = first_s
        for sequence in live.sequences:
            if sequence.first_token_s is None or sequence.last_token_s is None:
                continue
            last_s = max(last_s, sequence.last_token_s)
            gaps = sequence.output_tokens - resumed - 1
            if gaps > 0:
                span_s = sequence.last_token_s - sequence.first_token_s
                self.time_per_output_token.observe(span_s / gaps)
        self.end_to_end.observe(now - live.accepted_s)
        self.decode.observe(last_s - first_s)
        self.inference.observe(last_s - scheduled_s)
        self.prompt_tokens.observe(len(live.request.prompt))
        self.output_tokens.observe(sum(sequence.output_tokens for sequence in live.sequences))
        self.choices.observe(sampling.n)
        if sampling.max_tokens is not None:
            self.max_tokens.observe(sampling.max_tokens)

    def snapshot(self, refused: Mapping[str, int]) -> EngineMeasures:
        """Returns everything as it is now."""
        made: dict[str, HistogramSnapshot] = {}
        for item in fields(EngineMeasures):
            histogram = getattr(self, item.name, None)
            if isinstance(histogram, Histogram):
                made[item.name] = histogram.snapshot()
        return EngineMeasures(
            **made,
            step_seconds={kind: each.snapshot() for kind, each in self.step_seconds.items()},
            phase_seconds={phase: each.snapshot() for phase, each in self.phase_seconds.items()},
            refused=refused,
        )
