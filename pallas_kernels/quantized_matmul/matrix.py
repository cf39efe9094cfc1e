"""Matrices as they are stored: plain numbers, or numbers of few bits with a scale a group.

``Quantized`` is what a product takes in place of an array. Its arrays have the axes of the matrix
that they stand for, the last one shortened, so that what is said of the matrix's axes (sharding,
stacking, slicing of rows) is said of each of them. ``formats.py`` has the formats' names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.formats import (
    FP8_SCALE_DTYPE,
    GROUP,
    MAX_FP8,
    MAX_INT4,
    MAX_INT8,
    SCALE_DTYPE,
    Format,
    Kind,
    Spec,
    spec,
)

type Leaf = Any
"""An array, or what stands for one: jax rebuilds the dataclass around whatever a tree function
returns (shapes, specs, shardings), and a check of the field would refuse those."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix ``[..., O, I]`` in equal groups along its last axis.

    How many values a group has follows from the shapes: ``I`` divided by the scales of a row.

    int8: ``values`` int8 ``[..., O, I]``; a value stands for ``scale * value``.
    int4: ``values`` uint8 ``[..., O, I / 2]``, in every 32 columns byte ``j`` of 16 with value
    ``j`` in its lower half and ``j + 16`` in its upper, however many columns share a scale; a value
    of 0 to 15 stands for ``scale * value + minimum``. For groups of 32 that is the order of GGUF's
    Q4_0 and Q4_1. Groups are multiples of 32.
    fp8: ``values`` float8_e4m3fn ``[..., O, I]``; a value stands for ``scale * value``.
    """

    values: Leaf
    scale: Leaf
    """``[..., O, I / group]``: float16, and float32 for fp8."""
    minimum: Leaf = None
    """As ``scale``; int4 alone has one."""
    order: Leaf = None
    """int32 ``[..., 1, I]``: column ``i`` of the matrix as it is stored is multiplied by entry
    ``order[i]`` of the activations. None: they are in the same order. Axes of the output have one
    entry, and a stack of layers has an order each."""

    @property
    def kind(self) -> Kind:
        """Of its values."""
        if self.minimum is not None:
            return "int4"
        return "int8" if jnp.dtype(self.values.dtype) == jnp.int8 else "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        *rows, stored = self.values.shape
        return (*rows, stored * (1 if self.minimum is None else 2))

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def ndim(self) -> int:
        """Axes of the matrix."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    def reshape(self, *shape: int) -> Quantized:
        """The same numbers with other axes, whose last is whole groups; one of them may be -1."""
        known = -math.prod(shape) if -1 in shape else 1
        sizes = [math.prod(self.shape) // known if size == -1 else size for size in shape]
        order, plain = self.order, replace(self, order=None)
        reshaped = jax.tree.map(lambda array: array.reshape(*sizes[:-1], -1), plain)
        if order is not None:
            order = order.reshape(order.shape[0], *(1,) * (len(sizes) - 2), -1)
        return replace(reshaped, order=order)

    def __getitem__(self, index: Any) -> Quantized:
        """Rows of it: an index of leading axes; of a matrix with an order, of layers alone."""
        return jax.tree.map(lambda array: array[index], self)

    def rows(self, start: Any, count: int) -> Quantized:
        """So many rows of a matrix without an order, from one that may be traced."""
        return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, count), self)

    def stored(self) -> Quantized:
        """The same matrix, laid out as said above; see ``on_gpu.py`` for another way."""
        return self


type Matrix = Array | Quantized
type Numbers = Any
"""An array of numpy or of JAX; the result is of the same."""


def dequantized(matrix: Matrix, dtype: Any) -> Float[Array, ...]:
    """The numbers that a matrix stands for; computed in float32 and rounded once.

    Its columns are in the order that they are stored in.
    """
    if not isinstance(matrix, Quantized):
        return matrix.astype(dtype)
    matrix = matrix.stored()
    values = matrix.values
    *rows, groups = matrix.scale.shape
    if matrix.minimum is not None:
        # Counted, not -1, which a matrix of no rows leaves open.
        pairs = values.reshape(*rows, values.shape[-1] * 2 // GROUP, GROUP // 2)
        values = jnp.concatenate([pairs & 15, pairs >> 4], axis=-1)
    grouped = values.reshape(*rows, groups, matrix.group)
    out = grouped.astype(jnp.float32) * matrix.scale.astype(jnp.float32)[..., None]
    if matrix.minimum is not None:
        out = out + matrix.minimum.astype(jnp.float32)[..., None]
    return out.reshape(matrix.shape).astype(dtype)


def in_order(
    x: Float[Array, "*B I"], matrix: Matrix, layer: Any = None
) -> tuple[Float[Array, "*B I"], Matrix]:
    """Activations in the order of a matrix's columns, and the matrix without an order."""
    if not isinstance(matrix, Quantized) or matrix.order is None:
        return x, matrix
    order = matrix.order
    if layer is not None:
        order = jax.lax.dynamic_index_in_dim(order, layer, keepdims=False)
    taken = jnp.take(x, order.reshape(-1), axis=-1, mode="clip")
    return taken, replace(matrix, order=None)


def quantized(matrix: np.ndarray, format: Format) -> Quantized:
    """Rounds a matrix, group by group, to the nearest numbers that the format has there.

    Raises:
        ValueError: The last axis is no whole groups, a number is not finite, a group's scale or
            minimum is beyond float16, or the format has an order.
    """
    its = _unordered(format)
    round_to = {"int8": _rounded_int8, "int4": _rounded_int4, "fp8": _rounded_fp8}[its.kind]
    return round_to(matrix, _grouped(matrix, its.group))


def _unordered(format: Format) -> Spec:
    its = spec(format)
    if its.ordered:
        raise ValueError(f"{format} is read from checkpoints; nothing is rounded to it")
    return its


def _rounded_int8(matrix: np.ndarray, grouped: np.ndarray) -> Quantized:
    """Rounds to the nearest of 255 numbers a group; the largest of a group is exact to float16."""
    (most,) = _finite(np.abs(grouped).max(axis=-1))
    scale = _within_scale_dtype(most / MAX_INT8, "scale", "int8")
    factor = scale.astype(np.float32)[..., None]
    values = np.divide(grouped, factor, out=np.zeros_like(grouped), where=factor != 0)
    values = np.clip(np.rint(values), -MAX_INT8, MAX_INT8).astype(np.int8)
    return Quantized(values.reshape(matrix.shape), scale)


def _rounded_int4(matrix: np.ndarray, grouped: np.ndarray) -> Quantized:
    """Rounds to the nearest of 16 numbers a group, evenly spread from its least to its largest."""
    least, most = _finite(grouped.min(axis=-1), grouped.max(axis=-1))
    with np.errstate(over="ignore"):  # Refused in the next line.
        spread = (most - least) / MAX_INT4
    scale = _within_scale_dtype(spread, "scale", "int4")
    minimum = _within_scale_dtype(least, "minimum", "int4")
    factor = scale.astype(np.float32)[..., None]
    shifted = grouped - minimum.astype(np.float32)[..., None]
    values = np.divide(shifted, factor, out=np.zeros_like(grouped), where=factor != 0)
    values = np.clip(np.rint(values), 0, MAX_INT4).astype(np.uint8)
    return Quantized(packed_int4(values.reshape(matrix.shape)), scale, minimum)


def _rounded_fp8(matrix: np.ndarray, grouped: np.ndarray) -> Quantized:
    """Rounds to the nearest float of 8 bits; the largest of a group becomes the largest of them."""
    (most,) = _finite(np.abs(grouped).max(axis=-1))
    scale = (most / np.float32(MAX_FP8)).astype(FP8_SCALE_DTYPE)
    factor = scale[..., None]
    values = np.divide(grouped, factor, out=np.zeros_like(grouped), where=factor != 0)
    values = np.clip(values, -MAX_FP8, MAX_FP8).astype(jnp.float8_e4m3fn)
    return Quantized(values.reshape(matrix.shape), scale)


def quantized_on_device(matrix: Array, format: Format) -> Quantized:
    """As ``quantized``, of an array that may be traced; what is not finite is not refused."""
    its = _unordered(format)
    grouped = _grouped(matrix, its.group)
    least = None
    if its.kind == "int4":
        least, bounds = grouped.min(axis=-1), (0, MAX_INT4)
        spread = (grouped.max(axis=-1) - least) / MAX_INT4
        least = least.astype(SCALE_DTYPE)
        grouped = grouped - least.astype(jnp.float32)[..., None]
    else:
        largest = MAX_INT8 if its.kind == "int8" else MAX_FP8
        spread, bounds = jnp.abs(grouped).max(axis=-1) / largest, (-largest, largest)
    scale = spread.astype(its.scale_dtype)
    factor = scale.astype(jnp.float32)[..., None]
    values = jnp.where(factor == 0, 0, grouped / jnp.where(factor == 0, 1, factor))
    if its.kind == "fp8":
        values = jnp.clip(values, *bounds).astype(jnp.float8_e4m3fn)
        return Quantized(values.reshape(matrix.shape), scale)
    values = jnp.clip(jnp.rint(values), *bounds).reshape(matrix.shape)
    if least is None:
        return Quantized(values.astype(jnp.int8), scale)
    return Quantized(packed_int4(values.astype(jnp.uint8)), scale, least)


def packed_int4(values: Numbers) -> Numbers:
    """Puts values of 0 to 15, uint8 ``[..., I]``, two to a byte: ``[..., I / 2]``."""
    *rows, depth = values.shape
    grouped = values.reshape(*rows, depth // GROUP, GROUP)
    pairs = grouped[..., : GROUP // 2] | grouped[..., GROUP // 2 :] << 4
    return pairs.reshape(*rows, depth // 2)


def check_activations(x: Array) -> None:
    """Refuses activations of another kind than floats.

    Raises:
        ValueError: They are whole numbers, which answers would be cut to.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"activations are {x.dtype}; give float32, bfloat16 or float16")


def check(matrix: Matrix) -> None:
    """Refuses what is no matrix of any format.

    Raises:
        ValueError: Shapes or dtypes that do not belong together.
    """
    if not isinstance(matrix, Quantized):
        if not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise ValueError(f"the matrix is {matrix.dtype}; give floats, or a Quantized")
        return
    if type(matrix) is not Quantized:
        matrix = cast("Quantized", jax.eval_shape(lambda other: other.stored(), matrix))
    its = Spec(matrix.kind)
    if matrix.values.dtype != its.value_dtype:
        kind = "int4 are uint8" if its.kind == "int4" else "int8 are int8, and of fp8 float8_e4m3fn"
        raise ValueError(f"values of {kind}, got {matrix.values.dtype}")
    *rows, depth = matrix.shape
    scale = matrix.scale
    for name in ("scale", "minimum"):
        array = getattr(matrix, name)
        if array is not None and (array.dtype != its.scale_dtype or array.shape != scale.shape):
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; it must be "
                f"{its.scale_dtype}{list(scale.shape)}"
            )
    groups = scale.shape[-1] if scale.ndim else 0
    whole = groups > 0 and depth % groups == 0
    if [*scale.shape[:-1]] != rows or not whole or (its.kind == "int4" and matrix.group % GROUP):
        unit = f" of a multiple of {GROUP}" if its.kind == "int4" else ""
        raise ValueError(
            f"scales are {list(scale.shape)}, and values {list(matrix.values.shape)} of {its.kind} "
            f"are a matrix {[*rows, depth]}, whose scales are {rows} times a number of equal "
            f"groups{unit}"
        )
    order = matrix.order
    if order is None:
        return
    layers = rows[:-1]  # Of a product's matrix.
    if order.dtype != jnp.int32 or [*order.shape] != [*layers, 1, depth]:
        raise ValueError(
            f"order is {order.dtype}{list(order.shape)}; it must be int32{[*layers, 1, depth]}"
        )


def _finite(*extremes: np.ndarray) -> tuple[np.ndarray, ...]:
    """The extremes of each group, which are not finite where any of its numbers is not."""
    for extreme in extremes:
        if not (finite := np.isfinite(extreme)).all():
            raise ValueError(
                f"the matrix has a number that is {extreme[~finite][0]}, and only finite numbers "
                "can be rounded; correct it, or keep the matrix as it is"
            )
    return extremes


def _within_scale_dtype(numbers: np.ndarray, what: str, kind: Kind) -> np.ndarray:
    """Rounds the numbers of groups to what they are stored in."""
    with np.errstate(over="ignore"):
        rounded = numbers.astype(SCALE_DTYPE)
    if not (finite := np.isfinite(rounded)).all():
        raise ValueError(
            f"a group's {what} would be {numbers[~finite][0]:g} as {kind}, and {SCALE_DTYPE}, "
            f"which it is stored in, ends at {np.finfo(SCALE_DTYPE).max:g}; keep the matrix as it "
            "is"
        )
    return rounded


def _grouped(matrix: Numbers, group: int | None) -> Numbers:
    *rows, depth = matrix.shape
    group = depth if group is None else group
    if depth == 0 or depth % group:
        raise ValueError(
            f"the last axis has {depth} entries, not a multiple of the group of {group}"
        )
    return matrix.astype(np.float32).reshape(*rows, depth // group, group)
