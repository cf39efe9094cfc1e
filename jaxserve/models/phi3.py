"""Phi-3 (arXiv:2404.14219): Llama whose q, k, v and whose gate and up are stored fused.

Only checkpoints with one rope for all lengths: the long-context variants (longrope) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import Part, Source, WeightSources, llama_sources


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: phi3``."""
    hf = HfConfig(values, "phi3")
    hf.require("hidden_act", "silu", default="silu")
    hf.require("attention_bias", False, default=False)
    common = hf.common()
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.windows(hf.window(missing=None)),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


def weight_sources(config: ModelConfig) -> WeightSources:
    """Llama's sources, with the two fused tensors cut where the parts meet."""
    D, F = config.embed, config.ffn
    K, G, H = config.kv_heads, config.group, config.head_dim
    q_rows, kv_rows = config.q_heads * H, K * H
    rows = q_rows + 2 * kv_rows
    qkv = "model.layers.{layer}.self_attn.qkv_proj.weight"
    sources = llama_sources(config)
    fused = {
        "w_qkv": Source(
            (
                Part(qkv, ((K, G, H), (D,)), 0, rows),
                Part(qkv, ((K, 1, H), (D,)), q_rows, rows),
                Part(qkv, ((K, 1, H), (D,)), q_rows + kv_rows, rows),
            ),
            axis=1,
        ),
        "w_gate_up": Source(
            (Part("model.layers.{layer}.mlp.gate_up_proj.weight", ((2, F), (D,))),)
        ),
    }
    return replace(sources, layer=sources.layer | fused)
