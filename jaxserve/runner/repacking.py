"""A model's quantized weights as the kernel for Hopper GPUs reads them, and the way back.

A repacked weight keeps all its axes, so that what is said of them (sharding, padding) stays true;
in its scales those that a product sums over come before those of the output, as in ``OnGpu``.
``stacked.in_rows`` makes matrices of both within programs, which moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxserve.models.decoder import Model, Params
from jaxserve.models.modules import INPUT_AXES
from pallas_kernels.quantized_matmul import OnGpu, Quantized
from pallas_kernels.quantized_matmul.on_gpu import SIGNS

type Axes = tuple[int, ...]
"""In which order scales of a repacked weight have the axes that it was loaded with."""


def repacked_shapes(model: Model, abstract: Params) -> Params:
    """Returns the shapes of repacked weights, given those of loaded ones."""

    def shape(axes: Axes, weight: Quantized) -> OnGpu:
        parts = (weight.values, weight.scale, weight.minimum)
        values, scale, minimum = jax.eval_shape(partial(_repacked, axes), *parts)
        return OnGpu(values, scale, minimum, weight.order)

    return _each(model, shape, abstract, abstract)


def repacked_specs(model: Model, abstract: Params, specs: Params) -> Params:
    """Returns where repacked weights live.

    Args:
        model: whose weights they are.
        abstract: shapes of loaded ones.
        specs: a ``PartitionSpec`` for each of their arrays.
    """

    def spec(axes: Axes, its: Quantized) -> OnGpu:
        def turned(spec: PartitionSpec) -> PartitionSpec:
            return PartitionSpec(*(spec[axis] for axis in axes))

        minimum = None if its.minimum is None else turned(its.minimum)
        return OnGpu(its.values, turned(its.scale), minimum, its.order)

    return _each(model, spec, abstract, specs)


def repack(model: Model, params: Params, shardings: Params) -> Params:
    """Repacks loaded weights where they are, one after the other.

    Args:
        model: whose weights they are.
        params: stacked, on their devices. Arrays that are repacked are deleted.
        shardings: of the result.
    """

    def made(axes: Axes, to: OnGpu, weight: Quantized) -> OnGpu:
        # Values are written over. Scales, which are few, are there twice for a moment.
        places = (to.values, to.scale, to.minimum)
        program = jax.jit(partial(_repacked, axes), donate_argnums=0, out_shardings=places)
        values, scale, minimum = program(weight.values, weight.scale, weight.minimum)
        for array in (weight.scale, weight.minimum):
            if array is not None:
                array.delete()
        return OnGpu(values, scale, minimum, weight.order)

    return _each(model, made, params, shardings, params)


def unpacked(model: Model, params: Params) -> Params:
    """Returns weights as they were loaded; those that were repacked are copied to the host."""

    def stored(axes: Axes, weight: Quantized) -> Quantized:
        if not isinstance(weight, OnGpu):
            return weight
        arrays = (weight.values, weight.scale, weight.minimum)
        back = (*map(int, np.argsort(axes)),)
        here = [None if array is None else np.asarray(array) for array in arrays]
        return Quantized(*_repacked(back, *here), weight.order)

    return _each(model, stored, params, params)


def _repacked(axes: Axes, values: Any, scale: Any, minimum: Any) -> tuple[Any, Any, Any]:
    """A weight's arrays with their scales turned; the way there and, with those axes, back."""
    if minimum is None:
        return values, scale.transpose(axes), None
    return values ^ SIGNS, scale.transpose(axes), minimum.transpose(axes)


def _each(model: Model, change: Callable[..., Any], weights: Params, *trees: Params) -> Params:
    """Changes what the kernel reads: the layers' quantized matrices, and what logits come of.

    Experts' have a kernel of their own, and rows of the embedding are looked up.

    Args:
        model: whose weights they are.
        change: given the axes, and what stands for the weight in each of the trees.
        weights: stacked; or their shapes.
        trees: of which the last has what the result does for other weights.
    """
    config = model.config
    experts = ("w_gate_up", "w_down") if config.experts else ()
    head = "embed" if config.tie_embeddings else "head"

    def part(layer_axes: int, weights: Any, *parts: Any) -> dict[str, Any]:
        changed = dict(parts[-1])
        for name, weight in weights.items():
            is_read = name == head or (name.startswith("w_") and name not in experts)
            if is_read and isinstance(weight, Quantized):
                inputs = weight.ndim - INPUT_AXES.get(name, 1)
                axes = range(weight.ndim)
                turned = (*axes[:layer_axes], *axes[inputs:], *axes[layer_axes:inputs])
                changed[name] = change(turned, *(its[name] for its in parts))
        return changed

    return Params(
        part(0, weights.ends, *(tree.ends for tree in trees)),
        part(1, weights.layers, *(tree.layers for tree in trees)),
    )
