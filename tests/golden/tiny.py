"""Makes tiny random checkpoints, one for each architecture, and records what they answer.

Each is an ordinary checkpoint directory. `config.json` is in the form that published checkpoints
have; `config_v5.json` is the same in the form that transformers 5 writes. Weights are drawn from
numpy generators seeded by name, rounded to the stored dtype, and computed with in float32.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from oracle import continue_greedily, plain_logits
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

GREEDY_TOKENS = 48
# Prompt length and the number of its last positions whose logits are kept.
PROMPTS = ((5, 5), (40, 40), (100, 16))
# Chosen so that no greedy step comes near a tie and no continuation falls into a short loop.
SEEDS = {
    "llama": 8,
    "llama2": 10,
    "mistral": 6,
    "qwen2": 11,
    "qwen3": 21,
    "phi3": 7,
    "gemma3": 40,
    "mixtral": 2,
    "qwen2_moe": 8,
    "qwen3_moe": 4,
}

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama2": BASE
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "mistral": BASE
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "tie_word_embeddings": False,
    },
    "qwen2": BASE
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 4,
    },
    "qwen3": BASE
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "intermediate_size": 80,
        "head_dim": 32,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
    },
    "phi3": BASE
    | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_hidden_layers": 3,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 512,
        "rope_scaling": None,
        "sliding_window": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "gemma3": {key: value for key, value in BASE.items() if key != "hidden_act"}
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 40,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 16,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "mixtral": BASE
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 3,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": BASE
    | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_hidden_layers": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 4,
    },
    "qwen3_moe": BASE
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "moe_intermediate_size": 48,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
        "tie_word_embeddings": False,
    },
}


def _generator(name: str, label: str) -> np.random.Generator:
    return np.random.default_rng([SEEDS[name], zlib.crc32(f"{name} {label}".encode())])


def _draw(name: str, parameter: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random values that matter: no norm is near one, no bias near zero, no logits are flat."""
    normal = _generator(name, parameter).standard_normal(shape)
    if "norm" in parameter:
        # Gemma's norms multiply by one plus the weight. Large Q and K norms sharpen attention,
        # without which the context would hardly matter.
        center = (0.0 if name == "gemma3" else 1.0) + (0.8 if "self_attn" in parameter else 0.0)
        return torch.from_numpy(center + 0.3 * normal)
    if parameter.endswith(".bias"):
        return torch.from_numpy(0.5 * normal)
    if "embed_tokens" in parameter or "lm_head" in parameter:
        # Gemma multiplies embeddings by 8 (the root of the width); were they not small, its tied
        # head would only repeat the last token.
        return torch.from_numpy((0.1 if name == "gemma3" else 0.2) * normal)
    if parameter.endswith("mlp.gate.weight"):
        # A router whose choices are spread, and seldom close.
        return torch.from_numpy(0.3 * normal)
    if "expert" in parameter:
        # Weighed by less than one, they would hardly matter beside the embedding.
        return torch.from_numpy(0.3 * normal)
    return torch.from_numpy(0.16 * normal)


def _as_published(name: str, parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter under the names that checkpoints have: each expert has tensors of its own."""
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if name == "mixtral":
        parameter = parameter.replace(".mlp.", ".block_sparse_moe.")
        gate, up, down = "w1", "w3", "w2"
    prefix, found, kind = parameter.partition(".experts.")
    if not found:
        return {parameter: value}
    stored: dict[str, torch.Tensor] = {}
    for number, expert in enumerate(value):
        names, matrices = ((down,), (expert,))
        if kind == "gate_up_proj":
            names, matrices = (gate, up), expert.chunk(2)
        for part, matrix in zip(names, matrices, strict=True):
            stored[f"{prefix}.experts.{number}.{part}.weight"] = matrix.clone()
    return stored


def make_weights(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every stored parameter, in the dtype that the config names."""
    tied = CONFIGS[name]["tie_word_embeddings"]
    dtype = getattr(torch, CONFIGS[name]["torch_dtype"])
    weights: dict[str, torch.Tensor] = {}
    for parameter, value in model.state_dict().items():
        if tied and parameter == "lm_head.weight":
            continue
        drawn = _draw(name, parameter, tuple(value.shape)).to(dtype)
        weights |= _as_published(name, parameter, drawn)
    return weights


def load(directory: Path) -> PreTrainedModel:
    """The checkpoint as anybody would load it, in float32 with eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def write_checkpoint(name: str, directory: Path) -> PreTrainedModel:
    """Writes config and weights, and loads them back."""
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "config.json"
    config_file.write_text(json.dumps(CONFIGS[name], indent=2, sort_keys=True) + "\n", "utf-8")
    config = AutoConfig.from_pretrained(directory)
    weights = make_weights(name, AutoModelForCausalLM.from_config(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return load(directory)


def check_v5_config(model: PreTrainedModel, directory: Path) -> None:
    """Writes the config's other form, and insists that it describes the same model."""
    settings = model.config.to_diff_dict() | {"dtype": CONFIGS[directory.name]["torch_dtype"]}
    settings.pop("_name_or_path", None)  # a path of the recording machine
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / "config_v5.json").write_text(text, "utf-8")
    config = AutoConfig.for_model(**json.loads(text))
    config._attn_implementation = "eager"
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    twin.load_state_dict(model.state_dict())
    tokens = list(range(3, 103))
    if not torch.equal(plain_logits(model, tokens, 100), plain_logits(twin, tokens, 100)):
        raise RuntimeError(f"the two configs in {directory.name} compute different logits")


def record_one(name: str, directory: Path) -> None:
    """Writes one checkpoint directory with its reference.npz."""
    model = write_checkpoint(name, directory)
    check_v5_config(model, directory)
    arrays: dict[str, Any] = {}
    for index, (length, keep) in enumerate(PROMPTS):
        # Past the first three ids, which are special.
        tokens = _generator(name, f"prompt {index}").integers(3, model.config.vocab_size, length)
        run = continue_greedily(model, tokens.tolist(), GREEDY_TOKENS, keep)
        arrays |= {
            f"prompt_{index}": tokens.astype(np.int32),
            f"logits_{index}": run.prompt_logits,
            f"greedy_{index}": run.tokens,
            f"runners_up_{index}": run.runners_up,
            f"gaps_{index}": run.gaps,
        }
    np.savez_compressed(directory / "reference.npz", **arrays)
    smallest = min(arrays[f"gaps_{index}"].min() for index in range(len(PROMPTS)))
    print(f"{name}: smallest gap {smallest:.1e}, logit deviation {arrays['logits_1'].std():.2f}")


def record_all(directory: Path) -> None:
    """Writes every architecture's checkpoint."""
    for name in CONFIGS:
        record_one(name, directory / name)
