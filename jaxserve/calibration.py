"""Scales of input channels that make a rounded matrix err less on real activations (AWQ).

Lin et al. 2023, "AWQ", section 3.2: a channel whose activations are large is scaled up before its
weights are rounded, and what feeds the channel is scaled down, so that the float model computes the
same. The scale is ``mean|x| ** a``; ``a`` is searched on a grid for the least error of the output.
We search on all tokens' means but a sample of tokens' outputs, and do not clip.

    w_qkv      into the norm before it          w_o      into the rows of its values
    w_gate_up  into the norm before it          w_down   into the rows of up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.layers import project
from jaxserve.models.modules import Layer
from jaxserve.runner.dense import dense_attention
from pallas_kernels.quantized_matmul import (
    Format,
    Products,
    dequantized,
    gated,
    quantized_on_device,
)

EXPONENTS = tuple(step / 10 for step in range(11))
"""Of the grid. 0 scales nothing."""
SAMPLED_TOKENS = 1024
"""Tokens whose outputs are compared. Fewer are quicker and say less."""
SEARCHED = ("w_qkv", "w_o", "w_gate_up", "w_down")
LEAST_MEAN = 1e-4
"""Of a channel's activations, so that one that is never used is not divided by nothing."""


@dataclass(frozen=True)
class Found:
    """What was found for one matrix."""

    weight: str
    exponent: float
    plain_error: float
    """Of the output without scales: the root of its squared error over its square."""
    error: float
    """With them."""
    scale: np.ndarray
    """Of each input channel, with the input axes of the weight."""


class _Watching(Products):
    """How products are computed, which also remembers what the matrices were multiplied by."""

    seen: dict[str, Array]


class _WatchedLayer(Layer):
    """A layer that says what goes into its matrices."""

    def _qkv(self, x: Any, products: Any) -> Any:
        products.seen["w_qkv"] = x
        return super()._qkv(x, products)

    def _ffn(self, x: Any, products: Any) -> Any:
        products.seen["w_gate_up"] = x
        w = self.w_gate_up[...]
        hidden = gated(project(x, w.reshape(-1, w.shape[-1]), products), self.config.activation)
        products.seen["w_down"] = hidden
        return project(hidden, self.w_down[...], products)


class _WatchedModel(Model):
    """A model whose layers run one at a time, over whole sequences."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        config = self.config
        layer = nnx.eval_shape(lambda: _WatchedLayer(config, jnp.float32, jax.random.key(0)))
        self._layer_graph, _ = nnx.split(layer)
        self._attend = dense_attention(config)

    def embedded(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        return params.ends["embed"][tokens] * self.config.embed_scale

    def watch(
        self, x: Float[Array, "B T D"], weights: dict[str, Array], window: Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Runs one layer; also returns what each of its matrices is multiplied by."""
        products = _Watching("auto")
        products.seen = {}

        def attend(
            cache: Any, number: Any, q: Array, k: Array, v: Array, rope: Array, window: Array
        ) -> tuple[Array, Any]:
            out, cache = self._attend(cache, number, q, k, v, rope, window)
            products.seen["w_o"] = out.reshape(*out.shape[:2], -1)
            return out, cache

        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None].repeat(len(x), axis=0)
        out, _ = self._run_layer(
            *(x, (), weights, 0, window),
            ropes=self._ropes(positions),
            attend=attend,
            tensor_axis=None,
            products=products,
        )
        return out, products.seen


def search_scales(
    config: ModelConfig,
    params: Params,
    formats: dict[str, Format],
    tokens: Int[np.ndarray, "B T"],
) -> Iterator[list[Found]]:
    """Searches layer after layer, each on what the float model gives it.

    Args:
        config: of the model.
        params: float32, layers stacked, on one device.
        formats: what the matrices will be rounded to.
        tokens: calibration text, in sequences of equal length.

    Yields:
        What was found for the four matrices of each layer.
    """
    model = _WatchedModel(config)
    watch = jax.jit(model.watch)
    assert isinstance(params.layers, dict)
    x = model.embedded(params, jnp.asarray(tokens, jnp.int32))
    for number, window in enumerate(config.windows):
        weights = {name: stack[number] for name, stack in params.layers.items()}
        x, inputs = watch(x, weights, jnp.int32(window))
        yield [
            _search(name, weights[name], inputs[name], formats[name], config) for name in SEARCHED
        ]


def _search(
    name: str, weight: Array, inputs: Float[Array, "B T I"], format: Format, config: ModelConfig
) -> Found:
    x = inputs.reshape(-1, inputs.shape[-1])
    axes = weight.shape[-2:] if name == "w_o" else weight.shape[-1:]
    mean = np.maximum(np.asarray(jnp.abs(x).mean(axis=0)), LEAST_MEAN).reshape(axes)
    if name == "w_o":  # Queries of a group share the rows of one value.
        grouped = mean.reshape(config.kv_heads, config.group, -1)
        shared = grouped.mean(axis=1, keepdims=True)
        mean = np.broadcast_to(shared, grouped.shape).reshape(axes)
    stride = max(1, len(x) // SAMPLED_TOKENS)
    matrix = weight.reshape(-1, *axes)
    best: tuple[float, float, np.ndarray] | None = None
    plain = 0.0
    for exponent in EXPONENTS:
        scale = mean**exponent
        scale = scale / np.sqrt(scale.max() * scale.min())
        error = float(_error(matrix, x[::stride], jnp.asarray(scale, jnp.float32), format))
        plain = error if exponent == 0 else plain
        if best is None or error < best[0]:
            best = error, exponent, scale
    assert best is not None
    return Found(name, best[1], plain, best[0], best[2].astype(np.float32))


@partial(jax.jit, static_argnames="format")
def _error(
    matrix: Float[Array, "O ..."],
    x: Float[Array, "T I"],
    scale: Float[Array, "*axes"],
    format: Format,
) -> Float[Array, ""]:
    """The error of the output when a matrix is rounded with its input channels scaled."""
    rounded = dequantized(quantized_on_device(matrix * scale[None], format), jnp.float32)
    off = (rounded / scale[None] - matrix).reshape(len(matrix), -1)
    wrong, right = (jnp.square(x @ m.T).sum() for m in (off, matrix.reshape(len(matrix), -1)))
    return jnp.sqrt(wrong / right)


def folded(weights: dict[str, np.ndarray], found: list[Found], *, offset: bool) -> dict[str, Any]:
    """Scales one layer's input channels and what feeds them; the layer computes the same.

    Args:
        weights: of the layer.
        found: the scales.
        offset: norms hold their factor minus one.
    """
    made: dict[str, Any] = {name: np.array(array) for name, array in weights.items()}
    scales = {one.weight: one.scale for one in found}

    def divide_norm(name: str, scale: np.ndarray) -> None:
        shift = 1 if offset else 0
        made[name] = (made[name] + shift) / scale - shift

    for name, scale in scales.items():
        made[name] *= scale
    divide_norm("attn_norm", scales["w_qkv"])
    divide_norm("ffn_norm", scales["w_gate_up"])
    made["w_gate_up"][1] /= scales["w_down"][:, None]
    groups = made["w_qkv"].shape[0]
    of_values = scales["w_o"].reshape(groups, -1, scales["w_o"].shape[-1])[:, 0]
    made["w_qkv"][:, -1] /= of_values[..., None]
    if "b_qkv" in made:
        made["b_qkv"][:, -1] /= of_values
    return made
