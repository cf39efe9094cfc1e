"""Which schemas of real functions become grammars, and how long does it take?

    pip download --no-deps bfcl-eval && unzip bfcl_eval-*.whl
    python -m bench.schemas bfcl_eval/data [--model smollm2] [--out FILE]

The parameters of every function in the JSON lines under a folder: the Berkeley collection calls
types by their names in Python, Java and JavaScript, so those of Python are first renamed to JSON
Schema's. Each schema that compiles is then walked along at random, 150 tokens at most. The exit
status is 1 when a walk ends in an error: what has been compiled has to stay within its limits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from bench import common
from jaxserve.assets import default_directory
from jaxserve.engine.constraint import mask_words
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grammar_compiler import CompiledGrammar, GrammarCompiler
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.hub import resolve_model

WALK_TOKENS = 150
PYTHON_NAMES = {
    "dict": "object",
    "tuple": "array",
    "list": "array",
    "float": "number",
    "int": "integer",
    "bool": "boolean",
    "Boolean": "boolean",
    "str": "string",
    "String": "string",
    "any": None,
}
"""None: every type is meant, which a schema says by naming none."""


def schemas_in(folder: Path) -> dict[str, str]:
    """Every schema once, as text, and the file that has it first."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.json")):
        for function in _functions(path):
            text = json.dumps(_renamed(function["parameters"]), sort_keys=True)
            found.setdefault(text, path.name)
    return found


def _functions(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # A file that is one object over many lines holds no functions.
        if not isinstance(entry, dict):
            continue
        listed = entry.get("function", [entry])
        for function in listed if isinstance(listed, list) else [listed]:
            if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
                yield function


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {
        name: PYTHON_NAMES.get(each, each)
        if name == "type" and isinstance(each, str)
        else _renamed(each)
        for name, each in value.items()
    }
    return made if made.get("type", "") is not None else {**made, "type": _ANY}


_ANY = ["object", "array", "string", "number", "boolean", "null"]


def walk(compiled: CompiledGrammar, words: np.ndarray, seed: int) -> tuple[list[float], str]:
    """Follows a grammar at random; returns the seconds of each mask, and what went wrong."""
    rng = np.random.default_rng(seed)
    matcher = compiled.matcher()
    seconds: list[float] = []
    for _ in range(WALK_TOKENS):
        began = time.perf_counter()
        matcher.fill(words)
        seconds.append(time.perf_counter() - began)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if matcher.error or not matcher.accept(int(rng.choice(allowed))) or matcher.complete:
            break
    return seconds, matcher.error


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.schemas", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the line to this file")
    options = parser.parse_args()
    path = resolve_model(options.model, assets_dir=default_directory(os.environ))
    checkpoint: Any = open_checkpoint(path)
    with closing(checkpoint):
        tokenizer = load_tokenizer(checkpoint.tokenizer_files())
    vocab_size = tokenizer.fast.get_vocab_size()
    words = np.zeros(mask_words(vocab_size), np.int32)
    refused: Counter[str] = Counter()
    failed: list[str] = []
    kept: list[CompiledGrammar] = []
    compiling: list[float] = []
    masks: list[float] = []
    schemas = schemas_in(options.folder)
    with closing(GrammarCompiler(tokenizer, vocab_size=vocab_size)) as compiler:
        compiler.compile(Grammar("regex", "a"))  # Reads the tokenizer.
        before = _resident_bytes()
        for number, text in enumerate(schemas):
            began = time.perf_counter()
            try:
                compiled = compiler.compile(Grammar("json_schema", text, "schema"))
            except InvalidRequestError as error:
                refused[str(error).removeprefix("schema cannot be used: ").partition(";")[0]] += 1
                continue
            compiling.append(time.perf_counter() - began)
            kept.append(compiled)
            seconds, error = walk(compiled, words, number)
            masks += seconds
            if error:
                failed.append(error)
        grown = _resident_bytes() - before
    made = {
        "bench": "schemas",
        "schemas": len(schemas),
        "compiled": len(compiling),
        "refused": dict(refused.most_common()),
        "walks_failed": failed,
        "compile_ms": _spread(compiling, 1e3),
        "masks": len(masks),
        "mask_us": _spread(masks, 1e6),
        "kib_each": round(grown / len(kept) / 1024, 1),
        "model": options.model,
        "commit": common.commit(),
    }
    common.write(made, options.out)
    return int(bool(failed))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _spread(seconds: list[float], scale: float) -> dict[str, float]:
    shares = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: round(common.quantile(seconds, at) * scale, 2) for name, at in shares.items()}


if __name__ == "__main__":
    sys.exit(main())
