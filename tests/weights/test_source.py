"""Where a model comes from: what is refused early, and what random weights need."""

import json
from pathlib import Path

import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.presets import PRESETS, preset
from jaxserve.weights.source import ModelSource, RandomSource, open_source, read_model_config
from tests.weights.gguf_writing import FFN, HIDDEN, LAYERS, write_tiny_llama


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


def test_a_config_is_read_where_there_are_no_weights(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "a")
    for model in (folder, folder / "config.json", "dummy:tiny-llama"):
        config = read_model_config(str(model), assets_dir=tmp_path, offline=True)
        assert config == preset("tiny-llama")
    with pytest.raises(UnsupportedModelError, match="no built-in model 'nope'"):
        read_model_config("dummy:nope", assets_dir=tmp_path, offline=True)
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors and no \*.gguf"):
        read_model_config(str(tmp_path / "b"), assets_dir=tmp_path, offline=True)


def test_the_config_of_a_gguf_file_stands_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path)
    config = read_model_config(str(path), assets_dir=tmp_path, offline=True)
    assert (config.layers, config.embed, config.ffn) == (LAYERS, HIDDEN, FFN)


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
