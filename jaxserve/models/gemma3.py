"""Gemma 3, text (arXiv:2503.19786): five local layers for each global one, norms on both sides.

Its own points: norm weights are stored as the factor minus one, embeddings are scaled by
``sqrt(D)``, local layers have their own rope base, attention is scaled by a stated number instead
of the head size, the feed-forward's gate is a tanh-approximated GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxserve.errors import UnsupportedModelError
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.sources import WeightSources, llama_sources, vector

PATTERN = 6
"""Every sixth layer is global, where the config says nothing else."""


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` with ``model_type: gemma3_text``."""
    hf = HfConfig(values, "gemma3")
    hf.require("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    hf.require("attention_bias", False, default=False)
    common = hf.common()
    common["attention_scale"] = hf.number("query_pre_attn_scalar", 256.0) ** -0.5
    theta, scaling = hf.rope("full_attention", 1_000_000.0)
    softcap = values.get("final_logit_softcapping")
    return ModelConfig(
        **common,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=_local_rope_theta(hf),
        windows=_windows(hf, common["layers"]),
        tie_embeddings=hf.flag("tie_word_embeddings", True),
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        activation="gelu_tanh",
        embed_scale=common["embed"] ** 0.5,
        logit_softcap=0.0 if softcap is None else hf.number("final_logit_softcapping"),
    )


def _local_rope_theta(hf: HfConfig) -> float:
    if hf.values.get("rope_parameters") is None:
        return hf.number("rope_local_base_freq", 10_000.0)
    theta, scaling = hf.rope("sliding_attention")
    if scaling is not None:
        raise UnsupportedModelError(
            f"gemma3: rope_parameters scale the sliding_attention layers ({scaling.kind}), which "
            "no Gemma 3 release does; only full_attention layers can be scaled"
        )
    return theta


def _windows(hf: HfConfig, layers: int) -> tuple[int, ...]:
    """The window also tells a local layer's rope base, so it stays even where it never binds."""
    types = hf.layer_types(layers)
    if types is None:
        pattern = hf.integer("sliding_window_pattern", PATTERN)
        types = [
            "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
        ]
    window = hf.integer("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def weight_sources(config: ModelConfig) -> WeightSources:
    """Llama's sources, with the four norms of a layer under Gemma's names for them."""
    sources = llama_sources(config)
    prefix = "model.layers.{layer}."
    norms = {
        "post_attn_norm": vector(f"{prefix}post_attention_layernorm.weight", config.embed),
        "ffn_norm": vector(f"{prefix}pre_feedforward_layernorm.weight", config.embed),
        "post_ffn_norm": vector(f"{prefix}post_feedforward_layernorm.weight", config.embed),
    }
    return replace(sources, layer=sources.layer | norms)
