"""Keys and values of 8 and 4 bits: numbers with one scale for each token and head.

    name   stored as      a number is               scale of a token and head
    int8   int8           -127 to 127               largest size / 127
    fp8    float8_e4m3fn  as the format has them    largest size / 448
    int4   uint8, two     -8 to 7                   the number of largest size / -8, so that it
           numbers each                             becomes -8; of either sign

A number stands for itself times the scale, which is bfloat16; numbers are divided by the scale as
it is stored, so that its own rounding costs nothing but a step up to 0.4 % wider or narrower.
Float32 scales would take two more bytes for each token and head (3 % of an int8 pool at head_dim
64) and bound the error by the same half step; float16 ones end at 6e-5 and 65,504.

Byte ``j`` of a cell of int4 holds number ``2 j`` in its low four bits and ``2 j + 1`` in its high
ones, as two's complements: what ``lax.bitcast_convert_type`` to int4 gives. A token's head is whole
bytes, so that no byte belongs to two tokens.

Keys of int8 and int4, and values of int4, are those of the rotated vector: before rounding,
``rotate`` multiplies them by an orthonormal Walsh-Hadamard matrix, which spreads the few channels
that are large in every token over all of them. Where keys are rotated it multiplies queries, too,
and scores are as before; where values are, answers, since the matrix is its own inverse. This is
done in this package's public functions: implementations see rotated numbers only.

Chosen on SmolLM2-135M, 3,072 tokens of real text, by the divergence of the next token's
distribution from that of float32 pages (mean, nats), keys and values alike unless said:

    int8                                  0.0008    bytes for a token and head of 64: 66
    int8, rotated                         0.0003    66
    fp8                                   0.0051    66    (0.0074 without scales)
    int4, rotated, as above               0.054     34
    int4, rotated, with a minimum         0.051     36
    int4, rotated, the same, groups of 32 0.040     40
    int4, rotated, groups of 32           0.048     36
    int4, not rotated                     0.210     34    (0.116 with a minimum)
    int4, not rotated, a minimum, by 32   0.054     40
    int4, keys by channel over 32 tokens  0.022     38    (not rotated, a minimum)

Channels over tokens need all tokens of a group before the first can be rounded: what a page held
would depend on how its tokens came, and answers would depend on chunks and neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Shaped

from pallas_kernels.target import target

SCALE_DTYPE = np.dtype(jnp.bfloat16)
LEAST = 1e-30
"""A token none of whose numbers is as large is zeros, and a scale never below float32's normals,
which some processors take for zero and others do not. append.cc has the same number."""


@dataclass(frozen=True)
class Format:
    """How numbers with scales are held."""

    name: str
    """What people call it."""
    dtype: np.dtype
    """What a number is."""
    storage: np.dtype
    """Of the array that holds them."""
    most: int
    """What the number of a token's head that is largest in size becomes; its sign may change."""
    packed: int = 1
    """Numbers in one place of that array."""
    rotates_keys: bool = False
    """Whether keys are rotated before they are rounded, and queries with them."""
    rotates_values: bool = False
    """Whether values are rotated before they are rounded, and answers back."""

    def check(self, head_dim: int) -> None:
        """Refuses what cannot be packed.

        Raises:
            ValueError: numbers of two heads would share a byte.
        """
        if head_dim % self.packed:
            raise ValueError(
                f"head_dim is {head_dim}, and pages of {self.name} hold {self.packed} numbers in a "
                f"byte; choose int8 or fp8 pages, or a head_dim that {self.packed} divides"
            )

    def width(self, head_dim: int) -> int:
        """Places of the array that one token and head take."""
        self.check(head_dim)
        return head_dim // self.packed


INT8 = Format("int8", np.dtype(jnp.int8), np.dtype(jnp.int8), 127, rotates_keys=True)
FP8 = Format("fp8", np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e4m3fn), 448)
INT4 = Format(
    "int4",
    np.dtype(jnp.int4),
    np.dtype(jnp.uint8),
    -8,
    packed=2,
    rotates_keys=True,
    rotates_values=True,
)
FORMATS = {format.name: format for format in (INT8, FP8, INT4)}
"""By name."""


def format_of(dtype: np.dtype | type) -> Format | None:
    """The format whose numbers, or whose arrays, are of a dtype; None: it needs no scales."""
    for format in FORMATS.values():
        if dtype in (format.dtype, format.storage):
            return format
    return None


def cell_bytes(head_dim: int, dtype: np.dtype) -> int:
    """Bytes of the keys, or the values, of one token and head in a pool of this dtype."""
    if (format := format_of(dtype)) is None:
        return head_dim * np.dtype(dtype).itemsize
    return format.width(head_dim) * format.storage.itemsize + SCALE_DTYPE.itemsize


def quantize(
    numbers: Float[Array, "*B H"], format: Format
) -> tuple[Shaped[Array, "*B C"], BFloat16[Array, "*B"]]:
    """Rounds each token and head to the nearest numbers that its scale can express, ties to even.

    A token that is not finite has a scale that is not, and stands for NaN. Nothing is rotated here.
    append.cc computes the same bits.
    """
    format.check(numbers.shape[-1])
    exact = numbers.astype(jnp.float32)
    # On CPUs XLA's maximum of many numbers may pass a NaN over.
    has_nan = jnp.any(jnp.isnan(exact), axis=-1)
    largest = jnp.where(has_nan, jnp.nan, jnp.max(jnp.abs(exact), axis=-1))
    extreme = largest
    if format is INT4:
        top = jnp.max(exact, axis=-1)
        # Of two numbers of one size and either sign, the one above zero.
        extreme = jnp.where(top == largest, top, -largest)
    # XLA may leave out a cast that is undone at once (``xla_allow_excess_precision``); never this.
    scale = lax.reduce_precision(
        jnp.where(largest < LEAST, 0, extreme * np.float32(1 / format.most)), 8, 7
    )
    step = scale[..., None]
    is_usable = (step != 0) & (jnp.abs(step) < jnp.inf)
    # One quotient for each token: one for each number XLA may turn into products, which round
    # otherwise.
    inverse = jnp.where(is_usable, 1 / jnp.where(is_usable, step, 1), 0)
    # The scale was rounded, too, by 2^-8 at most: nothing of int8 is above 127.497, and of fp8
    # above 449.75, which becomes 448.
    ratio = jnp.where(is_usable, exact * inverse, 0)
    return _encode(ratio, format), scale.astype(SCALE_DTYPE)


def dequantize(
    values: Shaped[Array, "*B C"], scale: BFloat16[Array, "*B"]
) -> Float32[Array, "*B H"]:
    """The numbers that values and scales stand for; exact. Nothing is rotated here."""
    if values.dtype == INT4.storage:
        values = lax.bitcast_convert_type(values, jnp.int4)
        values = values.reshape(*values.shape[:-2], -1)
    return values.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def rotate_xla(numbers: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Multiplies by an orthonormal Walsh-Hadamard matrix, which is its own inverse.

    In blocks of the largest power of two that divides the last axis. In sums and differences of
    float32, whose order is the same in every program and in rotate.cc, and so are their bits: those
    of both halves of a block, in pairs beside each other, as many times as a block can be halved.
    """
    head_dim = numbers.shape[-1]
    block = head_dim & -head_dim
    exact = numbers.astype(jnp.float32).reshape(*numbers.shape[:-1], head_dim // block, block)
    for _ in range(block.bit_length() - 1):
        left, right = jnp.split(exact, 2, axis=-1)
        exact = jnp.stack((left + right, left - right), axis=-1).reshape(exact.shape)
    return (exact * np.float32(block**-0.5)).astype(numbers.dtype).reshape(numbers.shape)


def rotate_product(numbers: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Computes ``rotate`` as one product, where tensor cores make a launch of it.

    Numbers times 1 and -1 are exact and sums are float32, of another order than ``rotate_xla``'s.
    """
    if target().platform != "gpu":
        raise NotImplementedError(f"products of small matrices are no gain on {target().platform}")
    block = numbers.shape[-1] & -numbers.shape[-1]
    blocks = numbers.reshape(*numbers.shape[:-1], numbers.shape[-1] // block, block)
    spread = lax.dot_general(
        blocks,
        jnp.asarray(hadamard(block), numbers.dtype),
        (((blocks.ndim - 1,), (0,)), ((), ())),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return (spread * np.float32(block**-0.5)).astype(numbers.dtype).reshape(numbers.shape)


def hadamard(size: int) -> np.ndarray:
    """The Walsh-Hadamard matrix of 1 and -1, ``[size, size]``, whose size is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _encode(ratio: Float32[Array, "*B H"], format: Format) -> Shaped[Array, "*B C"]:
    if format is FP8:
        return ratio.astype(jnp.float8_e4m3fn)
    whole = jnp.round(ratio)
    if format is INT8:
        return whole.astype(jnp.int8)
    # The other end of the numbers is 7: what has nearly the size of -8 comes there.
    codes = jnp.clip(whole, -8, 7).astype(jnp.int32) & 15
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).astype(jnp.uint8)
