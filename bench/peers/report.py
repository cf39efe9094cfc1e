"""From replies to numbers, from runs to medians and ratios, and the tables of ``bench.peers``.

A document has, under ``systems``, for each system what ``systems.py`` says of it and

    runs       {workload: {round: {metric: value, ..., "other_cores": ...}}}
    starts_s   [seconds to the first token], peak_bytes [at W2], failures {workload: reason}
    reason     why it did not run at all, else ""

A run whose answers were shorter than asked for has ``short`` and no metrics: it is never compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from bench.common import quantile
from bench.machine import NOISE_CORES
from bench.peers.protocol import Question, Reply
from bench.peers.systems import WORKLOADS

BENCH = "peers"
NOTHING = "-"


@dataclass(frozen=True)
class Metric:
    """A number of a workload."""

    key: str
    title: str
    higher_is_better: bool = False

    def times_better(self, ours: float, theirs: float) -> float:
        """Returns how many times better ours is; above 1 is better, for rates and for times."""
        return ours / theirs if self.higher_is_better else theirs / ours


RATE = Metric("tokens_per_s", "output tokens/s", higher_is_better=True)
FIRST_MS = Metric("first_ms", "first token ms, median")
METRICS: Mapping[str, tuple[Metric, ...]] = {
    "W1": (Metric("decode_per_s", "tokens/s after the first", True), FIRST_MS),
    "W2": (RATE,),
    "W3": (
        RATE,
        FIRST_MS,
        Metric("gap_ms", "between tokens ms, median"),
        Metric("gap_p99_ms", "p99"),
    ),
    "W4": (Metric("wall_s", "all answered, s"),),
    "W5": (Metric("first_s", "first token s"),),
}
"""What is told of each workload; the first one decides who is best."""
TITLES = {
    "W1": "one stream, 128 tokens in, 128 out",
    "W2": "64 requests at once, 64 to 512 in, 32 to 256 out",
    "W3": "32 closed-loop streaming clients, 96 requests, 128 in, 64 out",
    "W4": "64 requests at once, one prefix of 512 and 32 of their own in, 32 out",
    "W5": "one prompt of 4,096",
}


def measure(questions: Sequence[Question], replies: Sequence[Reply]) -> dict[str, Any]:
    """Returns every metric of a run, or only ``short``."""
    wanted = [question.output_tokens for question in questions]
    got = [len(reply.ids) for reply in replies]
    if got != wanted:
        return {"short": f"{sum(got)} of {sum(wanted)} tokens"}
    start_s, end_s = min(one.sent_s for one in replies), max(one.end_s for one in replies)
    first = [reply.arrivals_s[0] - reply.sent_s for reply in replies]
    gaps = [later - one for reply in replies for one, later in pairwise(reply.arrivals_s)]
    found = {
        "wall_s": end_s - start_s,
        "tokens_per_s": sum(got) / (end_s - start_s),
        "first_ms": quantile(first, 0.5) * 1e3,
        "first_p99_ms": quantile(first, 0.99) * 1e3,
        "first_s": quantile(first, 0.5),
        "gap_ms": quantile(gaps, 0.5) * 1e3,
        "gap_p99_ms": quantile(gaps, 0.99) * 1e3,
    }
    last_s = replies[0].arrivals_s[-1] - replies[0].arrivals_s[0]
    if len(replies) == 1 and last_s > 0:
        found["decode_per_s"] = (got[0] - 1) / last_s
    return {key: float(f"{value:.5g}") for key, value in found.items()}


@dataclass(frozen=True)
class Spread:
    """A median with the least and the most."""

    middle: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Returns that of some values; None of nothing."""
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        """Says it; one value alone has no spread."""
        if self.count == 1:
            return f"{_short(self.middle)} (once)"
        return f"{_short(self.middle)} ({_short(self.least)}..{_short(self.most)})"


def _short(value: float) -> str:
    """Three digits, and no exponent.

    >>> [_short(value) for value in (1234.5, 123.4, 1.2345, 0.01234)]
    ['1234', '123', '1.23', '0.0123']
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def values(system: Mapping[str, Any], workload: str, metric: str) -> dict[str, float]:
    """Returns a metric of every good run, by round."""
    runs = system["runs"].get(workload, {})
    return {number: run[metric] for number, run in runs.items() if metric in run}


def best_peer(
    document: Mapping[str, Any], workload: str, metric: Metric, precision_class: str | None
) -> str | None:
    """Returns the peer with the best median of a metric, of one class or of all."""
    found: dict[str, float] = {}
    for name, system in document["systems"].items():
        if not system["is_ours"] and precision_class in (None, system["class"]):
            spread = Spread.of([*values(system, workload, metric.key).values()])
            if spread is not None:
                found[name] = spread.middle
    if not found:
        return None
    choose = max if metric.higher_is_better else min
    return choose(found, key=lambda name: found[name])


def ratio(
    document: Mapping[str, Any], workload: str, metric: Metric, ours: str, theirs: str
) -> Spread | None:
    """Returns how many times better ours is: of each round that both ran, as they alternated."""
    mine = values(document["systems"][ours], workload, metric.key)
    other = values(document["systems"][theirs], workload, metric.key)
    rounds = [number for number in mine if number in other]
    pairs = [(mine[number], other[number]) for number in rounds]
    return Spread.of([metric.times_better(*pair) for pair in pairs if min(pair) > 0])


def equal_share(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Returns the share of the reference's tokens that are equal before the first difference.

    >>> equal_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]])
    0.6666666666666666
    """
    equal = 0
    for answer, own in zip(answers, reference, strict=True):
        pairs = zip(answer, own, strict=False)
        equal += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return equal / max(1, sum(map(len, reference)))


def table(document: Mapping[str, Any]) -> str:
    """Returns everything that there is to say, for people."""
    parts = [_of_workload(document, name) for name in sorted(WORKLOADS)]
    parts += [_of_starts(document), _of_ratios(document), _of_quality(document)]
    parts.append("\n".join(_notes(document)))
    return "\n\n".join(part for part in parts if part)


def _of_workload(document: Mapping[str, Any], workload: str) -> str:
    metrics = METRICS[workload]
    rows = [("system", "precision", "door", *(metric.title for metric in metrics))]
    for name, system in document["systems"].items():
        spreads = [Spread.of([*values(system, workload, one.key).values()]) for one in metrics]
        if any(spreads):
            told = (NOTHING if one is None else str(one) for one in spreads)
            rows.append((name, system["precision"], system["door"], *told))
    if len(rows) == 1:
        return ""
    return "\n".join([f"{workload}: {TITLES[workload]}", *_aligned(rows)])


def _of_starts(document: Mapping[str, Any]) -> str:
    rows = [("system", "start to first token, s", "memory at W2, GB")]
    for name, system in document["systems"].items():
        start = Spread.of(system["starts_s"])
        memory = Spread.of([peak / 1e9 for peak in system["peak_bytes"]])
        if start is not None:
            rows.append((name, str(start), NOTHING if memory is None else str(memory)))
    return "" if len(rows) == 1 else "\n".join(["start and memory", *_aligned(rows)])


def _of_ratios(document: Mapping[str, Any]) -> str:
    head = ("", "", "best peer of the class", "times better", "best peer of all", "times better")
    rows: list[tuple[str, ...]] = [head]
    ours = [name for name, system in document["systems"].items() if system["is_ours"]]
    for workload in sorted(WORKLOADS):
        for metric in METRICS[workload]:
            for name in ours:
                told = [*_beside(document, workload, metric, name)]
                if any(one != NOTHING for one in told):
                    rows.append((f"{workload} {metric.title}", name, *told))
    if len(rows) == 1:
        return ""
    title = "jaxserve against the best peer of each row; above 1 is better, rates and times alike"
    return "\n".join([title, *_aligned(rows)])


def _beside(document: Mapping[str, Any], workload: str, metric: Metric, name: str) -> Iterator[str]:
    for precision_class in (document["systems"][name]["class"], None):
        peer = best_peer(document, workload, metric, precision_class)
        found = None if peer is None else ratio(document, workload, metric, name, peer)
        if peer is None or found is None:
            yield from (NOTHING, NOTHING)
        else:
            yield f"{peer} ({document['systems'][peer]['door']})"
            yield str(found)


def _of_quality(document: Mapping[str, Any]) -> str:
    quality = document["quality"]
    if not quality["systems"]:
        return f"quality: {quality['reason']}" if quality["reason"] else ""
    rows = [("system", "equal leading tokens", "identical answers", "loss of its answers")]
    rows += [
        (
            name,
            f"{100 * found['equal_share']:.0f} %",
            f"{found['identical']} of {quality['prompts']}",
            f"{found['loss']:.3f}",
        )
        for name, found in quality["systems"].items()
    ]
    title = (
        f"greedy answers of {quality['tokens']} tokens beside those of a float32 reference, which "
        "also\nsays the loss of each, in nats a token (its own answers are the first line)"
    )
    return "\n".join([title, *_aligned(rows)])


def _notes(document: Mapping[str, Any]) -> Iterator[str]:
    """Says who is missing and why, and what is not to be trusted."""
    for name, system in document["systems"].items():
        if system["reason"]:
            yield f"{name} could not run: {system['reason']}"
        for workload, reason in system["failures"].items():
            yield f"{name} {workload} failed: {reason}"
        for workload, runs in system["runs"].items():
            for number, run in runs.items():
                if "short" in run:
                    yield f"{name} {workload} run {number} is refused: short, {run['short']}"
                elif (run.get("other_cores") or 0.0) > NOISE_CORES:
                    yield (
                        f"{name} {workload} run {number} was disturbed: others used "
                        f"{run['other_cores']:.2f} cores"
                    )
    yield from document["notes"]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
