"""The gated feed-forward: two products, and what stands between them.

The first product has several times as many answers as its input has numbers. ``native`` leaves them
in the cache: a thread computes some, gates them, and rounds them as the second product wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import native
from pallas_kernels.quantized_matmul.matrix import Matrix, in_order
from pallas_kernels.quantized_matmul.native import decline, operands
from pallas_kernels.quantized_matmul.reference import (
    quantized_matmul_reference,
    quantized_matmul_xla,
)

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
"""In the order of ``Activation`` in kernel.h."""


def gated(gate_up: Float[Array, "*B two_F"], activation: Activation) -> Float[Array, "*B F"]:
    """Activates the first half of the channels and multiplies by the second half, in float32."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    gate = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return (gate * up).astype(gate_up.dtype)


def feed_forward_by(
    product: Callable[..., Array],
    x: Float[Array, "*B I"],
    gate_up: Matrix,
    down: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    activation: Activation,
    narrow: bool,
) -> Float[Array, "*B O"]:
    """Computes ``feed_forward`` with two products; what comes of each has the dtype of ``x``."""
    product = partial(product, layer=layer, dtype=jnp.dtype(x.dtype), narrow=narrow)
    hidden = gated(product(x, gate_up), activation)
    return product(*in_order(hidden, down, layer))


def feed_forward_reference(
    x: Float[Array, "*B I"],
    gate_up: Matrix,
    down: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    activation: Activation,
    narrow: bool,
) -> Float[Array, "*B O"]:
    """Computes ``feed_forward`` in float32 throughout."""
    options = {"layer": layer, "activation": activation, "narrow": narrow}
    wide = x.astype(jnp.float32)
    out = feed_forward_by(quantized_matmul_reference, wide, gate_up, down, **options)
    return out.astype(x.dtype)


def feed_forward_native(
    x: Float[Array, "*B I"],
    gate_up: Matrix,
    down: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    activation: Activation,
    narrow: bool,
) -> Float[Array, "*B O"]:
    """Computes ``feed_forward`` in one call.

    Products are those of ``quantized_matmul_native``. Numbers between them are rounded once, as the
    second product reads its input, and not to the dtype of ``x`` before. A number of the answer has
    the same bits alone, beside any other rows and on any number of threads.
    """
    rows = math.prod(x.shape[:-1])
    hidden = jax.ShapeDtypeStruct((rows, down.shape[-1]), jnp.float32)
    decline(x, gate_up, x.dtype)
    decline(hidden, down, x.dtype)
    if layer is None:
        gate_up, down = gate_up[None], down[None]
    (out,) = native.call(
        "jaxserve_feed_forward",
        [jax.ShapeDtypeStruct((rows, down.shape[-2]), x.dtype)],
        x.reshape(rows, x.shape[-1]),
        *operands(gate_up),
        *operands(down),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        activation=np.int32(ACTIVATIONS.index(activation)),
        narrow=np.bool_(narrow),
    )
    return out.reshape(*x.shape[:-1], -1)


BY_PRODUCTS = {
    "xla": partial(feed_forward_by, quantized_matmul_xla),
    "reference": feed_forward_reference,
}
"""Implementations of two calls, by name."""
