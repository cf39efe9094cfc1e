"""Qwen3, dense (arXiv:2505.09388): Llama with an RMS norm on every head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import llama_sources

weight_sources = llama_sources


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: qwen3``."""
    hf = HfConfig(values, "qwen3")
    hf.require("hidden_act", "silu", default="silu")
    hf.require("attention_bias", False, default=False)
    common = hf.common()
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.upper_windows(),
        tie_embeddings=hf.flag("tie_word_embeddings"),
        qk_norm=True,
    )
