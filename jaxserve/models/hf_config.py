"""Reads a Hugging Face ``config.json`` with care: types checked, options refused by name.

What every supported family has in common is translated here; each family's file adds its own. An
option that would change the arithmetic and is not implemented is an error, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import RopeScaling

ROPE_KINDS = ("default", "linear", "llama3")

# Options of other models that appear in configs of these families' descendants. Each of them
# changes the answer when it is set, and none is implemented.
REFUSED_WHEN_SET = (
    "use_bidirectional_attention",
    "attn_logit_softcapping",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "logit_scale",
    "clip_qkv",
    "no_rope_layers",
    "attention_chunk_size",
    "num_experts",
    "num_local_experts",
    "is_encoder_decoder",
    "add_cross_attention",
)


class HfConfig:
    """Typed look-ups in the config of one family."""

    def __init__(self, values: Mapping[str, Any], family: str) -> None:
        self.values = values
        self.family = family
        for key in REFUSED_WHEN_SET:
            if values.get(key):
                self.refuse(key)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns an integer of at least ``least``; a missing or null key gives the default."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._malformed(key, value, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive finite number."""
        return _positive(self._present(key, default), self, key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns true or false."""
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self._malformed(key, value, "true or false")
        return value

    def require(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """Returns the value, which must be one of those that are implemented."""
        value = self.values.get(key)
        value = default if value is None else value
        if value not in allowed:
            raise UnsupportedModelError(
                f"{self.family}: {key} = {value!r} is not implemented; supported: "
                f"{', '.join(repr(item) for item in allowed)}"
            )
        return value

    def refuse(self, key: str) -> None:
        """Says that an option is not implemented, whatever its value."""
        raise UnsupportedModelError(
            f"{self.family}: the option {key} = {_short(self.values[key])} is not implemented; "
            "serve a checkpoint without it"
        )

    def common(self) -> dict[str, Any]:
        """Returns the ``ModelConfig`` fields that all families state alike, but for rope."""
        embed, q_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        head_dim = self.integer("head_dim", embed // q_heads or 1)
        if self.values.get("head_dim") is None and embed % q_heads:
            raise CheckpointError(
                f"config.json: hidden_size {embed} is not a multiple of num_attention_heads "
                f"{q_heads} and head_dim is not given; state head_dim"
            )
        return {
            "architecture": self.family,
            "vocab_size": self.integer("vocab_size"),
            "embed": embed,
            "layers": self.integer("num_hidden_layers"),
            "q_heads": q_heads,
            "kv_heads": self.integer("num_key_value_heads", q_heads),
            "head_dim": head_dim,
            "ffn": self.integer("intermediate_size"),
            "context_tokens": self.integer("max_position_embeddings"),
            "rms_eps": self.number("rms_norm_eps"),
            "attention_scale": head_dim**-0.5,
            "eos_token_ids": self.token_ids("eos_token_id"),
        }

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Returns token ids given as one, a list, or not at all."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = tuple(value) if isinstance(value, list) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise self._malformed(key, value, "a token id or a list of them")
        return ids

    def rope(
        self, layer_type: str | None = None, default_theta: float = 10_000.0
    ) -> tuple[float, RopeScaling | None]:
        """Returns the rope base and scaling of all layers, or of one type of layer.

        Both spellings are read: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters``,
        which transformers writes since version 5.
        """
        options, theta = self.values.get("rope_parameters"), None
        if options is None:
            options, theta = self.values.get("rope_scaling") or {}, self.values.get("rope_theta")
        elif isinstance(options, Mapping) and layer_type is not None:
            options = options.get(layer_type, {})
        if not isinstance(options, Mapping):
            raise self._malformed("rope_parameters or rope_scaling", options, "an object")
        if any(isinstance(value, Mapping) for value in options.values()):
            raise UnsupportedModelError(
                f"{self.family}: rope_parameters per layer type ({', '.join(options)}) are not "
                "implemented for this architecture"
            )
        for part in (self.values, options):
            if part.get("partial_rotary_factor") not in (None, 1.0):
                raise UnsupportedModelError(
                    f"{self.family}: partial_rotary_factor = {part['partial_rotary_factor']!r} is "
                    "not implemented; only whole heads are rotated"
                )
        theta = options.get("rope_theta", theta)
        theta = _positive(default_theta if theta is None else theta, self, "rope_theta")
        return theta, self._rope_scaling(options)

    def window(self, *, missing: int | None) -> int:
        """Returns ``sliding_window``; 0 when it is null or never hides a token.

        Args:
            missing: what the family means when the key is not there at all.
        """
        window = self.values.get("sliding_window", missing)
        if window is None:
            return 0
        window = self.integer("sliding_window", missing)
        return window if window < self.integer("max_position_embeddings") else 0

    def layer_types(self, layers: int) -> list[str] | None:
        """Returns the stated kind of each layer, None when the config leaves it to a rule."""
        types = self.values.get("layer_types")
        if types is None:
            return None
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers:
            raise self._malformed("layer_types", types, f"a list of {layers} kinds")
        for kind in types:
            if kind not in known:
                raise UnsupportedModelError(
                    f"{self.family}: layer type {kind!r} is not implemented; supported: "
                    f"{', '.join(known)}"
                )
        return types

    def windows(self, window: int) -> tuple[int, ...]:
        """Returns one window per layer where a list of kinds may exempt some."""
        layers = self.integer("num_hidden_layers")
        types = self.layer_types(layers) or ["sliding_attention"] * layers
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)

    def upper_windows(self) -> tuple[int, ...]:
        """Returns Qwen's windows: off, or on the layers from ``max_window_layers`` on."""
        window = self.window(missing=4096) if self.flag("use_sliding_window") else 0
        layers = self.integer("num_hidden_layers")
        if self.values.get("layer_types") is None and window:
            first = self.integer("max_window_layers", 28, least=0)
            return tuple(window if layer >= first else 0 for layer in range(layers))
        return self.windows(window)

    def _rope_scaling(self, options: Mapping[str, Any]) -> RopeScaling | None:
        kind = options.get("rope_type") or options.get("type") or "default"
        if kind not in ROPE_KINDS:
            raise UnsupportedModelError(
                f"{self.family}: rope_type {kind!r} is not implemented; supported: "
                f"{', '.join(ROPE_KINDS)}"
            )
        if kind == "default":
            return None

        def positive(key: str) -> float:
            return _positive(options.get(key), self, f"rope scaling's {key}")

        if kind == "linear":
            return RopeScaling(kind="linear", factor=positive("factor"))
        return RopeScaling(
            kind="llama3",
            factor=positive("factor"),
            low_freq_factor=positive("low_freq_factor"),
            high_freq_factor=positive("high_freq_factor"),
            original_context_tokens=int(positive("original_max_position_embeddings")),
        )

    def _present(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"config.json has no {key!r}, which {self.family} needs")
        return value

    def _malformed(self, key: str, value: Any, what: str) -> CheckpointError:
        return CheckpointError(f"config.json: {key} must be {what}, got {_short(value)}")


def _positive(value: Any, config: HfConfig, key: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            f"config.json: {key} of {config.family} must be a positive number, got {_short(value)}"
        )
    return float(value)


def _short(value: Any) -> str:
    """Keeps a message readable when the value is a long list or object."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
