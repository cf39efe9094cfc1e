"""The arithmetic that layers of every architecture share, as plain functions.

Weights come in as arrays; which weights a layer has is said in ``decoder.py``. Norms, angles and
activations are computed in float32, products accumulate in float32, and each result is cast back
to the dtype of the activations once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.models.config import Activation, RopeScaling
from jaxserve.models.stacked import LayerOf
from pallas_kernels.quantized_matmul import Matrix, Products, quantized_matmul
from pallas_kernels.quantized_matmul import feed_forward as quantized_feed_forward

XLA = Products("xla")
"""Products anywhere, where nothing better is known."""


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float, offset: bool
) -> Float[Array, "*B D"]:
    """Divides by the root mean square and multiplies by a weight per channel.

    Args:
        x: activations.
        weight: the factor, or the factor minus one when ``offset``.
        eps: added to the mean square.
        offset: see ``weight``.
    """
    wide = x.astype(jnp.float32)
    factor = weight.astype(jnp.float32) + (1.0 if offset else 0.0)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * jnp.expand_dims(factor, tuple(range(x.ndim - 1)))).astype(x.dtype)


def project(
    x: Float[Array, "*B I"],
    weight: Matrix | LayerOf,
    products: Products = XLA,
    *,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*B O"]:
    """Multiplies by a matrix stored ``[out, in]``.

    Args:
        x: activations.
        weight: the matrix.
        products: how; see ``quantized_matmul``.
        dtype: of the result; that of ``x`` when None.
    """
    options = {"dtype": dtype, **products._asdict()}
    if isinstance(weight, LayerOf):
        return quantized_matmul(x, weight.stack, layer=weight.number, **options)
    return quantized_matmul(x, weight, **options)


def feed_forward(
    x: Float[Array, "*B I"],
    gate_up: Matrix | LayerOf,
    down: Matrix | LayerOf,
    activation: Activation,
    products: Products = XLA,
) -> Float[Array, "*B O"]:
    """Multiplies by a matrix, activates half of what comes of it, multiplies that by the other half
    and all by a second matrix.

    Args:
        x: activations.
        gate_up: ``[2 F, I]``; the first half of its rows is what is activated.
        down: ``[O, F]``, of the same layer.
        activation: which.
        products: how; see ``quantized_matmul``.
    """
    options = {"activation": activation, **products._asdict()}
    if isinstance(gate_up, LayerOf):
        assert isinstance(down, LayerOf)
        assert down.number is gate_up.number
        stacks = (gate_up.stack, down.stack)
        return quantized_feed_forward(x, *stacks, layer=gate_up.number, **options)
    assert not isinstance(down, LayerOf)
    return quantized_feed_forward(x, gate_up, down, **options)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns radians per position for each rotated pair, as float32 ``[H / 2]``."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequencies /= scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        frequencies = _llama3_scaled(frequencies, scaling)
    return frequencies.astype(np.float32)


def _llama3_scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slows the pairs that turn slowly, as the Llama 3.1 release does.

    Pairs with more than ``high_freq_factor`` turns in the original context keep their frequency,
    those with fewer than ``low_freq_factor`` are divided by ``factor``, and those between are
    interpolated by their number of turns.
    """
    turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_table(positions: Int[Array, "B T"], frequencies: np.ndarray) -> Float[Array, "2 B T half"]:
    """Returns the cosine and sine of every angle, in float32.

    A position is an integer and exact in float32 up to 2**24, and each angle is rounded once: its
    error is at most 2**-24 of it, the same as the reference implementations have. In bfloat16 the
    positions themselves would collide from 256 on, so the dtype does not follow the activations.
    """
    pairs = jnp.asarray(frequencies, jnp.float32)[None, None, :]
    angles = positions.astype(jnp.float32)[:, :, None] * pairs
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def softcap(x: Float[Array, "*B V"], cap: float) -> Float[Array, "*B V"]:
    """Bends values smoothly into (-cap, cap); a cap of 0 leaves them alone."""
    return cap * jnp.tanh(x / cap) if cap else x


def all_reduce(x: Float[Array, "*B D"], tensor_axis: str | None) -> Float[Array, "*B D"]:
    """Sums over the shards of a row-parallel product; nothing to do without a mesh axis.

    The sum is of rounded products, in the activations' dtype: half the bytes of float32.
    """
    return x if tensor_axis is None else jax.lax.psum(x, tensor_axis)
