"""Which architectures are supported, and how to refuse the others helpfully."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxserve.errors import UnsupportedModelError
from jaxserve.models import (
    gemma3,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from jaxserve.models.config import ModelConfig
from jaxserve.models.sources import WeightSources

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gemma3": gemma3,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}
CLASSES = {
    # Class name in config.json: (family, its model_type)
    "LlamaForCausalLM": ("llama", "llama"),
    "MistralForCausalLM": ("mistral", "mistral"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "qwen3"),
    "Phi3ForCausalLM": ("phi3", "phi3"),
    "Gemma3ForCausalLM": ("gemma3", "gemma3_text"),
    "MixtralForCausalLM": ("mixtral", "mixtral"),
    "Qwen2MoeForCausalLM": ("qwen2_moe", "qwen2_moe"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3_moe"),
}
MODEL_TYPES = {model_type: family for family, model_type in CLASSES.values()}


def model_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Translates a Hugging Face config of any supported architecture.

    Raises:
        UnsupportedModelError: naming the architecture or option that is not implemented.
        CheckpointError: the config is incomplete or contradicts itself.
    """
    return FAMILIES[_family(hf_config)].config_from_hf(hf_config)


def weight_sources(config: ModelConfig) -> WeightSources:
    """Returns which stored tensors make up each weight of a model."""
    return FAMILIES[config.architecture].weight_sources(config)


def _family(hf_config: Mapping[str, Any]) -> str:
    """The class decides where it is given: a reward model shares its base's model_type."""
    classes = hf_config.get("architectures")
    if isinstance(classes, list) and classes:
        if classes[0] in CLASSES:
            return CLASSES[classes[0]][0]
        raise _unsupported(f"architecture {classes[0]!r}")
    model_type = hf_config.get("model_type")
    if model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    raise _unsupported(f"model_type {model_type!r}")


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json names the {what}, which is not implemented; supported are "
        f"{', '.join(CLASSES)}"
    )
