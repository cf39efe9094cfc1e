"""The decoder's two modules: which weights there are, and what one layer computes from them.

Every architecture is a case of ``Layer``; the config says which parts are there. Inside
``shard_map`` the arrays are one shard's, so every head count comes from an array's shape, never
from the config. Running all layers over a step's tokens is ``decoder.py``'s part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.models.config import ModelConfig
from jaxserve.models.experts import exact, mixture, route
from jaxserve.models.layers import all_reduce, feed_forward, project, rms_norm
from pallas_kernels.quantized_matmul import Products

Axes = tuple[str | None, ...]
"""A word of the alphabet for each axis of a weight; None has no word and is never split."""

INPUT_AXES = {"w_o": 2}
"""How many of a matrix's last axes its product sums over, where that is not one."""

MAX_RANDOM_WEIGHTS = 12
"""Weights of one module that are drawn and not constant; Qwen2-MoE's layer has nine."""


class Ends(nnx.Module):
    """What stands before the first layer and after the last."""

    def __init__(self, config: ModelConfig, dtype: Any, key: Array) -> None:
        declare = _Declare(dtype, key)
        D, V = config.embed, config.vocab_size
        # With these spreads a random model's logits have a deviation of about 2, and the layers
        # outweigh the embedding even where that is scaled: an answer does not repeat one token.
        self.embed = declare((V, D), ("vocab", "embed"), std=2 / (D**0.5 * config.embed_scale))
        gain = config.embed_scale - (1.0 if config.norm_offset else 0.0)
        self.final_norm = declare((D,), ("embed",), mean=gain)
        if not config.tie_embeddings:
            self.head = declare((V, D), ("vocab", "embed"), std=2 / D**0.5)


class Layer(nnx.Module):
    """One transformer layer: attention, then gated feed-forwards, each around a residual.

    Matrices are stored ``[out, in]``. A key/value head travels with its query heads as one group,
    so that ``w_qkv`` is split over ``kv_heads`` alone.
    """

    def __init__(self, config: ModelConfig, dtype: Any, key: Array) -> None:
        declare = _Declare(dtype, key)
        norm = partial(declare, mean=0.0 if config.norm_offset else 1.0)
        D, F, N, H = config.embed, config.ffn, config.q_heads, config.head_dim
        K, rows = config.kv_heads, config.group + 2
        self.config = config
        self.attn_norm = norm((D,), ("embed",))
        # Along the group axis: the query heads, then the key, then the value.
        self.w_qkv = declare(
            (K, rows, H, D), ("kv_heads", "group", "head_dim", "embed"), std=D**-0.5
        )
        if config.qkv_bias:
            self.b_qkv = declare((K, rows, H), ("kv_heads", "group", "head_dim"), std=0.1)
        if config.qk_norm:
            self.q_norm = norm((H,), ("head_dim",))
            self.k_norm = norm((H,), ("head_dim",))
        self.w_o = declare((D, N, H), ("embed", "q_heads", "head_dim"), std=2 / (N * H) ** 0.5)
        self.ffn_norm = norm((D,), ("embed",))
        if config.experts:
            self._declare_experts(declare)
        else:
            self.w_gate_up = declare((2, F, D), (None, "ffn", "embed"), std=D**-0.5)
            self.w_down = declare((D, F), ("embed", "ffn"), std=2 / F**0.5)
        if config.post_norms:
            self.post_attn_norm = norm((D,), ("embed",))
            self.post_ffn_norm = norm((D,), ("embed",))

    def _declare_experts(self, declare: _Declare) -> None:
        config = self.config
        D, E, F, shared = config.embed, config.experts, config.ffn, config.shared_ffn
        # Not named as matrices are: they are few numbers that decide much, and are never rounded.
        self.router = declare((E, D), ("expert", "embed"), std=2 / D**0.5)
        # Each expert's gate, and then what it gates.
        self.w_gate_up = declare((2 * E, F, D), (None, "ffn", "embed"), std=D**-0.5)
        self.w_down = declare((E, D, F), ("expert", "embed", "ffn"), std=2 / F**0.5)
        if shared:
            self.shared_gate = declare((1, D), (None, "embed"), std=D**-0.5)
            self.w_shared_gate_up = declare(
                (2, shared, D), (None, "shared_ffn", "embed"), std=D**-0.5
            )
            self.w_shared_down = declare((D, shared), ("embed", "shared_ffn"), std=2 / shared**0.5)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Float[Array, "2 B T half"],
        cache: Any,
        attend: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]],
        tensor_axis: str | None,
        products: Products,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs the layer; ``attend(cache, q, k, v, rope)`` is bound to it."""
        with jax.named_scope("attn_norm"):
            y = self._norm(x, self.attn_norm)
        q, k, v = self._qkv(y, products)
        with jax.named_scope("attention"):
            y, cache = attend(cache, q, k, v, rope)
        with jax.named_scope("o"):
            w_o = self.w_o[...]
            y = project(y.reshape(*y.shape[:2], -1), w_o.reshape(w_o.shape[0], -1), products)
            y = all_reduce(y, tensor_axis)
            x = x + (self._norm(y, self.post_attn_norm) if self.config.post_norms else y)
        with jax.named_scope("ffn_norm"):
            y = self._norm(x, self.ffn_norm)
        with jax.named_scope("ffn"):
            y = all_reduce(self._ffn(y, products), tensor_axis)
            x = x + (self._norm(y, self.post_ffn_norm) if self.config.post_norms else y)
        return x, cache

    def _qkv(
        self, x: Float[Array, "B T D"], products: Products
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        w = self.w_qkv[...]
        rows, H = self.config.group + 2, self.config.head_dim
        B, T, D = x.shape
        with jax.named_scope("qkv"):
            heads = project(x, w.reshape(-1, D), products).reshape(B, T, -1, rows, H)
            if self.config.qkv_bias:
                heads = heads + self.b_qkv[...][None, None]
            q, k, v = jnp.split(heads, (rows - 2, rows - 1), axis=3)
            q, k, v = q.reshape(B, T, -1, H), k[:, :, :, 0], v[:, :, :, 0]
            if self.config.qk_norm:
                q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
            return q, k, v

    def _ffn(self, x: Float[Array, "B T D"], products: Products) -> Float[Array, "B T D"]:
        if self.config.experts:
            return self._experts(x, products)
        return self._feed_forward(x, self.w_gate_up, self.w_down, products)

    def _feed_forward(
        self, x: Float[Array, "B T D"], gate_up: nnx.Param, down: nnx.Param, products: Products
    ) -> Float[Array, "B T D"]:
        w = gate_up[...]
        rows = w.reshape(-1, w.shape[-1])
        return feed_forward(x, rows, down[...], self.config.activation, products)

    def _experts(self, x: Float[Array, "B T D"], products: Products) -> Float[Array, "B T D"]:
        """What a token's own experts answer, and the shared one if there is one."""
        config, tokens = self.config, x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            routing = route(tokens, self.router[...], config, products)
        w = self.w_gate_up[...]
        gate_up = w.reshape(config.experts, -1, w.shape[-1])
        y = mixture(tokens, routing, gate_up, self.w_down[...], config.activation, products)
        y = y.reshape(x.shape)
        if config.shared_ffn:
            with jax.named_scope("shared_expert"):
                gate = jax.nn.sigmoid(exact(x, self.shared_gate[...], products))
                shared = self._feed_forward(x, self.w_shared_gate_up, self.w_shared_down, products)
                y = y + gate * shared.astype(jnp.float32)
        return y.astype(x.dtype)

    def _norm(self, x: Float[Array, "*B D"], weight: nnx.Param) -> Float[Array, "*B D"]:
        config = self.config
        return rms_norm(x, weight[...], eps=config.rms_eps, offset=config.norm_offset)


class _Declare:
    """Declares a module's weights, with different random numbers for each."""

    def __init__(self, dtype: Any, key: Array) -> None:
        self._dtype = dtype
        self._salts = iter(jax.random.bits(key, (MAX_RANDOM_WEIGHTS,), jnp.uint32))

    def __call__(
        self, shape: tuple[int, ...], axes: Axes, *, std: float = 0.0, mean: float = 0.0
    ) -> nnx.Param:
        """A weight spread evenly around its mean; without a ``std``, a constant."""
        if std:
            value = _noise(shape, next(self._salts), std) + mean
            return nnx.Param(value.astype(self._dtype), logical_axes=axes)
        return nnx.Param(jnp.full(shape, mean, self._dtype), logical_axes=axes)


def _noise(shape: tuple[int, ...], salt: Array, std: float) -> Array:
    """Uniform numbers of mean 0, each a function of its place in the array and a salt.

    MurmurHash3's finalizer instead of ``jax.random``: stand-ins for trained weights need no better
    numbers, Threefry takes half a second to compile for each weight, and this needs no memory
    beside the result and no communication, whatever its sharding.
    """
    bits = jnp.broadcast_to(salt, shape)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) * 0x9E3779B9 % 2**32)
        bits = bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    bits = bits ^ (bits >> jnp.uint32(16))
    # The top 24 bits, which float32 holds exactly.
    unit = (bits >> jnp.uint32(8)).astype(jnp.float32) * 2.0**-24
    return (unit - 0.5) * (std * 12**0.5)
