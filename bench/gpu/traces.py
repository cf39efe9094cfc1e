"""Recorded traffic of real services: read, cut to a window, scaled to a context, made into tokens.

Two formats, told apart by the file's ending. Azure's tables (LLM inference traces 2023) have
arrival time, prompt and output tokens. Mooncake's lines (FAST 2025) have hashes of the prompt's
blocks of 512 tokens, too: equal hashes at equal places are equal prefixes, which the prefix cache
should find. Arrival times stay as they were.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from bench.workloads import Ask, word_range

BLOCK_TOKENS = 512
"""Prompt tokens that one hash stands for."""


@dataclass(frozen=True)
class Arrival:
    """One recorded request."""

    at_s: float
    """On the trace's own clock."""
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()
    """Of the prompt's blocks, the last of which may be cut short; empty when nothing is known."""


def read_trace(path: Path) -> list[Arrival]:
    """Reads all requests of a trace, in the order in which they came.

    Raises:
        ValueError: the file is of neither format, or holds no request.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"{path.name} ends neither in .csv nor in .jsonl")
    try:
        arrivals = sorted(readers[path.suffix](path), key=lambda arrival: arrival.at_s)
    except KeyError as error:
        raise ValueError(f"{path.name} has no {error}") from error
    if not arrivals:
        raise ValueError(f"{path.name} holds no request")
    return arrivals


def trace_files(folder: Path) -> list[Path]:
    """Returns the traces of a folder by name.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} holds neither .csv nor .jsonl")
    return files


def _read_csv(path: Path) -> list[Arrival]:
    with path.open(newline="") as file:
        return [
            Arrival(
                # Seven digits of a second, of which Python reads six.
                datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
            for row in csv.DictReader(file)
        ]


def _read_jsonl(path: Path) -> list[Arrival]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [
        Arrival(
            line["timestamp"] / 1e3,
            line["input_length"],
            line["output_length"],
            tuple(line["hash_ids"]),
        )
        for line in lines
    ]


def window(arrivals: Sequence[Arrival], seconds: float) -> list[Arrival]:
    """Returns the requests of some seconds from the middle one on, the first of them at 0.

    From the middle: a recording may begin while the service is still quiet.
    """
    later = arrivals[len(arrivals) // 2 :]
    begin_s = later[0].at_s
    return [
        replace(arrival, at_s=arrival.at_s - begin_s)
        for arrival in later
        if arrival.at_s < begin_s + seconds
    ]


def scale_to(arrivals: Sequence[Arrival], context_tokens: int) -> float:
    """Returns by what all lengths are multiplied, so that the longest request fits; at most 1.

    >>> scale_to([Arrival(0.0, 3000, 96), Arrival(0.1, 100, 10)], 1548)
    0.5
    """
    longest = max(arrival.prompt_tokens + arrival.output_tokens for arrival in arrivals)
    return min(1.0, context_tokens / longest)


def asks_of(arrivals: Sequence[Arrival], scale: float, vocab_size: int, seed: int) -> list[Ask]:
    """Makes requests of scaled lengths; blocks with one hash get the same tokens.

    Args:
        arrivals: of one trace.
        scale: of lengths and blocks; at most 1.
        vocab_size: ids are from its middle, see ``word_range``.
        seed: of the ids.
    """
    low, high = word_range(vocab_size)
    block = max(1, round(BLOCK_TOKENS * scale))
    unknown = random.Random(seed)

    def tokens(of: int, count: int) -> list[int]:
        return np.random.default_rng([seed, of]).integers(low, high, count).tolist()

    asks = []
    for arrival in arrivals:
        # Both together fit: neither is rounded up, but for an empty one.
        count = max(1, int(arrival.prompt_tokens * scale))
        if arrival.hashes:
            prompt = [token for each in arrival.hashes for token in tokens(each, block)][:count]
        else:
            prompt = tokens(unknown.getrandbits(62), count)
        asks.append(Ask(prompt, max(1, int(arrival.output_tokens * scale))))
    return asks


def write_examples(folder: Path) -> None:
    """Writes two tiny traces, one of each format, that nobody recorded."""
    rows = [f"2023-11-16 18:17:0{number}.0400000,{40 + number},{4 + number}" for number in range(4)]
    (folder / "example.csv").write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])
    )
    lines = [
        {"timestamp": 300 * n, "input_length": 1100, "output_length": 60, "hash_ids": [0, 1, 2 + n]}
        for n in range(6)
    ]
    (folder / "example.jsonl").write_text("\n".join(map(json.dumps, lines)))
