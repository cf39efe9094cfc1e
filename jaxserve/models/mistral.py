"""Mistral 7B (arXiv:2310.06825): Llama with a sliding window, which later releases dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import llama_sources

weight_sources = llama_sources


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: mistral``."""
    hf = HfConfig(values, "mistral")
    hf.require("hidden_act", "silu", default="silu")
    common = hf.common()
    theta, scaling = hf.rope()
    return ModelConfig(
        **common,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.windows(hf.window(missing=4096)),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )
