"""The decoder that every supported architecture is a case of.

``Ends`` and ``Layer`` are flax modules: they say which weights there are, their shapes, logical
axes and initial values, and what is computed from them. ``Model`` turns that into abstract shapes,
random weights and the step's ``forward`` over plain arrays. Inside ``shard_map`` the arrays are
one shard's, so that every head count comes from an array's shape; a layer has two all-reduces.

Attention over the cache is handed in; which weights are loaded from where is said in the files
named after architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import (
    all_reduce,
    apply_rope,
    gated,
    project,
    rms_norm,
    rope_frequencies,
    rope_table,
    softcap,
)

Attend = Callable[..., tuple[Any, Any]]
"""``attend(cache, layer, q, k, v, window) -> (out, cache)``.

q ``[B T N H]`` is not scaled yet; k and v ``[B T K H]`` are the new tokens'. ``layer`` and
``window`` (0 = global) are ints when layers are unrolled and traced scalars when they are scanned.
"""

Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """Every weight of a model; also used for trees of shapes, axes or shardings in their place."""

    ends: dict[str, Any]
    """``embed``, ``final_norm`` and, when it is not tied, ``head``."""
    layers: dict[str, Any] | tuple[dict[str, Any], ...]
    """Stacked: one dict whose leaves have a leading layer axis. Otherwise one dict per layer."""


MAX_RANDOM_WEIGHTS = 8
"""Weights of one module that are drawn and not constant; Qwen2's layer has five."""


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
    """One transformer layer: attention, then a gated feed-forward, each around a residual.

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
        self.w_gate_up = declare((2, F, D), (None, "ffn", "embed"), std=D**-0.5)
        self.w_down = declare((D, F), ("embed", "ffn"), std=2 / F**0.5)
        if config.post_norms:
            self.post_attn_norm = norm((D,), ("embed",))
            self.post_ffn_norm = norm((D,), ("embed",))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Float[Array, "2 B T half"],
        cache: Any,
        attend: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
        tensor_axis: str | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs the layer; ``attend(cache, q, k, v)`` is bound to it."""
        with jax.named_scope("attn_norm"):
            y = self._norm(x, self.attn_norm)
        q, k, v = self._qkv(y, rope)
        with jax.named_scope("attention"):
            y, cache = attend(cache, q, k, v)
        with jax.named_scope("o"):
            w_o = self.w_o[...]
            y = project(y.reshape(*y.shape[:2], -1), w_o.reshape(w_o.shape[0], -1))
            y = all_reduce(y, tensor_axis)
            x = x + (self._norm(y, self.post_attn_norm) if self.config.post_norms else y)
        with jax.named_scope("ffn_norm"):
            y = self._norm(x, self.ffn_norm)
        with jax.named_scope("ffn"):
            y = all_reduce(self._ffn(y), tensor_axis)
            x = x + (self._norm(y, self.post_ffn_norm) if self.config.post_norms else y)
        return x, cache

    def _qkv(
        self, x: Float[Array, "B T D"], rope: Float[Array, "2 B T half"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        w = self.w_qkv[...]
        K, rows, H, D = w.shape
        B, T = x.shape[:2]
        with jax.named_scope("qkv"):
            heads = project(x, w.reshape(K * rows * H, D)).reshape(B, T, K, rows, H)
            if self.config.qkv_bias:
                heads = heads + self.b_qkv[...][None, None]
            q, k, v = jnp.split(heads, (rows - 2, rows - 1), axis=3)
            q, k, v = q.reshape(B, T, -1, H), k[:, :, :, 0], v[:, :, :, 0]
            if self.config.qk_norm:
                q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        with jax.named_scope("rope"):
            return apply_rope(q, rope), apply_rope(k, rope), v

    def _ffn(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        w = self.w_gate_up[...]
        gate_up = project(x, w.reshape(-1, w.shape[-1]))
        return project(gated(gate_up, self.config.activation), self.w_down[...])

    def _norm(self, x: Float[Array, "*B D"], weight: nnx.Param) -> Float[Array, "*B D"]:
        config = self.config
        return rms_norm(x, weight[...], eps=config.rms_eps, offset=config.norm_offset)


class Model:
    """A decoder of one configuration: what is computed, without any weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._ends = nnx.eval_shape(lambda: Ends(config, jnp.float32, jax.random.key(0)))
        self._layer = nnx.eval_shape(lambda: Layer(config, jnp.float32, jax.random.key(0)))
        self._layer_graph, _ = nnx.split(self._layer)

    def init_ends(self, key: Array, dtype: Any) -> dict[str, Array]:
        """Returns random weights of the ends."""
        return _weights(Ends(self.config, dtype, key))

    def init_layer(self, key: Array, dtype: Any) -> dict[str, Array]:
        """Returns random weights of one layer."""
        return _weights(Layer(self.config, dtype, key))

    def init_layers(self, keys: Array, dtype: Any) -> dict[str, Array]:
        """Returns random weights of all layers, stacked."""
        # One layer after the other, so that the random numbers' temporaries are one layer's.
        return jax.lax.map(partial(self.init_layer, dtype=dtype), keys)

    def split_key(self, key: Array) -> tuple[Array, Array]:
        """Returns the key of the ends and one key per layer."""
        ends_key, layers_key = jax.random.split(key)
        return ends_key, jax.random.split(layers_key, self.config.layers)

    def init(self, key: Array, dtype: Any, *, stacked: bool) -> Params:
        """Returns random weights, the same ones stacked or not.

        Their spread is such that logits are neither flat nor dominated by the last token.
        """
        ends_key, keys = self.split_key(key)
        ends = self.init_ends(ends_key, dtype)
        if stacked:
            return Params(ends, self.init_layers(keys, dtype))
        return Params(ends, tuple(self.init_layer(key, dtype) for key in keys))

    def abstract(self, dtype: Any, *, stacked: bool) -> Params:
        """Returns the global shapes, as ``jax.ShapeDtypeStruct`` leaves."""
        key = jax.eval_shape(jax.random.key, 0)
        ends = jax.eval_shape(partial(self.init_ends, dtype=dtype), key)
        layer = jax.eval_shape(partial(self.init_layer, dtype=dtype), key)
        count = self.config.layers
        if not stacked:
            return Params(ends, (layer,) * count)
        return Params(
            ends,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), layer),
        )

    def logical_axes(self, *, stacked: bool) -> Params:
        """Returns the words for every axis, as tuple leaves; None has no word and is not split."""
        layer = _logical_axes(self._layer)
        if stacked:
            return Params(
                _logical_axes(self._ends), {name: ("layer", *axes) for name, axes in layer.items()}
            )
        return Params(_logical_axes(self._ends), (layer,) * self.config.layers)

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Any,
        attend: Attend,
        *,
        tensor_axis: str | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs all layers over new tokens.

        Args:
            params: this shard's weights.
            tokens: ids within the vocabulary; padding may be any of them.
            positions: each token's place in its sequence, from 0.
            cache: any pytree; handed from layer to layer through ``attend``.
            attend: attention of new tokens over the cache and themselves.
            tensor_axis: mesh axis that heads and ffn are split over, None without a mesh.

        Returns:
            What the head sees (after the final norm), and the cache.
        """
        with jax.named_scope("embed"):
            x = params.ends["embed"][tokens]
            # Rounded to the activations' dtype first, as the reference implementation does.
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        with jax.named_scope("rope_table"):
            ropes = self._ropes(positions)
        run = partial(self._run_layer, ropes=ropes, attend=attend, tensor_axis=tensor_axis)
        if isinstance(params.layers, dict):
            windows = jnp.asarray(self.config.windows, jnp.int32)
            numbers = jnp.arange(len(self.config.windows), dtype=jnp.int32)
            (x, cache), _ = jax.lax.scan(
                lambda carry, layer: (run(*carry, *layer), None),
                (x, cache),
                (params.layers, numbers, windows),
            )
        else:
            for number, weights in enumerate(params.layers):
                x, cache = run(x, cache, weights, number, self.config.windows[number])
        with jax.named_scope("final_norm"):
            config, weight = self.config, params.ends["final_norm"]
            x = rms_norm(x, weight, eps=config.rms_eps, offset=config.norm_offset)
        return x, cache

    def head_weight(self, params: Params) -> Float[Array, "V D"]:
        """Returns the matrix that turns hidden states into logits: the embedding when tied."""
        return params.ends["embed" if self.config.tie_embeddings else "head"]

    def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns one float32 logit per token of the vocabulary, from what ``forward`` returned."""
        return self.partial_logits(self.head_weight(params), hidden)

    def partial_logits(
        self, rows: Float[Array, "X D"], hidden: Float[Array, "*B D"]
    ) -> Float[Array, "*B X"]:
        """Returns the float32 logits of some tokens, given their rows of ``head_weight``."""
        with jax.named_scope("head"):
            logits = project(hidden, rows, dtype=jnp.dtype(jnp.float32))
            return softcap(logits, self.config.logit_softcap)

    def target_logits(
        self, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
    ) -> Float[Array, " T"]:
        """Returns one float32 logit per place: that of its own target token."""
        rows = self.head_weight(params)[targets]
        logits = jnp.einsum("TD,TD->T", hidden, rows, preferred_element_type=jnp.float32)
        return softcap(logits, self.config.logit_softcap)

    def _ropes(self, positions: Int[Array, "B T"]) -> Float[Array, "bases 2 B T half"]:
        """One table per rope base: that of the global layers, then that of the local ones."""
        config = self.config
        frequencies = [rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)]
        if config.local_rope_theta is not None:
            frequencies.append(rope_frequencies(config.head_dim, config.local_rope_theta, None))
        return jnp.stack([rope_table(positions, pairs) for pairs in frequencies])

    def _run_layer(
        self,
        x: Float[Array, "B T D"],
        cache: Any,
        weights: dict[str, Array],
        number: Any,
        window: Any,
        *,
        ropes: Float[Array, "bases 2 B T half"],
        attend: Attend,
        tensor_axis: str | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        layer = nnx.merge(
            self._layer_graph, nnx.State({name: nnx.Param(w) for name, w in weights.items()})
        )

        def attend_here(cache: Any, q: Array, k: Array, v: Array) -> tuple[Any, Any]:
            return attend(cache, number, q, k, v, window)

        rope = ropes[self._rope_base(window)]
        return layer(x, rope, cache, attend_here, tensor_axis)

    def _rope_base(self, window: Any) -> Any:
        """Which table of ``_ropes`` a layer with this window uses."""
        if self.config.local_rope_theta is None:
            return 0
        return int(window > 0) if isinstance(window, int) else jnp.int32(window > 0)


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


def _weights(module: nnx.Module) -> dict[str, Any]:
    return dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _logical_axes(module: nnx.Module) -> dict[str, Axes]:
    params = nnx.state(module, nnx.Param)
    return {name: param.get_metadata("logical_axes") for name, param in params.items()}
