from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.weights.gguf_config import config_from_metadata, llama3_rope_factors
from tests.weights.gguf_writing import common

PATH = str(Path("m.gguf"))


def config(
    arch: str,
    extra: dict[str, Any] | None = None,
    tensors: tuple[str, ...] = (),
    values: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Translates the common metadata with some of it replaced; None removes a key."""
    metadata = {"general.architecture": arch} | common(arch) | (extra or {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return config_from_metadata(PATH, metadata, frozenset(tensors), (values or {}).get)


def test_llama_gets_every_common_key() -> None:
    found = config("llama", {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2})
    assert found == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "vocab_size": 48,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_an_output_tensor_means_untied_embeddings() -> None:
    assert config("llama", tensors=("output.weight",))["tie_word_embeddings"] is False


def test_biases_are_found_by_their_tensors() -> None:
    found = config("llama", tensors=("blk.0.attn_q.bias", "blk.0.ffn_gate.bias"))
    assert (found["attention_bias"], found["mlp_bias"]) == (True, True)


def test_a_llama_with_a_sliding_window_is_a_mistral() -> None:
    found = config("llama", {"llama.attention.sliding_window": 64})
    assert found["model_type"] == "mistral"
    assert found["architectures"] == ["MistralForCausalLM"]
    assert found["sliding_window"] == 64


def test_the_head_size_may_differ_from_width_over_heads() -> None:
    assert config("qwen3", {"qwen3.attention.key_length": 16})["head_dim"] == 16


def test_a_float32_epsilon_becomes_the_number_that_was_meant() -> None:
    extra = {"llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06}
    assert config("llama", extra)["rms_norm_eps"] == 1e-5


def test_missing_kv_heads_means_one_per_query_head() -> None:
    assert config("llama", {"llama.attention.head_count_kv": None})["num_key_value_heads"] == 4


def test_the_vocabulary_size_falls_back_to_the_tokens() -> None:
    extra = {"llama.vocab_size": None, "tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert config("llama", extra)["vocab_size"] == 3


def test_qwen2_has_biases_and_no_window() -> None:
    found = config("qwen2")
    assert (found["attention_bias"], found["use_sliding_window"]) == (True, False)


def test_gemma3_gets_the_facts_that_its_metadata_lacks() -> None:
    extra = {"gemma3.block_count": 7, "gemma3.attention.sliding_window": 16}
    found = config("gemma3", extra | {"gemma3.attention.key_length": 16})
    assert found["layer_types"] == ["sliding_attention"] * 5 + [
        "full_attention",
        "sliding_attention",
    ]
    assert found["rope_local_base_freq"] == 10_000.0
    assert found["query_pre_attn_scalar"] == 16
    assert found["hidden_activation"] == "gelu_pytorch_tanh"
    assert found["sliding_window"] == 16


def test_the_largest_gemma3_scales_attention_by_its_width_per_head() -> None:
    extra = {
        "gemma3.block_count": 62,
        "gemma3.attention.sliding_window": 16,
        "gemma3.attention.key_length": 16,
    }
    assert config("gemma3", extra)["query_pre_attn_scalar"] == 32 // 4


def test_gemma3_with_soft_caps_is_refused() -> None:
    extra = {
        "gemma3.attention.sliding_window": 16,
        "gemma3.final_logit_softcapping": 30.0,
    }
    with pytest.raises(
        UnsupportedModelError, match=r"gemma3.final_logit_softcapping, which is not"
    ):
        config("gemma3", extra)


def test_phi3_gets_its_window_and_long_rope() -> None:
    extra = {
        "phi3.attention.sliding_window": 20,
        "phi3.rope.dimension_count": 6,
        "phi3.rope.scaling.original_context_length": 32,
    }
    factors = {
        "rope_factors_short.weight": np.array([1, 1.5, 2], np.float32),
        "rope_factors_long.weight": np.array([4, 5, 6], np.float32),
    }
    found = config("phi3", extra, tuple(factors), factors)
    assert found["sliding_window"] == 20
    assert found["partial_rotary_factor"] == 0.75
    assert found["original_max_position_embeddings"] == 32
    assert found["rope_scaling"]["rope_type"] == "longrope"
    assert found["rope_scaling"]["short_factor"] == [1, 1.5, 2]
    assert found["rope_scaling"]["long_factor"] == [4, 5, 6]


def test_half_of_phi3s_rope_factors_is_a_damaged_file() -> None:
    factors = {"rope_factors_long.weight": np.ones(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"has only one of rope_factors_short.weight and"):
        config("phi3", values=factors)


def llama31_factors(theta: float = 500_000.0, head_dim: int = 128) -> np.ndarray:
    """The rule of Llama 3.1, written as a loop over frequencies as its authors did."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * pair / head_dim)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_tensor() -> None:
    extra = {"llama.rope.freq_base": 500_000.0, "llama.attention.key_length": 128}
    found = config("llama", extra, values={"rope_freqs.weight": llama31_factors()})
    assert found["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rule = llama3_rope_factors(found["rope_scaling"], 500_000.0, 128)
    np.testing.assert_allclose(rule, llama31_factors(), rtol=1e-6)


@pytest.mark.parametrize("factors", [np.full(64, 2, np.float32), np.ones(3, np.float32)])
def test_rope_factors_of_another_rule_are_refused(factors: np.ndarray) -> None:
    extra = {"llama.rope.freq_base": 500_000.0, "llama.attention.key_length": 128}
    with pytest.raises(UnsupportedModelError, match=r"that are not Llama 3's rule with"):
        config("llama", extra, values={"rope_freqs.weight": factors})


def test_linear_rope_scaling_keeps_its_factor() -> None:
    extra = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    assert config("llama", extra)["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    ("arch", "extra", "error", "text"),
    [
        ("mamba", {}, UnsupportedModelError, r"'mamba'; supported in GGUF are gemma3, llama, phi3"),
        ("llama", {"general.architecture": None}, CheckpointError, r"no general.architecture"),
        (
            "qwen2",
            {"qwen2.expert_count": 8},
            UnsupportedModelError,
            r"expert_count = 8\), which is implemented for llama, qwen2moe, qwen3moe only",
        ),
        ("llama", {"llama.expert_count": 8}, CheckpointError, r"lacks .*'llama.expert_used_count'"),
        ("llama", {"llama.block_count": None}, CheckpointError, r"lacks the metadata 'llama.block"),
        ("llama", {"llama.block_count": 0}, CheckpointError, r"positive integer, got 0"),
        ("llama", {"llama.block_count": "x"}, CheckpointError, r"positive integer, got 'x'"),
        ("llama", {"llama.block_count": True}, CheckpointError, r"positive integer, got True"),
        (
            "llama",
            {"llama.rope.freq_base": float("nan")},
            CheckpointError,
            r"llama.rope.freq_base is nan",
        ),
        (
            "llama",
            {"llama.attention.head_count_kv": [1, 2]},
            UnsupportedModelError,
            r"llama.attention.head_count_kv differs from layer to layer",
        ),
        (
            "llama",
            {"llama.rope.dimension_count": 4},
            UnsupportedModelError,
            r"rotates 4 of 8 values per head",
        ),
        (
            "llama",
            {"llama.rope.scaling.type": "odd"},
            UnsupportedModelError,
            r"has rope scaling 'odd'; supported are linear",
        ),
    ],
)
def test_metadata_that_cannot_be_served_is_named(
    arch: str, extra: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        config(arch, extra)


def test_equal_values_for_every_layer_count_as_one() -> None:
    found = config("llama", {"llama.feed_forward_length": [64, 64]})
    assert found["intermediate_size"] == 64
