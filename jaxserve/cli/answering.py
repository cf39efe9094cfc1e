"""What the commands that show an answer share: printing a stream as it comes, and timing it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jaxserve.frontend.client_types import Chunk, Finish, GenerateOptions


@dataclass(frozen=True)
class Answer:
    """One finished answer, timed by the reader's clock."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    ttft_s: float
    """From the call until the first token was here."""
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token; of everything when there was only one."""
        count, decode_s = len(self.token_ids), self.total_s - self.ttft_s
        if count > 1 and decode_s > 0:
            return (count - 1) / decode_s
        return count / self.total_s if self.total_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the keys that ``generate --json`` prints."""
        usage = self.finish.usage
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish.reason.value,
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "ttft_ms": round(self.ttft_s * 1e3, 3),
            "tokens_per_s": round(self.tokens_per_s, 3),
        }

    def timing(self) -> str:
        """Returns one line for people."""
        usage = self.finish.usage
        return (
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
            f"{usage.output_tokens} output tokens, "
            f"time to first token {self.ttft_s * 1e3:.0f} ms, {self.tokens_per_s:.1f} tokens/s"
        )


def read_answer(
    open_stream: Callable[[], Iterable[Chunk]],
    write: Callable[[str], object],
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """Opens a stream of one choice and reads it to its end, writing text as it comes."""
    start_s = clock()
    first_s: float | None = None
    texts: list[str] = []
    token_ids: list[int] = []
    finish: Finish | None = None
    for chunk in open_stream():
        if chunk.token_ids and first_s is None:
            first_s = clock()
        token_ids += chunk.token_ids
        finish = chunk.finish or finish
        if chunk.text:
            texts.append(chunk.text)
            write(chunk.text)
    end_s = clock()
    assert finish is not None, "a stream ends with a finish or an error"
    ttft_s = (end_s if first_s is None else first_s) - start_s
    return Answer("".join(texts), tuple(token_ids), finish, ttft_s, end_s - start_s)


def write_now(text: str) -> None:
    """Prints text as it comes."""
    print(text, end="", flush=True)


def add_sampling_flags(
    parser: argparse.ArgumentParser, *, max_tokens: int, **defaults: float
) -> None:
    """Adds how tokens are chosen; ranges are checked where the request is taken."""
    group = parser.add_argument_group("sampling")
    numbers: list[tuple[str, type, str, str]] = [
        ("max-tokens", int, "N", "new tokens at most"),
        ("temperature", float, "T", "0 always takes the likeliest token; higher is wilder"),
        ("top-p", float, "P", "only the likeliest tokens that together have this probability"),
        ("top-k", int, "K", "only the K likeliest tokens; 0 is off"),
        ("min-p", float, "P", "only tokens with this share of the likeliest one's probability"),
        (
            "seed",
            int,
            "S",
            "the same seed gives the same answer; chosen by the engine if not given",
        ),
    ]
    given: dict[str, float] = {"max_tokens": max_tokens, **defaults}
    for name, kind, metavar, text in numbers:
        default = given.get(name.replace("-", "_"))
        shown = "" if default is None else f" (default: {default:g})"
        # "sampling_" keeps the request's seed apart from the seed of random weights.
        group.add_argument(
            f"--{name}",
            dest=f"sampling_{name.replace('-', '_')}",
            type=kind,
            default=default,
            metavar=metavar,
            help=text + shown,
        )
    group.add_argument(
        "--stop",
        dest="sampling_stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )


def sampling_options(options: argparse.Namespace) -> GenerateOptions:
    """Returns what was parsed for the flags of ``add_sampling_flags``."""
    prefix = "sampling_"
    parsed = {
        name.removeprefix(prefix): value
        for name, value in vars(options).items()
        if name.startswith(prefix) and value is not None
    }
    return GenerateOptions(**parsed)  # pyright: ignore[reportArgumentType]
