"""From answers to one JSON line: what every benchmark of the engine and of the server shares.

A *door* (``offline.py``, ``serving.py``) sends the requests of a variant and returns one ``Answer``
each; ``lines`` warms up, runs, counts the tokens, throws disturbed runs away, and says the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.machine import NOISE_CORES, OtherLoad
from bench.workloads import Ask, Workload
from jaxserve.engine.stats import EngineStats

PHASES = ("plan", "pack", "dispatch", "wait", "publish")
KEYS = (
    "workload",
    "door",
    "precision",
    "output_tokens_per_s",
    "ttft_ms",
    "itl_ms",
    "phases_ms",
    "padding_waste",
    "compiles_after_ready",
    "commit",
    "versions",
    "machine",
)
"""Of a line. One more, ``short``, says that answers were shorter than asked: do not compare it."""


@dataclass
class Answer:
    """What one request got, on the clock of ``time.perf_counter``."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list[float])
    """When each message with tokens came."""
    tokens: int = 0
    end_s: float = 0.0


@dataclass(frozen=True)
class Door:
    """A way of asking, with what is behind it."""

    name: str
    ask: Callable[[Workload, Sequence[Ask], str], list[Answer]]
    """Sends requests under a cache salt, as the workload's load says."""
    stats: Callable[[], EngineStats]
    model: str
    precision: str
    vocab_size: int
    process_ids: Sequence[int] = ()
    """Processes outside this one's tree that work for the measurement."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Run:
    """One measured run."""

    line: dict[str, Any]
    wall_s: float


def runs(
    door: Door, workload: Workload, machine: Mapping[str, Any], *, count: int, retries: int
) -> Iterator[Run]:
    """Yields measured runs; a disturbed one is run again on other ids, while retries last."""
    door.ask(workload, workload.warm_up(door.vocab_size), uuid.uuid4().hex)
    variant = done = 0
    while done < count:
        run = _run(door, workload, workload.asks(variant, door.vocab_size), machine)
        variant += 1
        cores = run.line["machine"]["other_cores"]
        if cores is not None and cores > NOISE_CORES:
            say(f"{workload.name}: others used {cores:.2f} cores meanwhile (limit {NOISE_CORES})")
            if retries:
                retries -= 1
                continue
        done += 1
        yield run


def _run(door: Door, workload: Workload, asks: Sequence[Ask], machine: Mapping[str, Any]) -> Run:
    other, before = OtherLoad(door.process_ids), door.stats()
    # A salt of its own: not even an earlier call of this script leaves pages that would match.
    answers = door.ask(workload, asks, uuid.uuid4().hex)
    after, cores = door.stats(), other.cores()
    wall_s = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    first = [answer.arrivals_s[0] - answer.sent_s for answer in answers if answer.arrivals_s]
    gaps = [b - a for answer in answers for a, b in pairwise(answer.arrivals_s)]
    line = {
        "workload": workload.describe(door.model),
        "door": door.name,
        "precision": door.precision,
        "output_tokens_per_s": round(tokens / wall_s, 2),
        "ttft_ms": quantiles_ms(first),
        "itl_ms": quantiles_ms(gaps),
        "phases_ms": phases_ms(before, after),
        "padding_waste": round(after.padding_waste, 4),
        "compiles_after_ready": after.compiles_after_ready,
        "commit": commit(),
        "versions": {**versions(), **door.versions},
        "machine": {**machine, "other_cores": cores},
    }
    wanted = sum(ask.output_tokens for ask in asks)
    if tokens != wanted:
        line["short"] = f"{tokens} of {wanted} tokens"
    return Run(line, wall_s)


def phases_ms(before: EngineStats, after: EngineStats) -> dict[str, float]:
    """Returns the engine thread's mean milliseconds a step, by phase."""
    steps = max(1, after.steps_total - before.steps_total)
    seconds, earlier = after.phase_seconds_total, before.phase_seconds_total
    return {
        phase: round((seconds.get(phase, 0.0) - earlier.get(phase, 0.0)) / steps * 1e3, 4)
        for phase in PHASES
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Returns a quantile, linear between two values; 0 of nothing.

    >>> quantile([4, 1, 3, 2], 0.5)
    2.5
    """
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Returns median and 99th percentile, in milliseconds."""
    return {
        name: round(quantile(seconds, share) * 1e3, 3)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def commit() -> str:
    """Returns the commit measured, with ``+changes`` where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Returns the versions of what decides the speed."""
    found = {"python": platform.python_version()}
    for package in ("jaxserve", "jax", "jaxlib", "grpcio"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every measurement of a door takes."""
    group = parser.add_argument_group("measurement")
    group.add_argument("--runs", type=int, default=1, metavar="K", help="measured runs (default 1)")
    group.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="K",
        help="disturbed runs of a workload to throw away (default 2)",
    )
    group.add_argument("--out", type=Path, metavar="FILE", help="append the lines to this file")


def write(line: Mapping[str, Any], out: Path | None) -> None:
    """Prints a line, and appends it to the file."""
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(text + "\n")


def say(text: str) -> None:
    """Tells a person; stdout belongs to the lines."""
    print(text, file=sys.stderr, flush=True)
