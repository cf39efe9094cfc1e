"""Structured output: are answers what their schemas say, and what does it cost?

    python -m bench.structured [--model smollm2] [--samples 100] [--rounds 5] [--out FILE]

Ten schemas, each sampled at temperature 1 with at most 512 tokens: what ends by itself has to be
valid under ``jsonschema``, what is cut is counted apart. Then 16 rows that obey a grammar take
turns with 16 that do not, at the same number of tokens. The exit status is 1 when an answer is
not valid or more than 2 % are cut. Speed is told, not gated: it is the machine's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema

from bench import common
from jaxserve import LLM
from jaxserve.engine.request import FinishReason

MOST_CUT = 0.02
MAX_TOKENS = 512
ROWS = 16
COST_TOKENS = 128

_NAME = {"type": "string", "minLength": 1, "maxLength": 24}
_WORDS = {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4}
_POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "number", "minimum": -90, "maximum": 90},
        "y": {"type": "integer", "minimum": -180, "maximum": 180},
    },
    "required": ["x", "y"],
    "additionalProperties": False,
}


def _object(required: Sequence[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "person": (
        "Describe a person.",
        _object(name=_NAME, age={"type": "integer", "minimum": 0, "maximum": 120}),
    ),
    "address": (
        "Where does she live?",
        _object(
            person=_object(name=_NAME, email={"type": "string", "pattern": "^[a-z]{1,9}@x\\.org$"}),
            address=_object(street=_NAME, zip={"type": "string", "pattern": "^\\d{5}$"}),
        ),
    ),
    "list": ("Name some fruits.", _object(fruits={**_WORDS, "minItems": 1})),
    "numbers": (
        "Give three measurements.",
        {
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
            "minItems": 3,
            "maxItems": 3,
        },
    ),
    "choice": (
        "How is the weather?",
        _object(sky={"enum": ["clear", "cloudy", "rain"]}, windy={"type": "boolean"}),
    ),
    "optional": (
        "Review a book.",
        _object(
            ["title", "stars"],
            title=_NAME,
            stars={"type": "integer", "minimum": 1, "maximum": 5},
            tags=_WORDS,
            quote={"type": ["string", "null"], "maxLength": 40},
        ),
    ),
    "route": (
        "Plan a walk.",
        _object(
            start=_POINT,
            stops={"type": "array", "items": _object(name=_NAME, at=_POINT), "maxItems": 3},
        ),
    ),
    "either": (
        "Pay by card or by transfer.",
        _object(
            amount={"type": "number", "minimum": 0, "maximum": 10000},
            by={
                "anyOf": [
                    _object(card={"type": "string", "pattern": "^\\d{4}$"}),
                    _object(iban={"type": "string", "pattern": "^DE\\d{8}$"}),
                ]
            },
        ),
    ),
    "tree": (
        "Describe a small menu.",
        {
            "$ref": "#/$defs/leaf2",
            "$defs": {
                "leaf0": _object(label={"type": "string", "maxLength": 10}),
                "leaf1": _object(
                    label={"type": "string", "maxLength": 10},
                    items={"type": "array", "items": {"$ref": "#/$defs/leaf0"}, "maxItems": 2},
                ),
                "leaf2": _object(
                    label={"type": "string", "maxLength": 10},
                    items={"type": "array", "items": {"$ref": "#/$defs/leaf1"}, "maxItems": 2},
                ),
            },
        },
    ),
    "event": (
        "Invite me to a meeting.",
        _object(
            title=_NAME,
            when={"type": "string", "format": "date"},
            who={"type": "array", "items": _object(name=_NAME), "minItems": 1, "maxItems": 3},
            where=_object(["room"], room=_NAME, floor={"type": "integer", "maximum": 9}),
        ),
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs both parts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="default smollm2")
    parser.add_argument("--samples", type=int, default=100, help="of each schema (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="of the cost (default 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines to this file")
    options = parser.parse_args(words)
    with LLM(options.model, progress=False, max_rows=32) as llm:
        lines = [sample(llm, name, options.samples) for name in SCHEMAS if options.samples]
        for line in lines:
            common.write(line, options.out)
        if options.rounds:
            common.write(cost(llm, options.rounds), options.out)
    invalid = sum(line["invalid"] for line in lines)
    cut = sum(line["cut"] for line in lines)
    total = sum(line["samples"] for line in lines)
    common.say(f"{total} answers: {invalid} not valid, {cut} cut at {MAX_TOKENS} tokens")
    return int(invalid > 0 or cut > MOST_CUT * total)


def sample(llm: LLM, name: str, samples: int) -> dict[str, Any]:
    """Samples one schema and checks every answer."""
    question, schema = SCHEMAS[name]
    checker = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    invalid, cut, tokens = 0, 0, []
    begun = time.perf_counter()
    for first in range(0, samples, 32):
        n = min(32, samples - first)
        messages = [{"role": "user", "content": f"{question} Answer in JSON."}]
        got = llm.chat(
            messages, n=n, seed=first, temperature=1.0, max_tokens=MAX_TOKENS, json_schema=schema
        )
        for choice in got.choices:
            tokens.append(len(choice.token_ids))
            if choice.finish.reason is not FinishReason.STOP:
                cut += 1
                continue
            try:
                checker.validate(json.loads(choice.text))
            except (ValueError, jsonschema.ValidationError) as error:
                invalid += 1
                common.say(f"{name}: {choice.text!r}: {str(error)[:200]}")
    return {
        "bench": "structured",
        "schema": name,
        "samples": samples,
        "invalid": invalid,
        "cut": cut,
        "tokens": {"median": statistics.median(tokens), "most": max(tokens)},
        "seconds": round(time.perf_counter() - begun, 1),
        "model": llm.info.name,
        "commit": common.commit(),
    }


def cost(llm: LLM, rounds: int) -> dict[str, Any]:
    """Tokens a second of rows that obey a grammar over those of rows that do not, in turns."""
    schema = {"type": "array", "items": SCHEMAS["event"][1], "minItems": 30}
    held: dict[str, Any] = {"json_schema": schema}
    prompts = [f"Write a long list, number {row}." for row in range(ROWS)]

    def rate(options: dict[str, Any]) -> float:
        begun = time.perf_counter()
        answers = llm.generate(
            prompts, temperature=1.0, seed=3, max_tokens=COST_TOKENS, ignore_eos=True, **options
        )
        seconds = time.perf_counter() - begun
        return sum(len(answer.token_ids) for answer in answers) / seconds

    rate(held)
    rate({})
    pairs = [(rate(held), rate({})) for _ in range(rounds)]
    ratios = [with_grammar / without for with_grammar, without in pairs]
    return {
        "bench": "structured-cost",
        "rows": ROWS,
        "tokens_per_s": {
            "grammar": round(statistics.median(pair[0] for pair in pairs), 1),
            "none": round(statistics.median(pair[1] for pair in pairs), 1),
        },
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
        "rounds": rounds,
        "model": llm.info.name,
        "commit": common.commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
