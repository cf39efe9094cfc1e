from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.gguf import GgufCheckpoint
from jaxserve.weights.safetensors import SafetensorsCheckpoint
from tests.weights.gguf_writing import write_tiny_llama
from tests.weights.reexport import write_checkpoint

TENSORS = {"model.norm.weight": np.ones(4, np.float32)}


def test_formats_are_told_apart_by_content(tmp_path: Path) -> None:
    gguf = write_tiny_llama(tmp_path / "named.badly")[0]
    assert isinstance(open_checkpoint(gguf), GgufCheckpoint)
    directory = write_checkpoint(tmp_path / "hf", {}, TENSORS)
    assert isinstance(open_checkpoint(directory), SafetensorsCheckpoint)


def test_a_directory_with_one_gguf_is_that_gguf(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path).source.endswith("m.gguf")
    write_tiny_llama(tmp_path / "n.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(m.gguf, n.gguf\); give the"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "last.ckpt"])
def test_pickles_are_refused_and_never_opened(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for given in (path, tmp_path):
        with pytest.raises(
            UnsupportedModelError, match=r"can run code .* convert it to safetensor"
        ):
            open_checkpoint(given)


def test_safetensors_win_over_pickles_beside_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert open_checkpoint(tmp_path).names() == ["model.norm.weight"]


def test_what_is_no_checkpoint_is_refused_with_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none does not exist; give a .gguf file, a direct"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors and no \*.gguf"):
        open_checkpoint(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UnsupportedModelError, match=r"is neither a GGUF file nor a directory"):
        open_checkpoint(text)
    lone = write_checkpoint(tmp_path / "hf", {}, TENSORS) / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"is one safetensors file; give its directory"):
        open_checkpoint(lone)


def test_an_empty_gguf_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"m\.gguf is empty \(0 bytes\)"):
        open_checkpoint(tmp_path / "m.gguf")
