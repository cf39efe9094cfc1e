"""A whole sequence at once, without pages: logits for people who look inside a model.

Slower and larger than serving (attention scores are ``T x T``), and compiled when first asked for
a length. The serving loop never comes here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Attend, Model, Params
from jaxserve.models.layers import softcap
from pallas_kernels.paged_attention import apply_rope

SMALLEST_PLACES = 16


class DenseForward:
    """Computes logits of whole sequences. Holds programs, no weights."""

    def __init__(self, model: Model) -> None:
        """Prepares; nothing is compiled yet."""
        self._model = model

    def __call__(self, params: Params, token_ids: list[int]) -> np.ndarray:
        """Returns the float32 logits ``[T, V]`` after every token.

        Args:
            params: the weights, wherever they live.
            token_ids: at least one, within the vocabulary.
        """
        # Padded to a power of two, so that few lengths are compiled; causal, so harmless.
        places = max(SMALLEST_PLACES, 1 << (len(token_ids) - 1).bit_length())
        tokens = np.zeros((1, places), np.int32)
        tokens[0, : len(token_ids)] = token_ids
        vocab_size = self._model.layout.config.vocab_size
        return np.asarray(self._program(params, tokens)[: len(token_ids), :vocab_size])

    @cached_property
    def _program(self) -> Any:
        return jax.jit(self._forward)

    def _forward(self, params: Params, tokens: Int[Array, "1 T"]) -> Float[Array, "T V"]:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        attend = dense_attention(self._model.config)
        hidden, _ = self._model.forward(params, tokens, positions, (), attend, tensor_axis=None)
        return self._model.logits(params, hidden[0])


def dense_attention(config: ModelConfig) -> Attend:
    """Returns attention in which every token sees itself and those before it, in float32."""

    def attend(
        cache: Any,
        layer: Any,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        rope: Float[Array, "2 B T half"],
        window: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        B, T, N, H = q.shape
        q_BTKGH = q.reshape(B, T, k.shape[2], -1, H).astype(jnp.float32)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k.astype(jnp.float32))
        scores = softcap(scores * config.attention_scale, config.attention_softcap)
        query, key = jnp.mgrid[:T, :T]
        seen = (key <= query) & ((window == 0) | (query - key < window))
        weights = jax.nn.softmax(scores, axis=-1, where=seen[None, None, None])
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v.astype(jnp.float32))
        return out.reshape(B, T, N, H).astype(q.dtype), cache

    return attend
