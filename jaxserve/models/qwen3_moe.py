"""Qwen3-MoE (arXiv:2505.09388): Qwen3 whose feed-forward is a few of many small experts.

Only checkpoints whose layers all have experts, as those that were released.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import WeightSources, llama_sources, with_experts


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: qwen3_moe``."""
    hf = HfConfig(values, "qwen3_moe", implemented=("num_experts", "num_local_experts"))
    hf.require("hidden_act", "silu", default="silu")
    hf.require("attention_bias", False, default=False)
    hf.require("use_sliding_window", False, default=False)
    common = hf.common()
    common["ffn"] = hf.integer("moe_intermediate_size", 768)
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        **hf.experts(count=128, per_token=8),
        renormalize_experts=hf.flag("norm_topk_prob"),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.windows(0),
        tie_embeddings=hf.flag("tie_word_embeddings"),
        qk_norm=True,
    )


def weight_sources(config: ModelConfig) -> WeightSources:
    """Llama's sources, with the experts."""
    return with_experts(llama_sources(config), config, "model.layers.{layer}.mlp.")
