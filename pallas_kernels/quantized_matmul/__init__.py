"""Products of activations with stored matrices, plain or quantized: the public functions.

``matrix`` owns the formats, ``reference`` the meaning, ``native`` the speed on a CPU and ``mosaic``
that on a GPU, whose layout ``on_gpu`` has; elsewhere XLA multiplies. ``ffn`` puts two of them
around an activation, ``best`` keeps only the best answers. Which weight is stored how, and the
mesh, are the model's business.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import AUTO, dispatch
from pallas_kernels.quantized_matmul import ffn as _ffn
from pallas_kernels.quantized_matmul import matrix as _matrix
from pallas_kernels.quantized_matmul.best import Best, best_of, largest
from pallas_kernels.quantized_matmul.ffn import Activation, gated
from pallas_kernels.quantized_matmul.formats import (
    GROUP,
    Format,
    Kind,
    Spec,
    bytes_per_weight,
    spec,
)
from pallas_kernels.quantized_matmul.matrix import (
    Matrix,
    Quantized,
    dequantized,
    in_order,
    packed_int4,
    quantized,
    quantized_on_device,
)
from pallas_kernels.quantized_matmul.mosaic import best_product_mosaic, quantized_matmul_mosaic
from pallas_kernels.quantized_matmul.native import (
    best_product_native,
    decline,
    quantized_matmul_native,
)
from pallas_kernels.quantized_matmul.on_gpu import OnGpu, for_gpu
from pallas_kernels.quantized_matmul.reference import (
    best_product_reference,
    best_product_xla,
    quantized_matmul_reference,
    quantized_matmul_xla,
)

__all__ = [
    "GROUP",
    "Activation",
    "Best",
    "Format",
    "Kind",
    "Matrix",
    "OnGpu",
    "Products",
    "Quantized",
    "Spec",
    "best_of",
    "best_product",
    "bytes_per_weight",
    "dequantized",
    "feed_forward",
    "for_gpu",
    "gated",
    "has_native_best",
    "largest",
    "packed_int4",
    "quantized",
    "quantized_matmul",
    "quantized_on_device",
    "spec",
]

IMPLEMENTATIONS = {
    "mosaic": quantized_matmul_mosaic,
    "native": quantized_matmul_native,
    "xla": quantized_matmul_xla,
    "reference": quantized_matmul_reference,
}
"""By name, best first."""
BEST_IMPLEMENTATIONS = {
    "mosaic": best_product_mosaic,
    "native": best_product_native,
    "xla": best_product_xla,
    "reference": best_product_reference,
}
"""Likewise, of ``best_product``."""


class Products(NamedTuple):
    """What all products of a model have in common; see the arguments of ``quantized_matmul``."""

    implementation: str = "auto"
    narrow: bool = False


def quantized_matmul(
    x: Float[Array, "*B I"],
    matrix: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: Any = None,
    implementation: str = "auto",
    narrow: bool = False,
) -> Float[Array, "*B O"]:
    """Multiplies activations by a matrix stored ``[O, I]``.

    Args:
        x: Activations.
        matrix: Floats ``[O, I]``, or a ``Quantized`` of that shape; on a GPU best an ``OnGpu``.
        layer: Given, ``matrix`` is a stack ``[L, O, I]`` of which this one is meant; a Python int
            or a traced scalar. One that is not there becomes the nearest.
        dtype: Of the result; that of ``x`` when None.
        implementation: A name in ``IMPLEMENTATIONS``, or ``"auto"`` for the first that accepts.
        narrow: Allows native products to round on the way what float32 would keep, where the CPU is
            faster so. A quantized matrix meets activations of int8, with a float32 scale for each
            of its groups: an error of at most 1/254 of the largest in a group. One of bfloat16
            meets them as bfloat16 (2^-8 of each), or, like one of float16, as float16 with sums of
            a few products in float16 (2^-11; weights below 2^-14 lose digits). All else is float32.
            In Mosaic, a matrix of 8 bits with one scale a row meets activations of its own dtype,
            with a scale for each of their rows; in XLA, one of int8 does.

    Raises:
        ValueError: Shapes or dtypes that no implementation could take.
        ExceptionGroup: Every implementation declined; it holds the reasons.
    """
    _matrix.check_activations(x)
    _matrix.check(matrix)
    axes = 2 if layer is None else 3
    if matrix.ndim != axes or matrix.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"the matrix is {list(matrix.shape)}; with activations {list(x.shape)} it must be "
            f"{'[O, I]' if layer is None else '[L, O, I]'} with I = {x.shape[-1]}"
        )
    with jax.named_scope("matmul"):
        x, matrix = in_order(x, matrix, layer)
        return dispatch(
            "quantized_matmul",
            IMPLEMENTATIONS,
            implementation,
            x,
            matrix,
            layer=layer,
            dtype=jnp.dtype(dtype or x.dtype),
            narrow=narrow,
        )


def best_product(
    x: Float[Array, "B I"],
    matrix: Matrix,
    *,
    count: int | Int[Array, ""] | None = None,
    implementation: str = "auto",
    narrow: bool = False,
) -> Best:
    """Finds the best product of each row of activations with the rows of a matrix ``[O, I]``.

    The same as ``best_of(quantized_matmul(x, matrix, dtype=float32), count)``. The native one has
    the same bits in every finite row, and writes no product to memory.

    Args:
        x: Activations.
        matrix: Floats ``[O, I]``, or a ``Quantized`` of that shape.
        count: Only so many of the matrix's first rows are candidates, 0 to O; a Python int or a
            traced int32 scalar. All when None.
        implementation: A name in ``BEST_IMPLEMENTATIONS``, or ``"auto"`` for the first that
            accepts.
        narrow: See ``quantized_matmul``.

    Raises:
        ValueError: Shapes or dtypes that no implementation could take.
        ExceptionGroup: Every implementation declined; it holds the reasons.
    """
    _matrix.check_activations(x)
    _matrix.check(matrix)
    if matrix.ndim != 2 or matrix.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"the matrix is {list(matrix.shape)}; with activations {list(x.shape)} it must be "
            f"[O, I] with I = {x.shape[-1]}"
        )
    with jax.named_scope("matmul"):
        x, matrix = in_order(x, matrix)
        return dispatch(
            "best_product",
            BEST_IMPLEMENTATIONS,
            implementation,
            x,
            matrix,
            count=count,
            narrow=narrow,
        )


def has_native_best(
    x: Float[Array, "B I"], matrix: Matrix, *, implementation: str = "auto"
) -> bool:
    """Whether ``best_product`` would be native, with memory for the best products alone."""
    if implementation not in (AUTO, "native"):
        return False
    if isinstance(matrix, Quantized):
        matrix = replace(matrix, order=None)  # Which is applied to the activations before.
    try:
        decline(x, matrix, jnp.dtype(jnp.float32))
    except NotImplementedError:
        return False
    return True


def feed_forward(
    x: Float[Array, "*B I"],
    gate_up: Matrix,
    down: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    activation: Activation,
    implementation: str = "auto",
    narrow: bool = False,
) -> Float[Array, "*B O"]:
    """Computes ``down (activation(gate x) * up x)`` (Shazeer 2020, SwiGLU and GEGLU).

    Args:
        x: Activations; the result has their dtype.
        gate_up: ``[2 F, I]``: the gate's rows, then those of what it gates. Stored as for
            ``quantized_matmul``.
        down: ``[O, F]``, stored likewise, in any other format.
        layer: As for ``quantized_matmul``, of both.
        activation: Of the gate.
        implementation: A name in ``FEED_FORWARDS``, or ``"auto"`` for the first that accepts:
            ``native``, or else ``parts``.
        narrow: As for ``quantized_matmul``, in both products.

    Raises:
        ValueError: Shapes or dtypes that no implementation could take.
        ExceptionGroup: The implementation declined; it holds the reason.
    """
    _matrix.check_activations(x)
    axes = 2 if layer is None else 3
    for matrix in (gate_up, down):
        _matrix.check(matrix)
    if not (
        gate_up.ndim == down.ndim == axes
        and gate_up.shape[-1] == x.shape[-1]
        and gate_up.shape[-2] == 2 * down.shape[-1]
    ):
        raise ValueError(
            f"the matrices are {list(gate_up.shape)} and {list(down.shape)}; with activations "
            f"{list(x.shape)} they must be {'[2 F, I]' if layer is None else '[L, 2 F, I]'} and "
            f"{'[O, F]' if layer is None else '[L, O, F]'} with I = {x.shape[-1]}"
        )
    with jax.named_scope("feed_forward"):
        x, gate_up = in_order(x, gate_up, layer)
        return dispatch(
            "feed_forward",
            FEED_FORWARDS,
            implementation,
            x,
            gate_up,
            down,
            layer=layer,
            activation=activation,
            narrow=narrow,
        )


FEED_FORWARDS = {
    "native": _ffn.feed_forward_native,
    "parts": partial(_ffn.feed_forward_by, quantized_matmul),
    **_ffn.BY_PRODUCTS,
}
"""By name, best first; ``parts`` leaves each product to the first implementation that takes it."""
