"""Where a model comes from: what is refused early, and what random weights need."""

import json
from functools import partial
from pathlib import Path

import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.presets import PRESETS, preset
from jaxserve.weights.source import ModelSource, RandomSource, open_source, read_model_facts
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
    read = partial(read_model_facts, assets_dir=tmp_path, offline=True)
    folder = config_only(tmp_path / "a")
    for model in (folder, folder / "config.json", "dummy:tiny-llama"):
        for quantization in ("auto", "none"):
            config, formats = read(str(model), quantization)
            assert (config, formats) == (preset("tiny-llama"), {})
        with pytest.raises(CheckpointError, match="cannot be held as int8: the last axis of w_o"):
            read(str(model), "int8")
    config, formats = read("dummy:smollm2-135m", "int4")
    assert formats == {
        **dict.fromkeys(("w_qkv", "w_o", "w_gate_up", "w_down"), "int4"),
        "embed": "int8",
    }
    with pytest.raises(UnsupportedModelError, match="no built-in model 'nope'"):
        read("dummy:nope", "none")
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors and no \*.gguf"):
        read(str(tmp_path / "b"), "none")


def test_the_config_of_a_gguf_file_stands_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path)
    config, formats = read_model_facts(str(path), "auto", assets_dir=tmp_path, offline=True)
    assert formats == {}
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
