from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from tests.weights.gguf_writing import write_tiny_llama
from tests.weights.reexport import Family, reexport, tokenizer_files

PREFIX = "model.layers.1."


@pytest.fixture
def smollm2(assets: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(assets("smollm2"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_a_tiny_llama_is_written_as_another_family(family: Family, tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf")[0])
    written = open_checkpoint(reexport(source, tmp_path / "hf", family))
    assert written.config["model_type"] == family
    fused = family == "phi3"
    assert (PREFIX + "self_attn.qkv_proj.weight" in written.names()) == fused
    assert (PREFIX + "self_attn.q_proj.bias" in written.names()) == (family == "qwen2")
    assert load_tokenizer(written.tokenizer_files()).eos_ids == {0}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_smollm2_is_written_as_another_family_with_equal_weights(
    family: Family, smollm2: Checkpoint, tmp_path: Path
) -> None:
    written = open_checkpoint(reexport(smollm2, tmp_path, family, layers=2, shards=2))
    assert written.config["model_type"] == family
    assert written.config["num_hidden_layers"] == 2

    def same(name: str, other: np.ndarray) -> None:
        np.testing.assert_array_equal(other, smollm2.read(name))

    for name in ("model.embed_tokens.weight", PREFIX + "mlp.down_proj.weight"):
        same(name, written.read(name))
    queries = PREFIX + "self_attn.q_proj.weight"
    if family == "phi3":
        fused = written.read(PREFIX + "self_attn.qkv_proj.weight")
        assert fused.shape == (576 + 192 + 192, 576)
        same(queries, fused[:576])
        same(PREFIX + "self_attn.v_proj.weight", fused[-192:])
        gate_up = written.read(PREFIX + "mlp.gate_up_proj.weight")
        same(PREFIX + "mlp.up_proj.weight", gate_up[1536:])
        assert queries not in written.names()
    else:
        same(queries, written.read(queries))
    if family == "qwen2":
        assert not written.read(PREFIX + "self_attn.k_proj.bias").any()
    if family == "mistral":
        assert written.config["sliding_window"] == 8192


def test_the_written_tokenizer_is_the_same_tokenizer(smollm2: Checkpoint) -> None:
    files = {name: text.encode() for name, text in tokenizer_files(smollm2).items()}
    first = load_tokenizer(smollm2.tokenizer_files())
    second = load_tokenizer(TokenizerSource(source="hf", files=files))
    assert second.eos_ids == first.eos_ids == {0, 2}
    assert second.bos_id == first.bos_id
    assert second.chat_template == first.chat_template
    text = "x = 2.85\n\n  # ½ été 日本 <|im_end|>"
    ids = first.encode(text, add_special_tokens=True)
    assert second.encode(text, add_special_tokens=True) == ids
    assert second.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
