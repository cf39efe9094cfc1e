"""GGUF files of mixtures: one tensor for all experts of a layer, read as each expert's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.registry import model_config
from jaxserve.weights.gguf import GgufCheckpoint
from jaxserve.weights.safetensors import SafetensorsCheckpoint
from tests.weights.gguf_writing import interleave, write_gguf

TINY = Path(__file__).parents[1] / "golden" / "tiny"
ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
EXPERT_NAMES = {
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")


def metadata(config: dict[str, Any], arch: str) -> dict[str, Any]:
    def key(name: str, default: int | None = None) -> Any:
        return config.get(name, default)

    values = {
        "block_count": key("num_hidden_layers"),
        "context_length": key("max_position_embeddings"),
        "embedding_length": key("hidden_size"),
        "feed_forward_length": key("intermediate_size"),
        "attention.head_count": key("num_attention_heads"),
        "attention.head_count_kv": key("num_key_value_heads"),
        "attention.key_length": key("head_dim", 16),
        "attention.layer_norm_rms_epsilon": key("rms_norm_eps"),
        "rope.freq_base": key("rope_theta"),
        "vocab_size": key("vocab_size"),
        "expert_count": key("num_experts", key("num_local_experts")),
        "expert_used_count": key("num_experts_per_tok"),
        "expert_feed_forward_length": key("moe_intermediate_size"),
        "expert_shared_feed_forward_length": key("shared_expert_intermediate_size"),
    }
    written = {f"{arch}.{name}": value for name, value in values.items() if value is not None}
    return written | {"tokenizer.ggml.eos_token_id": 2}


def converted(checkpoint: SafetensorsCheckpoint, arch: str) -> dict[str, np.ndarray]:
    """What llama.cpp's conversion makes of the tensors, in float32."""
    out: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name in checkpoint.names():
        values = checkpoint.read(name).astype(np.float32)
        if match := EXPERT.fullmatch(name):
            stack = experts.setdefault(f"blk.{match[1]}.{EXPERT_NAMES[match[3]]}.weight", {})
            stack[int(match[2])] = values
            continue
        stem, kind = name.rsplit(".", 1)
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = interleave(values, 4 if stem.endswith("q_proj") else 2)
        out[f"{layer}{NAMES[stem]}.{kind}"] = values.squeeze()
    return out | {
        name: np.stack([stack[number] for number in range(len(stack))])
        for name, stack in experts.items()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_a_mixture_is_the_checkpoint_that_it_was_made_of(name: str, tmp_path: Path):
    arch, published = ARCHITECTURES[name], SafetensorsCheckpoint(TINY / name)
    settings = metadata(published.config, arch)
    path = write_gguf(tmp_path / "m.gguf", arch, settings, converted(published, arch))
    checkpoint = GgufCheckpoint(path)
    assert model_config(checkpoint.config) == model_config(published.config)
    assert sorted(checkpoint.names()) == sorted(published.names())
    for tensor in published.names():
        expected = published.read(tensor).astype(np.float32)
        assert checkpoint.shape(tensor) == expected.shape
        np.testing.assert_array_equal(checkpoint.read(tensor), expected)


def one_stack(path: Path, values: np.ndarray, kind: Kind | None = None) -> GgufCheckpoint:
    settings = metadata(SafetensorsCheckpoint(TINY / "mixtral").config, "llama")
    tensors = {
        "token_embd.weight": np.ones((320, 64), np.float32),
        "blk.0.ffn_up_exps.weight": values,
    }
    types = {} if kind is None else {"blk.0.ffn_up_exps.weight": kind}
    return GgufCheckpoint(write_gguf(path, "llama", settings, tensors, types))


def test_an_experts_blocks_are_read_as_they_are(tmp_path: Path):
    numbers = np.random.default_rng(0).standard_normal((5, 96, 64)).astype(np.float32)
    blocks = quantize(numbers, Kind.Q8_0)
    checkpoint = one_stack(tmp_path / "m.gguf", blocks, Kind.Q8_0)
    name = "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    assert (checkpoint.shape(name), checkpoint.stored_format(name)) == ((96, 64), "int8")
    whole = gguf.quants.dequantize(blocks, Kind.Q8_0)
    box = (slice(10, 90), slice(32, 64))
    np.testing.assert_array_equal(checkpoint.read(name, box), whole[3][box])
    values = checkpoint.read_stored(name, "values", box).astype(np.float32)
    scale = checkpoint.read_stored(name, "scale", (slice(10, 90), slice(1, 2)))
    np.testing.assert_array_equal(values * scale.astype(np.float32), whole[3][box])


def test_a_stack_that_is_a_matrix_is_refused(tmp_path: Path):
    said = r"'blk.0.ffn_up_exps.weight' has shape \[96, 64\]; experts are stored as \[experts, out"
    with pytest.raises(CheckpointError, match=said):
        one_stack(tmp_path / "m.gguf", np.ones((96, 64), np.float32))


def test_experts_in_tensors_of_their_own_are_refused(tmp_path: Path):
    """As the first conversions of Mixtral had them, and as no reader of today writes them."""
    settings = metadata(SafetensorsCheckpoint(TINY / "mixtral").config, "llama")
    tensors = {"blk.0.ffn_up.3.weight": np.ones((96, 64), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", settings, tensors)
    with pytest.raises(UnsupportedModelError, match=r"'blk.0.ffn_up.3.weight', which the 'llama'"):
        GgufCheckpoint(path)
