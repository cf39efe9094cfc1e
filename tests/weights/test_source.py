"""Where a model comes from: what is refused early, and what random weights need."""

import json
from pathlib import Path

import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.presets import PRESETS, preset
from jaxserve.weights.source import ModelSource, RandomSource, open_source


def config_only(path: Path, **changes: object) -> Path:
    path.mkdir()
    config = {**PRESETS["tiny-llama"], **changes}
    (path / "config.json").write_text(json.dumps(config))
    return path


def opened(path: Path, *, random_weights: bool = False) -> ModelSource:
    return open_source(
        str(path), assets_dir=path, offline=True, random_weights=random_weights, seed=3
    )


def test_an_unsupported_architecture_is_refused_before_weights_are_looked_for(
    tmp_path: Path,
) -> None:
    path = config_only(tmp_path / "a", architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(UnsupportedModelError, match="'MambaForCausalLM'"):
        opened(path)
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        opened(config_only(tmp_path / "b"))


def test_random_weights_need_no_more_than_a_config(tmp_path: Path) -> None:
    path = config_only(tmp_path / "a")
    source = opened(path, random_weights=True)
    assert isinstance(source, RandomSource)
    assert source.name == str(path)
    assert source.model_config() == preset("tiny-llama")
    assert source.tokenizer() is None
    (path / "tokenizer.json").write_text("{}")
    tokenizer = opened(path, random_weights=True).tokenizer()
    assert tokenizer is not None
    assert tokenizer.files["tokenizer.json"] == b"{}"
