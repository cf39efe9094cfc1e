"""All layers over the new tokens of a step, and the model as shapes, axes and random weights.

``Model`` holds a config and the graph of its modules but no array: weights are plain arrays in
``Params``, which the step takes as an argument. It runs inside ``shard_map`` on one shard's arrays;
each layer has two all-reduces. Attention over the cache is handed in, and which weights are loaded
from where is said in the files named after architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import (
    XLA,
    all_reduce,
    project,
    rms_norm,
    rope_frequencies,
    rope_table,
    softcap,
)
from jaxserve.models.layout import choose_layout
from jaxserve.models.modules import INPUT_AXES, Axes, Ends, Layer
from jaxserve.models.stacked import LayerOf, in_rows
from pallas_kernels.quantized_matmul import (
    GROUP,
    Best,
    Format,
    Matrix,
    Products,
    Quantized,
    best_of,
    best_product,
    dequantized,
    has_native_best,
    quantized_on_device,
    spec,
)

Attend = Callable[..., tuple[Any, Any]]
"""``attend(cache, layer, q, k, v, rope, window) -> (out, cache)``.

q ``[B T N H]`` is not scaled yet; k and v ``[B T K H]`` are the new tokens'. Neither q nor k is
rotated: ``rope`` is the table that ``apply_rope`` takes, and who writes keys may rotate as it goes.
``layer`` and
``window`` (0 = global) are traced scalars; when layers are unrolled, ``window`` is an int.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """Every weight of a model; also used for trees of shapes, axes or shardings in their place."""

    ends: dict[str, Any]
    """``embed``, ``final_norm`` and, when it is not tied, ``head``."""
    layers: dict[str, Any] | tuple[dict[str, Any], ...]
    """Stacked: one dict whose leaves have a leading layer axis. Otherwise one dict per layer."""


@dataclass(frozen=True)
class Logits:
    """Float32 logits of one place per row, for this shard's tokens: all, or the best of them.

    A row's best logit has the same bits either way.
    """

    every: Callable[[], Float[Array, "B V"]]
    """All of them. Tokens that the layout added to the vocabulary are among them."""
    best: Callable[[int | Int[Array, ""] | None], Best]
    """The best of the first so many tokens. May cost less than all of them."""
    size: int
    """Tokens of this shard, added ones included."""

    @classmethod
    def of(cls, logits: Float[Array, "B V"]) -> Logits:
        """Logits that are there already."""
        return cls(lambda: logits, partial(best_of, logits), logits.shape[-1])


class Model:
    """A decoder of one configuration: what is computed, without any weights."""

    def __init__(
        self, config: ModelConfig, tensor: int = 1, formats: Mapping[str, Format] | None = None
    ) -> None:
        """Lays the model out.

        Args:
            config: as the checkpoint has it.
            tensor: devices that share one copy of the model.
            formats: of the weights that are stored quantized, by name.
        """
        self.formats: dict[str, Format] = dict(formats or {})
        self.layout = choose_layout(config, tensor, step=self._step())
        self.config = config = self.layout.stretched
        self._ends = nnx.eval_shape(lambda: Ends(config, jnp.float32, jax.random.key(0)))
        self._layer = nnx.eval_shape(lambda: Layer(config, jnp.float32, jax.random.key(0)))
        self._layer_graph, _ = nnx.split(self._layer)

    def init_ends(self, key: Array, dtype: Any) -> dict[str, Matrix]:
        """Returns random weights of the ends."""
        return self._as_held(Ends(self.layout.config, dtype, key))

    def init_layer(self, key: Array, dtype: Any) -> dict[str, Matrix]:
        """Returns random weights of one layer."""
        return self._as_held(Layer(self.layout.config, dtype, key))

    def init_layers(self, keys: Array, dtype: Any) -> dict[str, Matrix]:
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
        ends, layer = _logical_axes(self._ends), _logical_axes(self._layer)
        if stacked:
            layer = {name: ("layer", *axes) for name, axes in layer.items()}
            return Params(self._by_part(ends), self._by_part(layer))
        return Params(self._by_part(ends), (self._by_part(layer),) * self.config.layers)

    def _step(self) -> int:
        """What a device's part of the feed-forward is a multiple of: whole groups of it."""
        if not self.formats:
            return 1
        down = self.formats.get("w_down")
        return GROUP if down is None else spec(down).group or GROUP

    def _by_part(self, axes: dict[str, Axes]) -> dict[str, Any]:
        """The arrays of a quantized weight have the axes of the weight."""

        def parts(name: str, words: Axes) -> Any:
            if name not in self.formats:
                return words
            its = spec(self.formats[name])
            # What is for all of a row is for each device's part of it, whole.
            scale = (*words[:-1], None) if its.group is None else words
            order = (*("layer" if word == "layer" else None for word in words),)
            return Quantized(
                words,
                scale,
                scale if its.kind == "int4" else None,
                order if its.ordered else None,
            )

        return {name: parts(name, words) for name, words in axes.items()}

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Any,
        attend: Attend,
        *,
        tensor_axis: str | None,
        products: Products = XLA,
        activations: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs all layers over new tokens.

        Args:
            params: this shard's weights.
            tokens: ids within the vocabulary; padding may be any of them.
            positions: each token's place in its sequence, from 0.
            cache: any pytree; handed from layer to layer through ``attend``.
            attend: attention of new tokens over the cache and themselves.
            tensor_axis: mesh axis that heads, ffn and vocabulary are split over; None: none is.
            products: how to multiply by the weights.
            activations: dtype of what goes from layer to layer; None: that of the embedding.

        Returns:
            What the head sees (after the final norm), and the cache.
        """
        with jax.named_scope("embed"):
            table = params.ends["embed"]
            if activations is None:
                activations = jnp.float32 if isinstance(table, Quantized) else table.dtype
            x = _embed(table, tokens, tensor_axis, activations)
            # Rounded to the activations' dtype first, as the reference implementation does.
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        with jax.named_scope("rope_table"):
            ropes = self._ropes(positions)
        run = partial(
            self._run_layer,
            ropes=ropes,
            attend=attend,
            tensor_axis=tensor_axis,
            products=products,
        )
        if isinstance(params.layers, dict):
            x, cache = self._loop(run, x, cache, params.layers)
        else:
            # Traced and lowered once for each window: layers differ in their arrays alone.
            run = jax.jit(run, static_argnames="window")
            for number, weights in enumerate(params.layers):
                window = self.config.windows[number]
                x, cache = run(x, cache, weights, np.int32(number), window=window)
        with jax.named_scope("final_norm"):
            config, weight = self.config, params.ends["final_norm"]
            x = rms_norm(x, weight, eps=config.rms_eps, offset=config.norm_offset)
        return x, cache

    def _loop(
        self, run: Callable[..., Any], x: Array, cache: Any, stacks: dict[str, Any]
    ) -> tuple[Array, Any]:
        """Runs stacked layers one after the other; their matrices stay where they are."""
        matrices = {
            name: in_rows(stack, INPUT_AXES.get(name, 1))
            for name, stack in stacks.items()
            if name.startswith("w_")
        }
        vectors = {name: stack for name, stack in stacks.items() if name not in matrices}

        windows = self.config.windows
        window_L = jnp.asarray(windows, jnp.int32)

        # The number of the layer is counted and not read from an array: XLA sees where a matrix
        # begins in its stack only so, and otherwise copies it before it multiplies.
        def turn(carry: tuple[Any, Any, Array], mine: Any) -> tuple[Any, None]:
            x, cache, number = carry
            here = {name: LayerOf(stack, number) for name, stack in matrices.items()}
            window = windows[0] if len(set(windows)) == 1 else window_L[number]
            x, cache = run(x, cache, mine | here, number, window)
            return (x, cache, number + 1), None

        (x, cache, _), _ = jax.lax.scan(turn, (x, cache, jnp.int32(0)), vectors)
        return x, cache

    def head_weight(self, params: Params) -> Matrix:
        """Returns the matrix that turns hidden states into logits: the embedding when tied."""
        return params.ends["embed" if self.config.tie_embeddings else "head"]

    def logits(
        self, params: Params, hidden: Float[Array, "*B D"], *, products: Products = XLA
    ) -> Float[Array, "*B V"]:
        """Returns one float32 logit per token of this shard, from what ``forward`` returned.

        Tokens that the layout added to the vocabulary are among them.
        """
        return self.partial_logits(self.head_weight(params), hidden, products=products)

    def lazy_logits(
        self, params: Params, hidden: Float[Array, "B D"], *, products: Products = XLA
    ) -> Logits:
        """Returns what ``logits`` would, for whoever may need no more than the best of them.

        They are computed at once where that saves nothing: XLA may then choose no other product,
        with other bits, for the best than for all. So they are with a softcap, which makes equals
        of products that are not.
        """
        head = self.head_weight(params)
        if self.config.logit_softcap or not has_native_best(
            hidden, head, implementation=products.implementation
        ):
            return Logits.of(self.logits(params, hidden, products=products))

        def best(count: Any) -> Best:
            with jax.named_scope("head"):
                return best_product(hidden, head, count=count, **products._asdict())

        return Logits(partial(self.logits, params, hidden, products=products), best, head.shape[0])

    def partial_logits(
        self, rows: Matrix, hidden: Float[Array, "*B D"], *, products: Products = XLA
    ) -> Float[Array, "*B X"]:
        """Returns the float32 logits of some tokens, given their rows of ``head_weight``."""
        with jax.named_scope("head"):
            logits = project(hidden, rows, products, dtype=jnp.dtype(jnp.float32))
            return softcap(logits, self.config.logit_softcap)

    def target_logits(
        self, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
    ) -> Float[Array, " T"]:
        """Returns one float32 logit per place: that of its own target, an index in this shard."""
        rows = dequantized(self.head_weight(params)[targets], hidden.dtype)
        logits = jnp.einsum("TD,TD->T", hidden, rows, preferred_element_type=jnp.float32)
        return softcap(logits, self.config.logit_softcap)

    def _as_held(self, module: nnx.Module) -> dict[str, Matrix]:
        """Stretches a module's weights for the mesh, and rounds those that are held quantized."""
        axes = _logical_axes(module)
        weights = nnx.to_pure_dict(nnx.state(module, nnx.Param))

        def held(name: str, array: Array) -> Matrix:
            stretched = self.layout.stretch(array, axes[name])
            if name not in self.formats:
                return stretched
            its = spec(self.formats[name])
            rounded = quantized_on_device(stretched, its._replace(ordered=False).name)
            if not its.ordered:
                return rounded
            # What a product sums over: every axis but the output's.
            inputs = stretched.shape[-INPUT_AXES.get(name, 1) :]
            order = jnp.arange(math.prod(inputs), dtype=jnp.int32)
            shape = (*(1,) * (stretched.ndim - len(inputs)), *inputs)
            return replace(rounded, order=order.reshape(shape))

        return {name: held(name, array) for name, array in weights.items()}

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
        weights: dict[str, Any],
        number: Any,
        window: Any,
        *,
        ropes: Float[Array, "bases 2 B T half"],
        attend: Attend,
        tensor_axis: str | None,
        products: Products,
    ) -> tuple[Float[Array, "B T D"], Any]:
        layer = nnx.merge(
            self._layer_graph, nnx.State({name: nnx.Param(w) for name, w in weights.items()})
        )

        def attend_here(cache: Any, q: Array, k: Array, v: Array, rope: Array) -> tuple[Any, Any]:
            return attend(cache, number, q, k, v, rope, window)

        rope = ropes[self._rope_base(window)]
        return layer(x, rope, cache, attend_here, tensor_axis, products)

    def _rope_base(self, window: Any) -> Any:
        """Which table of ``_ropes`` a layer with this window uses."""
        if self.config.local_rope_theta is None:
            return 0
        return int(window > 0) if isinstance(window, int) else jnp.int32(window > 0)


def _embed(
    table: Matrix, tokens: Int[Array, "B T"], tensor_axis: str | None, dtype: Any
) -> Float[Array, "B T D"]:
    """Looks tokens up; each is in the table of one shard, and the others add zeros to it."""
    if tensor_axis is None:
        return dequantized(table[tokens], dtype)
    size = table.shape[0]
    local = tokens - jax.lax.axis_index(tensor_axis) * size
    here = (local >= 0) & (local < size)
    found = dequantized(table[jnp.clip(local, 0, size - 1)], dtype)
    rows = jnp.where(here[..., None], found, 0)
    return all_reduce(rows, tensor_axis)


def _logical_axes(module: nnx.Module) -> dict[str, Axes]:
    params = nnx.state(module, nnx.Param)
    return {name: param.get_metadata("logical_axes") for name, param in params.items()}
