"""Mixtral (arXiv:2401.04088): Mistral whose feed-forward is two of several experts.

The softmax over all experts is cut to the two largest and scaled to add up to one, which is the
paper's softmax over two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import WeightSources, llama_sources, with_experts


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: mixtral``."""
    hf = HfConfig(values, "mixtral", implemented=("num_local_experts", "num_experts"))
    hf.require("hidden_act", "silu", default="silu")
    common = hf.common()
    theta, scaling = hf.rope(default_theta=1_000_000.0)
    return ModelConfig(
        **common,
        **hf.experts(count=8, per_token=2),
        renormalize_experts=True,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=hf.windows(hf.window(missing=None)),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


def weight_sources(config: ModelConfig) -> WeightSources:
    """Llama's sources, with the experts under the names of the first release."""
    prefix = "model.layers.{layer}.block_sparse_moe."
    return with_experts(llama_sources(config), config, prefix, gate="w1", up="w3", down="w2")
