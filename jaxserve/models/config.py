"""What a decoder needs to know about itself, in one alphabet for every architecture.

    B batch  T query  L layer  D embed  F ffn  N q_heads  K kv_heads  G group  H head_dim  V vocab
    E expert

The files named after architectures fill this in from a Hugging Face ``config.json``; the decoder
reads nothing else. Dtypes, meshes and cache sizes are decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.errors import CheckpointError

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rope frequencies are stretched beyond the context that was trained first."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    """llama3 only: below this many turns in the original context, divide by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3 only: above this many turns, leave alone; between the two, interpolate."""
    original_context_tokens: int = 8192
    """llama3 only."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise CheckpointError(
                f"config.json: the rope scaling factor must be at least 1, got {self.factor:g}"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"config.json: rope scaling needs low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor:g} and {self.high_freq_factor:g}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. Hashable, so that it can be a static argument."""

    architecture: str
    """The registry's word for the family, such as ``llama``."""
    vocab_size: int  # V
    embed: int  # D
    layers: int  # L
    q_heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H; not always embed / q_heads
    ffn: int  # F; of one expert, where a layer has several
    context_tokens: int
    """Longest sequence that the checkpoint promises to handle."""
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    """Applies to ``rope_theta`` only, never to ``local_rope_theta``."""
    local_rope_theta: float | None = None
    """Rope base of the layers that have a window; None when all layers share one base."""
    windows: tuple[int, ...]
    """Per layer: how many tokens a query sees, itself included; 0 is all of them."""
    tie_embeddings: bool
    """The head is the embedding table."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of q and k, before rope."""
    post_norms: bool = False
    """RMS norms on what attention and feed-forward return, too."""
    norm_offset: bool = False
    """Norm weights are stored as the factor minus one."""
    experts: int = 0  # E
    """Feed-forwards of each layer, of which a token takes a few; 0 is one that all tokens take."""
    experts_per_token: int = 0
    """How many a token takes, those that its router finds likeliest."""
    renormalize_experts: bool = False
    """The likelihoods of a token's experts, which weigh them, are scaled to add up to one."""
    shared_ffn: int = 0
    """Width of one more feed-forward, which every token takes through a gate; 0 is none."""
    activation: Activation = "silu"
    embed_scale: float = 1.0
    attention_scale: float
    """Multiplies q · k."""
    attention_softcap: float = 0.0
    """Attention scores go through ``cap * tanh(score / cap)``; 0 is off."""
    logit_softcap: float = 0.0
    """The same for logits."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, as the model's config states them."""

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "embed", "layers", "q_heads", "kv_heads", "head_dim", "ffn"),
            "context_tokens",
        ):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"{self.architecture}: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.q_heads % self.kv_heads:
            raise CheckpointError(
                f"{self.architecture}: {self.q_heads} query heads cannot share {self.kv_heads} "
                "key/value heads evenly; the config does not describe a grouped-query model"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"{self.architecture}: rope rotates pairs, and head_dim {self.head_dim} is odd"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise CheckpointError(
                f"{self.architecture}: a token cannot take {self.experts_per_token} of "
                f"{self.experts} experts; the config must name 1 to {self.experts}"
            )
        if len(self.windows) != self.layers:
            raise CheckpointError(
                f"{self.architecture}: {len(self.windows)} attention windows are given for "
                f"{self.layers} layers; give one each"
            )

    @property
    def group(self) -> int:
        """Query heads per key/value head (G)."""
        return self.q_heads // self.kv_heads

    @property
    def params(self) -> int:
        """Number of weights, each counted once when the head is tied."""
        qkv = self.kv_heads * (self.group + 2) * self.head_dim
        layer = qkv * (self.embed + self.qkv_bias) + self.q_heads * self.head_dim * self.embed
        layer += (4 if self.post_norms else 2) * self.embed
        layer += max(self.experts, 1) * 3 * self.ffn * self.embed + self.experts * self.embed
        layer += (3 * self.shared_ffn + 1) * self.embed if self.shared_ffn else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        ends = self.vocab_size * self.embed * (1 if self.tie_embeddings else 2) + self.embed
        return self.layers * layer + ends
