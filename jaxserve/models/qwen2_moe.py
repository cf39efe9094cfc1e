"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): Qwen2 with many small experts and a shared one.

A token weighs its experts by their softmax over all, as it is; what the shared expert answers goes
through a sigmoid of its own. Only checkpoints whose layers all have experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import Part, Source, WeightSources, llama_sources, with_experts

PREFIX = "model.layers.{layer}.mlp."


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: qwen2_moe``."""
    hf = HfConfig(values, "qwen2_moe", implemented=("num_experts", "num_local_experts"))
    hf.require("hidden_act", "silu", default="silu")
    hf.require("qkv_bias", True, default=True)
    hf.require("use_sliding_window", False, default=False)
    common = hf.common()
    common["ffn"] = hf.integer("moe_intermediate_size", 1408)
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        **hf.experts(count=60, per_token=4),
        renormalize_experts=hf.flag("norm_topk_prob"),
        shared_ffn=hf.integer("shared_expert_intermediate_size", 5632),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.windows(0),
        tie_embeddings=hf.flag("tie_word_embeddings"),
        qkv_bias=True,
    )


def weight_sources(config: ModelConfig) -> WeightSources:
    """Llama's sources, with the experts, the shared one and its gate."""
    D, F = config.embed, config.shared_ffn
    sources = with_experts(llama_sources(config), config, PREFIX)
    shared = {
        "shared_gate": Source((Part(f"{PREFIX}shared_expert_gate.weight", ((1,), (D,))),)),
        "w_shared_gate_up": Source(
            tuple(
                Part(f"{PREFIX}shared_expert.{name}_proj.weight", ((1, F), (D,)))
                for name in ("gate", "up")
            )
        ),
        "w_shared_down": Source((Part(f"{PREFIX}shared_expert.down_proj.weight", ((D,), (F,))),)),
    }
    return replace(sources, layer=sources.layer | shared)
