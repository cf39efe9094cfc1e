"""What is asked: named workloads, those of the command line, and those of a file.

A workload has *variants*: the same lengths with other token ids. Run k uses variant k, so that no
run finds its prompts in the cache of the run before. Ids come from the middle of the vocabulary,
which in a byte-pair vocabulary is whole words, so that both doors ask the same without a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP = -1
"""The variant that no measured run uses."""
MAX_WARM_UP = 32
"""Requests of a warm-up at most."""


@dataclass(frozen=True)
class Ask:
    """One request: greedy, past end tokens, so that its length is known."""

    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """When requests are sent. Neither set: all at once."""

    clients: int | None = None
    """Each sends its next request when its last is answered."""
    rate: float | None = None
    """Requests a second, at random (Poisson) times."""

    def __str__(self) -> str:
        """Says it in words."""
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return "at once" if self.clients is None else f"{self.clients} clients"

    def arrivals_s(self, count: int, seed: int) -> list[float]:
        """Returns when each request may be sent, in seconds from the start."""
        if self.rate is None:
            return [0.0] * count
        rng, now = random.Random(f"{seed}/arrivals"), 0.0
        times = []
        for _ in range(count):
            times.append(now)
            now += rng.expovariate(self.rate)
        return times


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of known lengths."""

    name: str
    requests: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    seed: int = 1
    shared_tokens: int = 0
    """Tokens that all prompts begin with, besides their own."""
    load: Load = Load()
    given: tuple[list[Ask], ...] = ()
    """The variants of a file; the last one is for warming up."""

    def asks(self, variant: int, vocab_size: int) -> list[Ask]:
        """Returns the requests of a variant, numbered from 0, or of ``WARM_UP``."""
        if self.given:
            timed = len(self.given) - 1
            return self.given[WARM_UP if variant == WARM_UP else variant % timed]
        lengths = random.Random(f"{self.seed}/lengths")
        rng = random.Random(f"{self.seed}/{self.name}/{variant}")
        low, high = word_range(vocab_size)

        def prompt(count: int) -> list[int]:
            return [rng.randrange(low, high) for _ in range(count)]

        shared = prompt(self.shared_tokens)
        asks = []
        for _ in range(self.requests):
            size, output = (
                lengths.randint(*self.prompt_tokens),
                lengths.randint(*self.output_tokens),
            )
            asks.append(Ask(shared + prompt(size), output))
        return asks

    def warm_up(self, vocab_size: int) -> list[Ask]:
        """Returns the requests that are sent first and not measured."""
        return self.asks(WARM_UP, vocab_size)[:MAX_WARM_UP]

    def describe(self, model: str) -> dict[str, Any]:
        """Returns what two results must share to be comparable."""
        return {
            "name": self.name,
            "model": model,
            "requests": self.requests,
            "prompt_tokens": "{}:{}".format(*self.prompt_tokens),
            "shared_tokens": self.shared_tokens,
            "output_tokens": "{}:{}".format(*self.output_tokens),
            "load": str(self.load),
            "seed": self.seed,
        }


def word_range(vocab_size: int) -> tuple[int, int]:
    """Returns the ids to choose from: past the special tokens and bytes, before the rarest."""
    return (vocab_size // 8, vocab_size // 2) if vocab_size >= 4096 else (3, vocab_size)


def _preset(
    name: str, requests: int, prompt: tuple[int, int], output: tuple[int, int], **other: Any
) -> tuple[str, Workload]:
    return name, Workload(
        name=name, requests=requests, prompt_tokens=prompt, output_tokens=output, **other
    )


PRESETS: dict[str, Workload] = dict(
    (
        _preset("one-stream", 1, (128, 128), (128, 128)),
        _preset("together", 64, (64, 512), (32, 256)),
        _preset("long-prompt", 1, (4096, 4096), (16, 16)),
        _preset("shared-prefix", 64, (32, 32), (32, 32), shared_tokens=512),
        _preset("clients", 96, (128, 128), (64, 64), load=Load(clients=32)),
    )
)
"""The workloads that goals are stated for."""

NUMBERED = {
    "W1": "one-stream",
    "W5": "long-prompt",
    "W4": "shared-prefix",
    "W3": "clients",
    "W2": "together",
}
"""What files and comparisons call the presets, quick ones first. A file has tokens of its own for
them, and the preset says how they are sent."""


def read_file(path: Path) -> list[Workload]:
    """Reads ``{"seed": S, "variants": [{"W1": [{"ids": [...], "out": N}, ...], ...}, ...]}``.

    Raises:
        ValueError: it has fewer than two variants; the last is for warming up.
    """
    content = json.loads(path.read_text())
    variants = content["variants"]
    if len(variants) < 2:
        raise ValueError(f"{path} has {len(variants)} variants; one to measure and one to warm up")
    workloads = []
    for name in variants[0]:
        given = tuple(
            [Ask(request["ids"], request["out"]) for request in variant[name]]
            for variant in variants
        )
        prompts = [len(ask.prompt) for ask in given[0]]
        outputs = [ask.output_tokens for ask in given[0]]
        workloads.append(
            Workload(
                name=name,
                requests=len(given[0]),
                prompt_tokens=(min(prompts), max(prompts)),
                output_tokens=(min(outputs), max(outputs)),
                seed=content.get("seed", 0),
                load=PRESETS[NUMBERED[name]].load if name in NUMBERED else Load(),
                given=given,
            )
        )
    return workloads


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose workloads."""
    group = parser.add_argument_group("workload (a preset, a file, or lengths)")
    group.add_argument(
        "--preset",
        action="append",
        default=[],
        choices=[*PRESETS, "all"],
        help="a named workload; may be repeated",
    )
    group.add_argument(
        "--workload", type=Path, metavar="FILE", help="JSON with variants of W1 to W5"
    )
    group.add_argument(
        "--only", default="", metavar="NAMES", help="of a file: names with commas, such as W1,W2"
    )
    group.add_argument("--requests", type=int, metavar="N", help="how many requests")
    group.add_argument("--prompt-tokens", type=span, metavar="A:B", help="from A to B, both meant")
    group.add_argument("--output-tokens", type=span, metavar="A:B", help="from A to B, both meant")
    group.add_argument("--seed", type=int, default=1, metavar="S", help="of lengths and ids")
    load = group.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, metavar="C", help="closed-loop clients")
    load.add_argument("--rate", type=float, metavar="R", help="requests a second, Poisson")


def chosen(
    arguments: argparse.Namespace, refuse: Callable[[str], Any], *, needs_load: bool
) -> list[Workload]:
    """Returns what the flags choose.

    Args:
        arguments: parsed.
        refuse: called with what is wrong with them; does not return.
        needs_load: whether lengths alone are not enough.
    """
    load = Load(clients=arguments.concurrency, rate=arguments.rate)
    has_load = load != Load()
    lengths = (arguments.requests, arguments.prompt_tokens, arguments.output_tokens)
    if sum((bool(arguments.preset), arguments.workload is not None, any(lengths))) != 1:
        refuse("give one of --preset, --workload, and --requests with two lengths")
    if arguments.preset:
        if has_load:
            refuse("a preset says its own load; leave out --concurrency and --rate")
        names = PRESETS if "all" in arguments.preset else arguments.preset
        return [PRESETS[name] for name in names]
    if arguments.workload is not None:
        return _from_file(arguments, load if has_load else None, refuse)
    if not all(lengths):
        refuse("--requests, --prompt-tokens and --output-tokens go together")
    if needs_load and not has_load:
        refuse("give --concurrency or --rate")
    return [
        Workload(
            name="custom",
            requests=arguments.requests,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
            seed=arguments.seed,
            load=load,
        )
    ]


def _from_file(
    arguments: argparse.Namespace, load: Load | None, refuse: Callable[[str], Any]
) -> list[Workload]:
    workloads = read_file(arguments.workload)
    names: Iterable[str] = arguments.only.split(",") if arguments.only else ()
    known = {workload.name for workload in workloads}
    if unknown := set(names) - known:
        refuse(f"{arguments.workload} has no {', '.join(sorted(unknown))}; it has {sorted(known)}")
    kept = [workload for workload in workloads if not names or workload.name in names]
    if load is None:
        return kept
    return [Workload(**{**vars(workload), "load": load}) for workload in kept]


def span(text: str) -> tuple[int, int]:
    """Reads ``A:B``, or ``A`` for both.

    >>> span("64:512"), span("128")
    ((64, 512), (128, 128))
    """
    low, _, high = text.partition(":")
    if low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low):
        return int(low), int(high or low)
    raise argparse.ArgumentTypeError(f"{text!r} is no range; write for example 64:512, A at most B")
