"""Says which tensors of a Hugging Face checkpoint make up each of our weights.

Nothing is read here: ``weights/load.py`` follows these descriptions, whole or slice by slice. The
names most decoders share stand here too; families that differ say so in their own file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxserve.models.config import ModelConfig

Split = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """A stored tensor, or some of its rows, seen with more axes than it is stored with."""

    name: str
    """In the checkpoint; ``{layer}`` stands for the layer's number."""
    split: Split
    """For each stored axis, the axes that it becomes: ``((K, G, H), (D,))``."""
    first_row: int = 0
    stored_rows: int | None = None
    """Rows of the stored tensor, when the part is only some of them."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the checkpoint must have it in."""
        rows, *rest = (math.prod(axes) for axes in self.split)
        return (self.stored_rows or rows, *rest)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after splitting."""
        return tuple(size for axes in self.split for size in axes)


@dataclass(frozen=True)
class Source:
    """One of our weights: parts that lie next to each other along ``axis``."""

    parts: tuple[Part, ...]
    axis: int = 0


@dataclass(frozen=True)
class WeightSources:
    """Where every weight of a model comes from."""

    ends: dict[str, Source]
    layer: dict[str, Source]
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")
    """Patterns of stored tensors that hold no weight: they follow from the config."""


def llama_sources(config: ModelConfig) -> WeightSources:
    """Llama's names, which most families use, with the options that some of them add."""
    D, F, V = config.embed, config.ffn, config.vocab_size
    N, K, G, H = config.q_heads, config.kv_heads, config.group, config.head_dim
    attn, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    layer = {
        "attn_norm": vector("model.layers.{layer}.input_layernorm.weight", D),
        "ffn_norm": vector("model.layers.{layer}.post_attention_layernorm.weight", D),
        "w_qkv": Source(
            (
                Part(f"{attn}q_proj.weight", ((K, G, H), (D,))),
                Part(f"{attn}k_proj.weight", ((K, 1, H), (D,))),
                Part(f"{attn}v_proj.weight", ((K, 1, H), (D,))),
            ),
            axis=1,
        ),
        "w_o": Source((Part(f"{attn}o_proj.weight", ((D,), (N, H))),)),
        "w_gate_up": Source(
            (
                Part(f"{mlp}gate_proj.weight", ((1, F), (D,))),
                Part(f"{mlp}up_proj.weight", ((1, F), (D,))),
            )
        ),
        "w_down": Source((Part(f"{mlp}down_proj.weight", ((D,), (F,))),)),
    }
    if config.qkv_bias:
        layer["b_qkv"] = Source(
            (
                Part(f"{attn}q_proj.bias", ((K, G, H),)),
                Part(f"{attn}k_proj.bias", ((K, 1, H),)),
                Part(f"{attn}v_proj.bias", ((K, 1, H),)),
            ),
            axis=1,
        )
    if config.qk_norm:
        layer["q_norm"] = vector(f"{attn}q_norm.weight", H)
        layer["k_norm"] = vector(f"{attn}k_norm.weight", H)
    ends = {
        "embed": Source((Part("model.embed_tokens.weight", ((V,), (D,))),)),
        "final_norm": vector("model.norm.weight", D),
    }
    ignored = WeightSources.ignored
    if config.tie_embeddings:
        # Some tools store the tied head a second time.
        ignored = (*ignored, "lm_head.weight")
    else:
        ends["head"] = Source((Part("lm_head.weight", ((V,), (D,))),))
    return WeightSources(ends, layer, ignored)


def with_experts(
    sources: WeightSources,
    config: ModelConfig,
    prefix: str,
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> WeightSources:
    """Replaces the feed-forward by a router and experts, each stored in tensors of its own.

    Args:
        sources: of all else.
        config: of the model.
        prefix: of the mixture's tensors, with ``{layer}``.
        gate: what an expert calls its gate.
        up: what it calls what is gated.
        down: what it calls its second matrix.
    """
    D, F, E = config.embed, config.ffn, config.experts
    first: list[Part] = []
    second: list[Part] = []
    for number in range(E):
        expert = f"{prefix}experts.{number}."
        first += (Part(f"{expert}{name}.weight", ((1, F), (D,))) for name in (gate, up))
        second.append(Part(f"{expert}{down}.weight", ((1, D), (F,))))
    mixture = {
        "router": Source((Part(f"{prefix}gate.weight", ((E,), (D,))),)),
        "w_gate_up": Source(tuple(first)),
        "w_down": Source(tuple(second)),
    }
    return replace(sources, layer=sources.layer | mixture)


def vector(name: str, size: int) -> Source:
    """A stored vector taken as it is."""
    return Source((Part(name, ((size,),)),))
