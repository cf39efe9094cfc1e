"""Measures what pages of fewer bits change: likeliest tokens, perplexity and greedy answers.

    python -m bench.kv_pages [--model smollm2] [--formats bf16,int8,fp8,int4] [--out FILE] TEXT ...

Prompts are pieces of the texts, one behind the other; without texts, of the pinned English ones in
turn. Each is scored by itself through the engine that serves, token after token of the text as it
stands (teacher-forced), so that pages, chunks and kernels are those of service; everything is
compared with pages of the first format, which is bf16 where int8 is asked for. Weights are floats
unless flags say otherwise: products that round activations to int8 turn any difference into one of
their own size. Then each prompt is answered greedily. The exit status is 1 when int8 misses its
gate: the same likeliest token at ``LEAST_SAME`` of the places, and a perplexity within
``MOST_PERPLEXITY``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from bench import common, machine
from jaxserve.assets import default_directory
from jaxserve.engine.request import SamplingParams
from jaxserve.llm import LLM

TEXTS = ("moby-dick/chapter_1.json", "moby-dick/chapter_10.json", "shakespeare.txt", "GPL-3.txt")
"""Below ``assets``'s ``texts``."""
LEAST_SAME = 0.98
MOST_PERPLEXITY = 0.005
GATED = "int8"
BASE = "bf16"
"""What it is gated against."""


@dataclass(frozen=True)
class Scored:
    """What one format made of every prompt."""

    format: str
    likeliest: list[int]
    """At every place of every prompt after its first."""
    prompt_nats: list[float]
    """Of each prompt, the sum over these places."""
    answers: list[list[int]]
    seconds: float

    def line(self, base: Scored, places: int) -> dict[str, Any]:
        """Returns it as a JSON object, beside the format that it is compared with."""
        pairs = zip(self.likeliest, base.likeliest, strict=True)
        same = [ours == theirs for ours, theirs in pairs]
        each = zip(self.prompt_nats, base.prompt_nats, strict=True)
        more = [(ours - theirs) * len(base.prompt_nats) / places for ours, theirs in each]
        error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan
        ratio = math.exp(statistics.fmean(more))
        answers = list(zip(self.answers, base.answers, strict=True))
        line = {
            "format": self.format,
            "compared_with": base.format,
            "same_likeliest": round(statistics.fmean(same), 5),
            "perplexity": round(math.exp(sum(self.prompt_nats) / places), 4),
            "perplexity_ratio": round(ratio, 5),
            "perplexity_ratio_error": round(error, 5),
            "prompts": len(self.prompt_nats),
            "places": places,
            "seconds": round(self.seconds, 1),
        }
        if answers:
            line["answer_tokens"] = len(base.answers[0])
            line["same_answers"] = round(statistics.fmean(a == b for a, b in answers), 4)
            line["answers_alike_until"] = round(statistics.fmean(map(_begin_alike, answers)), 4)
        return line


def main(words: Sequence[str] | None = None) -> int:
    """Scores and answers with every format; returns the exit status."""
    arguments = _parse(words)
    directory = default_directory({}) / "texts"
    texts = [_read(path) for path in arguments.texts or [directory / name for name in TEXTS]]
    facts = {"commit": common.commit(), "machine": machine.cpu_info("model name")}
    base, status = None, 0
    for name in arguments.formats.split(","):
        scored = _measure(name, texts, arguments)
        base = base or scored
        places = len(scored.likeliest)
        line = scored.line(base, places)
        if name == GATED and scored is not base:
            line["gate"] = "passed" if _passes(line) else "missed"
            status = int(line["gate"] == "missed")
        line |= {"model": arguments.model, "prompt_tokens": arguments.tokens}
        line |= {"dtype": arguments.dtype, "quantization": arguments.quantization} | facts
        common.write(line, arguments.out)
    return status


def _passes(line: dict[str, Any]) -> bool:
    is_same = line["same_likeliest"] >= LEAST_SAME
    return is_same and abs(line["perplexity_ratio"] - 1) <= MOST_PERPLEXITY


def _begin_alike(pair: tuple[list[int], list[int]]) -> float:
    """The share of an answer before the first token in which two differ."""
    ours, theirs = pair
    alike = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if alike is None:
        alike = min(len(ours), len(theirs))
    return alike / max(len(ours), len(theirs), 1)


def _measure(name: str, texts: Sequence[str], arguments: argparse.Namespace) -> Scored:
    start_s = time.perf_counter()
    size, answer = arguments.tokens, arguments.answer_tokens
    likeliest, nats = list[int](), list[float]()
    options = {"kv_dtype": name, "context_tokens": size + answer + 1}
    options |= {"dtype": arguments.dtype, "quantization": arguments.quantization}
    with LLM(arguments.model, progress=False, **options) as llm:
        prompts = _prompts(llm, texts, size, arguments.prompts)
        for number, prompt in enumerate(prompts):
            score = llm.score(token_ids=prompt, top_logprobs=1)
            likeliest += [place.top[0].token_id for place in score.tokens[1:]]
            nats.append(-score.total_logprob)
            sys.stderr.write(f"\r{name}: {number + 1} of {len(prompts)} prompts")
        answers = list[list[int]]()
        if answer:
            sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
            answers = [list(out.choices[0].token_ids) for out in llm.generate(prompts, sampling)]
    sys.stderr.write("\n")
    return Scored(name, likeliest, nats, answers, time.perf_counter() - start_s)


def _prompts(llm: LLM, texts: Sequence[str], size: int, count: int) -> list[list[int]]:
    """Whole pieces only, a text at a time in turn."""
    cut = []
    for text in texts:
        ids = llm.tokenizer.encode(text, add_special_tokens=False)
        cut.append([ids[i : i + size] for i in range(0, len(ids) - size + 1, size)])
    found = [piece for piece in chain(*zip_longest(*cut)) if piece is not None]
    if len(found) < count:
        raise SystemExit(f"the texts make {len(found)} prompts of {size} tokens; give more text")
    return found[:count]


def _read(path: Path) -> str:
    """Returns a text file, or the ``text`` of a chapter in JSON."""
    content = path.read_text()
    return json.loads(content)["text"] if path.suffix == ".json" else content


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(words)
    formats = arguments.formats.split(",")
    if GATED in formats and formats[0] != BASE:
        # Against itself or other rounded pages it would miss nothing.
        parser.error(
            f"--formats is {arguments.formats}: {GATED} is gated against {BASE}, which comes "
            f"first; give --formats {','.join([BASE, *(f for f in formats if f != BASE)])}"
        )
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_pages", description="What pages of fewer bits change."
    )
    parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT", help="text or JSON files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", help="of weights (default: %(default)s)")
    parser.add_argument("--quantization", default="none", help="likewise (default: %(default)s)")
    parser.add_argument("--formats", default="bf16,int8,fp8,int4", help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=200, help="how many")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt")
    parser.add_argument("--answer-tokens", type=int, default=64, help="of a greedy answer; 0: none")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
