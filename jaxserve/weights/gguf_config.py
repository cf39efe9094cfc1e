"""What a GGUF file's metadata means in the words of a Hugging Face ``config.json``.

Also the facts that the metadata leaves out and every reader has to know (Gemma 3's local rope base
and layer pattern, Llama 3's rope scaling, which hides in a tensor). Tensor contents and names are
left to ``gguf.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = {
    # GGUF architecture: (model_type, class name, hidden activation)
    "llama": ("llama", "LlamaForCausalLM", "silu"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "silu"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "silu"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh"),
    "phi3": ("phi3", "Phi3ForCausalLM", "silu"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM", "silu"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", "silu"),
}
EXPERT_ARCHITECTURES = ("llama", "qwen2moe", "qwen3moe")
"""Those that may have experts; a llama with experts is Mixtral."""

GEMMA3_LOCAL_ROPE_THETA = 10_000.0
GEMMA3_PATTERN = 6
"""Every sixth layer of Gemma 3 attends to everything; the others have the sliding window."""
GEMMA3_27B_LAYERS = 62
"""Only the 27B model scales attention by its width per head instead of the head size."""

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What every published Llama 3.1 to 3.3 checkpoint has; verified against the stored factors."""

ReadTensor = Callable[[str], np.ndarray | None]
"""Gives a tensor by its GGUF name, or None when the file has none of that name."""


class Metadata:
    """Typed look-ups in GGUF metadata, under ``{architecture}.``."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        """Takes the architecture out of the metadata."""
        self.path = path
        self.values = values
        self.architecture = values.get("general.architecture")
        if not isinstance(self.architecture, str):
            raise CheckpointError(f"{path} has no general.architecture; fetch it again")

    def _look_up(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        full = f"{self.architecture}.{key}"
        value = self.values.get(full, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata {full!r}; convert it again")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise CheckpointError(
                f"{self.path}: metadata {full!r} must be {what}, got {value!r}; convert it again"
            )
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer; a list of equal values counts as one."""
        full = f"{self.architecture}.{key}"
        value = self._look_up(key, default, (int, list), "a positive integer")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(
                    f"{self.path}: {full} differs from layer to layer, which is not implemented; "
                    "serve a checkpoint whose layers are alike"
                )
            value = value[0]
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(
                f"{self.path}: metadata {full!r} must be a positive integer, got {value!r}; "
                "convert it again"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite float, as short as the float32 that it was stored as."""
        value = float(str(np.float32(self._look_up(key, default, (int, float), "a number"))))
        if not math.isfinite(value):
            raise CheckpointError(
                f"{self.path}: metadata {self.architecture}.{key} is {value}; convert it again"
            )
        return value

    @property
    def has_experts(self) -> bool:
        """Whether layers have several feed-forwards; a count of 0 says that they do not."""
        return bool(self.values.get(f"{self.architecture}.expert_count"))

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return f"{self.architecture}.{key}" in self.values


def config_from_metadata(
    path: str, values: Mapping[str, Any], tensor_names: frozenset[str], read: ReadTensor
) -> dict[str, Any]:
    """Builds the Hugging Face config of a GGUF checkpoint.

    Args:
        path: for messages.
        values: the file's metadata.
        tensor_names: names in the file; they tell tied embeddings and biases.
        read: reads the few small tensors that are really configuration.

    Raises:
        UnsupportedModelError: another architecture, or an option that is not implemented.
        CheckpointError: metadata that is missing or makes no sense.
    """
    meta = Metadata(path, values)
    if meta.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} holds the architecture {meta.architecture!r}; supported in GGUF are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if meta.has_experts and meta.architecture not in EXPERT_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} is a mixture of experts ({meta.architecture}.expert_count = "
            f"{values[f'{meta.architecture}.expert_count']}), which is implemented for "
            f"{', '.join(EXPERT_ARCHITECTURES)} only"
        )
    model_type, class_name, activation = ARCHITECTURES[meta.architecture]
    heads = meta.integer("attention.head_count")
    hidden = meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", max(1, hidden // heads))
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [class_name],
        "hidden_act": activation,
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(meta),
        "vocab_size": _vocab_size(meta),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensor_names,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{name}_token_id"] = values.get(f"tokenizer.ggml.{key}_token_id")
    rope_dim = meta.integer("rope.dimension_count", head_dim)
    if rope_dim > head_dim or (rope_dim < head_dim and model_type != "phi3"):
        raise UnsupportedModelError(
            f"{path} rotates {rope_dim} of {head_dim} values per head; for {model_type} only whole "
            "heads are implemented"
        )
    _FAMILIES.get(meta.architecture, _no_more)(config, meta, read)
    return config


def _vocab_size(meta: Metadata) -> int:
    tokens = meta.values.get("tokenizer.ggml.tokens")
    return meta.integer("vocab_size", len(tokens) if isinstance(tokens, list) and tokens else None)


def _rope_scaling(meta: Metadata) -> dict[str, Any] | None:
    kind = meta.values.get(f"{meta.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn", "longrope"):
        raise UnsupportedModelError(
            f"{meta.path} has rope scaling {kind!r}; supported are linear, yarn, longrope and "
            "llama3"
        )
    scaling: dict[str, Any] = {"rope_type": kind}
    if meta.has("rope.scaling.factor"):
        scaling["factor"] = meta.number("rope.scaling.factor")
    if meta.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = meta.integer(
            "rope.scaling.original_context_length"
        )
    return scaling


def _no_more(config: dict[str, Any], meta: Metadata, read: ReadTensor) -> None:
    """The family has nothing beyond the common keys."""


def _llama(config: dict[str, Any], meta: Metadata, read: ReadTensor) -> None:
    if meta.has("attention.sliding_window"):
        # Mistral 7B v0.1 travels under the llama architecture; its window is what tells them apart.
        config["model_type"], config["architectures"] = "mistral", ["MistralForCausalLM"]
        config["sliding_window"] = meta.integer("attention.sliding_window")
    if meta.has_experts:
        config["model_type"], config["architectures"] = "mixtral", ["MixtralForCausalLM"]
        config["num_local_experts"] = meta.integer("expert_count")
        config["num_experts_per_tok"] = meta.integer("expert_used_count")
    factors = read("rope_freqs.weight")
    if factors is not None:
        config["rope_scaling"] = llama3_rope_scaling(
            meta.path, factors, config["rope_theta"], config["head_dim"]
        )


def llama3_rope_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Returns what each rope frequency is divided by under Llama 3's scaling rule."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def llama3_rope_scaling(
    path: str, factors: np.ndarray, theta: float, head_dim: int
) -> dict[str, Any]:
    """Finds the ``rope_scaling`` whose factors are the stored ones."""
    stored = np.asarray(factors, np.float64).reshape(-1)
    scaling = {"rope_type": "llama3", "factor": float(stored.max(initial=1.0)), **LLAMA3_ROPE}
    expected = llama3_rope_factors(scaling, theta, head_dim)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{path} stores rope_freqs.weight that are not Llama 3's rule with {LLAMA3_ROPE}; "
            "serve the safetensors checkpoint, whose config.json states the rule"
        )
    return scaling


def _qwen2(config: dict[str, Any], meta: Metadata, read: ReadTensor) -> None:
    config["attention_bias"] = True
    config["use_sliding_window"] = False


def _qwen_experts(config: dict[str, Any], meta: Metadata, read: ReadTensor) -> None:
    """What llama.cpp knows by the architecture: Qwen3 scales the weights of a token's experts."""
    config |= {
        "use_sliding_window": False,
        "num_experts": meta.integer("expert_count"),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "norm_topk_prob": meta.architecture == "qwen3moe",
    }
    if meta.architecture == "qwen2moe":
        shared = meta.integer("expert_shared_feed_forward_length")
        config["shared_expert_intermediate_size"] = shared


def _gemma3(config: dict[str, Any], meta: Metadata, read: ReadTensor) -> None:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    window = meta.integer("attention.sliding_window")
    pattern = meta.integer("attention.sliding_window_pattern", GEMMA3_PATTERN)
    scalar = config["head_dim"]
    if layers == GEMMA3_27B_LAYERS:
        scalar = config["hidden_size"] // heads
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if meta.has(key):
            raise UnsupportedModelError(
                f"{meta.path} has {meta.architecture}.{key}, which is not implemented for Gemma 3"
            )
    config |= {
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": GEMMA3_LOCAL_ROPE_THETA,
        "sliding_window": window,
        "sliding_window_pattern": pattern,
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
            for layer in range(layers)
        ],
    }


def _phi3(config: dict[str, Any], meta: Metadata, read: ReadTensor) -> None:
    if meta.has("attention.sliding_window"):
        config["sliding_window"] = meta.integer("attention.sliding_window")
    rope_dim = meta.integer("rope.dimension_count", config["head_dim"])
    config["partial_rotary_factor"] = rope_dim / config["head_dim"]
    original = meta.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    config["original_max_position_embeddings"] = original
    short, long = read("rope_factors_short.weight"), read("rope_factors_long.weight")
    if (short is None) != (long is None):
        raise CheckpointError(
            f"{meta.path} has only one of rope_factors_short.weight and rope_factors_long.weight; "
            "convert it again"
        )
    if short is not None and long is not None:
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "type": "longrope",
            "short_factor": short.reshape(-1).tolist(),
            "long_factor": long.reshape(-1).tolist(),
            "original_max_position_embeddings": original,
        }


_FAMILIES: dict[str, Callable[[dict[str, Any], Metadata, ReadTensor], None]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen_experts,
    "qwen3moe": _qwen_experts,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
