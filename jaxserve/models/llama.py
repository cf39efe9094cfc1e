"""Llama 2 and 3 (arXiv:2302.13971, 2407.21783), and SmolLM2, which is one.

Pre-norm decoder with RMS norms, rotary positions, grouped-query attention and a SiLU-gated
feed-forward; no biases. Llama 3.1 and later stretch the slow rope frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import llama_sources

weight_sources = llama_sources


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: llama``."""
    hf = HfConfig(values, "llama")
    hf.require("hidden_act", "silu", default="silu")
    hf.require("attention_bias", False, default=False)
    hf.require("mlp_bias", False, default=False)
    common = hf.common()
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=(0,) * common["layers"],
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )
