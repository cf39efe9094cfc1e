"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115): Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import llama_sources

weight_sources = llama_sources


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: qwen2``."""
    hf = HfConfig(values, "qwen2")
    hf.require("hidden_act", "silu", default="silu")
    common = hf.common()
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.upper_windows(),
        tie_embeddings=hf.flag("tie_word_embeddings"),
        qkv_bias=True,
    )
