"""Matrices as they are stored: plain numbers, or whole numbers of few bits with a scale a group.

``Quantized`` is what a product takes in place of an array. Its arrays have the axes of the matrix
that they stand for, the last one shortened, so that what is said of the matrix's axes (sharding,
stacking, slicing of rows) is said of each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

GROUP = 32
"""Values along the last axis that share a scale, as in GGUF's blocks."""
SCALE_DTYPE = np.dtype(np.float16)
MAX_INT8 = 127
MAX_INT4 = 15

type Leaf = Any
"""An array, or what stands for one: jax rebuilds the dataclass around whatever a tree function
returns (shapes, specs, shardings), and a check of the field would refuse those."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix ``[..., O, I]`` in groups of 32 along its last axis.

    int8: ``values`` int8 ``[..., O, I]``; a value stands for ``scale * value``.
    int4: ``values`` uint8 ``[..., O, I / 2]``, byte ``j`` of a group's 16 with value ``j`` in its
    lower half and ``j + 16`` in its upper; a value of 0 to 15 stands for
    ``scale * value + minimum``. That is the order of GGUF's Q4_0 and Q4_1.
    """

    values: Leaf
    scale: Leaf
    """float16 ``[..., O, I / 32]``."""
    minimum: Leaf = None
    """As ``scale``; int8 has none."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return (*self.scale.shape[:-1], self.scale.shape[-1] * GROUP)

    @property
    def ndim(self) -> int:
        """Axes of the matrix."""
        return self.scale.ndim

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    def reshape(self, *shape: int) -> Quantized:
        """The same numbers with other axes, whose last is whole groups; one of them may be -1."""
        known = -math.prod(shape) if -1 in shape else 1
        sizes = [math.prod(self.shape) // known if size == -1 else size for size in shape]
        return jax.tree.map(lambda array: array.reshape(*sizes[:-1], -1), self)

    def __getitem__(self, index: Any) -> Quantized:
        """Rows of it: an index of leading axes."""
        return jax.tree.map(lambda array: array[index], self)


type Matrix = Array | Quantized
type Numbers = Any
"""An array of numpy or of JAX; the result is of the same."""
type Format = Literal["int8", "int4"]


def bytes_per_weight(format: Format) -> float:
    """Of one value, with its share of the group's scale and minimum."""
    shared = SCALE_DTYPE.itemsize / GROUP
    return 1 + shared if format == "int8" else 1 / 2 + 2 * shared


def dequantized(matrix: Matrix, dtype: Any) -> Float[Array, ...]:
    """The numbers that a matrix stands for; computed in float32 and rounded once."""
    if not isinstance(matrix, Quantized):
        return matrix.astype(dtype)
    values = matrix.values
    *rows, groups = matrix.scale.shape
    if matrix.minimum is None:
        grouped = values.reshape(*rows, groups, GROUP)
    else:
        pairs = values.reshape(*rows, groups, GROUP // 2)
        grouped = jnp.concatenate([pairs & 15, pairs >> 4], axis=-1)
    out = grouped.astype(jnp.float32) * matrix.scale.astype(jnp.float32)[..., None]
    if matrix.minimum is not None:
        out = out + matrix.minimum.astype(jnp.float32)[..., None]
    return out.reshape(matrix.shape).astype(dtype)


def quantized(matrix: np.ndarray, format: Format) -> Quantized:
    """Rounds a matrix, group by group, to the nearest numbers that the format has there.

    Raises:
        ValueError: The last axis is no whole groups, a number is not finite, or a group's scale or
            minimum is beyond float16.
    """
    return _rounded_int8(matrix) if format == "int8" else _rounded_int4(matrix)


def _rounded_int8(matrix: np.ndarray) -> Quantized:
    """Rounds to the nearest of 255 numbers a group; the largest of a group is exact to float16."""
    grouped = _grouped(matrix)
    (most,) = _finite(np.abs(grouped).max(axis=-1))
    scale = _within_scale_dtype(most / MAX_INT8, "scale", "int8")
    factor = scale.astype(np.float32)[..., None]
    values = np.divide(grouped, factor, out=np.zeros_like(grouped), where=factor != 0)
    values = np.clip(np.rint(values), -MAX_INT8, MAX_INT8).astype(np.int8)
    return Quantized(values.reshape(matrix.shape), scale)


def _rounded_int4(matrix: np.ndarray) -> Quantized:
    """Rounds to the nearest of 16 numbers a group, evenly spread from its least to its largest."""
    grouped = _grouped(matrix)
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


def quantized_on_device(matrix: Array, format: Format) -> Quantized:
    """As ``quantized``, of an array that may be traced; what is not finite is not refused."""
    grouped = _grouped(matrix)
    if format == "int8":
        spread, least, bounds = (
            jnp.abs(grouped).max(axis=-1) / MAX_INT8,
            None,
            (-MAX_INT8, MAX_INT8),
        )
    else:
        least, bounds = grouped.min(axis=-1), (0, MAX_INT4)
        spread = (grouped.max(axis=-1) - least) / MAX_INT4
        least = least.astype(SCALE_DTYPE)
        grouped = grouped - least.astype(jnp.float32)[..., None]
    scale = spread.astype(SCALE_DTYPE)
    factor = scale.astype(jnp.float32)[..., None]
    values = jnp.where(factor == 0, 0, grouped / jnp.where(factor == 0, 1, factor))
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


def check(matrix: Matrix) -> None:
    """Refuses what is no matrix of any format.

    Raises:
        ValueError: Shapes or dtypes that do not belong together.
    """
    if not isinstance(matrix, Quantized):
        if not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise ValueError(f"the matrix is {matrix.dtype}; give floats, or a Quantized")
        return
    values, scale = matrix.values, matrix.scale
    expected = jnp.int8 if matrix.minimum is None else jnp.uint8
    if values.dtype != expected:
        kind = "int8" if matrix.minimum is None else "int4"
        raise ValueError(f"values of {kind} are {jnp.dtype(expected).name}, got {values.dtype}")
    for field in fields(matrix)[1:]:
        array = getattr(matrix, field.name)
        if array is not None and (array.dtype != SCALE_DTYPE or array.shape != scale.shape):
            raise ValueError(
                f"{field.name} is {array.dtype}{list(array.shape)}; it must be "
                f"{SCALE_DTYPE}{list(scale.shape)}"
            )
    stored = matrix.shape[-1] // (1 if matrix.minimum is None else 2)
    if values.shape != (*matrix.shape[:-1], stored):
        raise ValueError(
            f"values are {list(values.shape)} and scales {list(scale.shape)}, which belong to a "
            f"matrix {list(matrix.shape)} of values {[*matrix.shape[:-1], stored]}"
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


def _within_scale_dtype(numbers: np.ndarray, what: str, format: Format) -> np.ndarray:
    """Rounds the numbers of groups to what they are stored in."""
    with np.errstate(over="ignore"):
        rounded = numbers.astype(SCALE_DTYPE)
    if not (finite := np.isfinite(rounded)).all():
        raise ValueError(
            f"a group's {what} would be {numbers[~finite][0]:g} as {format}, and {SCALE_DTYPE}, "
            f"which it is stored in, ends at {np.finfo(SCALE_DTYPE).max:g}; keep the matrix as it "
            "is"
        )
    return rounded


def _grouped(matrix: Numbers) -> Numbers:
    if matrix.shape[-1] % GROUP:
        raise ValueError(
            f"the last axis has {matrix.shape[-1]} entries, not a multiple of the group of {GROUP}"
        )
    *rows, depth = matrix.shape
    return matrix.astype(np.float32).reshape(*rows, depth // GROUP, GROUP)
