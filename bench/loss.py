"""Measures what each precision costs on real text: the loss of the same tokens, setting by setting.

    python -m bench.loss --model smollm2 [--settings float32,auto,int8] [--out FILE] TEXT ...

The texts are cut into windows of ``--window`` tokens, each scored by itself through the engine that
serves (``prompt_logprobs``), so that pages, chunks and kernels are those of service. Losses are in
nats a token, over every token of a window but its first; what is said beside a loss is its
difference from the first setting's, with the standard error of that difference over windows.
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
from pathlib import Path
from typing import Any

from bench import common, machine
from jaxserve.llm import LLM

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "quantization": "none"},
    "auto": {},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8-pages": {"dtype": "bfloat16", "quantization": "none", "kv_dtype": "int8"},
}
"""What ``--settings`` selects, by name: flags of a launch. The first is what others differ from."""
WINDOW_TOKENS = 1024
MIN_BYTES = 100_000
"""Less text than this says little about a precision."""


@dataclass(frozen=True)
class Loss:
    """Of one setting."""

    setting: str
    window_nats: list[float]
    """Each window's mean over its tokens."""
    seconds: float

    @property
    def nats(self) -> float:
        """Of a token; windows are equally long."""
        return statistics.fmean(self.window_nats)

    def line(self, base: Loss, text_bytes: int, tokens: int) -> dict[str, Any]:
        """Returns it as a JSON object, beside the setting that it is compared with."""
        pairs = zip(self.window_nats, base.window_nats, strict=True)
        more = [ours - theirs for ours, theirs in pairs]
        error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan
        return {
            "setting": self.setting,
            "nats_per_token": round(self.nats, 5),
            "perplexity": round(math.exp(self.nats), 4),
            "more_nats": round(self.nats - base.nats, 5),
            "more_nats_error": round(error, 5),
            "perplexity_ratio": round(math.exp(self.nats - base.nats), 5),
            "text_bytes": text_bytes,
            "scored_tokens": tokens,
            "seconds": round(self.seconds, 1),
        }


def main(words: Sequence[str] | None = None) -> None:
    """Scores the texts under every setting."""
    arguments = _parser().parse_args(words)
    text = "\n".join(_read(path) for path in arguments.texts)
    if len(text.encode()) < MIN_BYTES:
        raise SystemExit(f"{len(text.encode())} bytes of text are given; give {MIN_BYTES} or more")
    facts = {"commit": common.commit(), "machine": machine.cpu_info("model name")}
    base: Loss | None = None
    for setting in arguments.settings.split(","):
        loss, tokens = _score(arguments.model, setting, text, arguments.window)
        base = base or loss
        line = loss.line(base, len(text.encode()), tokens) | {"model": arguments.model} | facts
        common.write(line, arguments.out)


def _score(model: str, setting: str, text: str, window: int) -> tuple[Loss, int]:
    """Scores whole windows only, so that all weigh the same."""
    start_s = time.perf_counter()
    options = SETTINGS[setting] | {"ready_with": "all"}
    with LLM(model, context_tokens=window + 1, progress=False, **options) as llm:
        ids = llm.tokenizer.encode(text, add_special_tokens=False)
        windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
        nats = list[float]()
        for number, tokens in enumerate(windows):
            nats.append(-llm.score(token_ids=tokens).total_logprob / (window - 1))
            sys.stderr.write(f"\r{setting}: {number + 1} of {len(windows)} windows")
    sys.stderr.write("\n")
    return Loss(setting, nats, time.perf_counter() - start_s), len(windows) * (window - 1)


def _read(path: Path) -> str:
    """Returns a text file, or the ``text`` of a chapter in JSON."""
    content = path.read_text()
    return json.loads(content)["text"] if path.suffix == ".json" else content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loss", description="Loss on real text, precision by precision."
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="text or JSON files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: %(default)s")
    parser.add_argument("--window", type=int, default=WINDOW_TOKENS, help="tokens scored together")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    return parser


if __name__ == "__main__":
    main()
