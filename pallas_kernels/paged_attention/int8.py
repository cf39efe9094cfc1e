"""Keys and values as int8: whole numbers of -127 to 127 with one scale for each token and head.

The scale is bfloat16, the largest size of the token's numbers over 127, and numbers are divided by
the scale as it is stored, so that its own rounding costs nothing but a step up to 0.4 % wider or
narrower. Float32 scales would take two more bytes for each token and head (3 % of the pool at
head_dim 64) and bound the error by the same half step; float16 ones end at 6e-5 and 65,504.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Int8

SCALE_DTYPE = np.dtype(jnp.bfloat16)
MAX_INT8 = 127
LEAST = 1e-30
"""A token none of whose numbers is as large is zeros, and a scale never below float32's normals,
which some processors take for zero and others do not. append.cc has the same number."""


def quantize(
    numbers: Float[Array, "*B H"],
) -> tuple[Int8[Array, "*B H"], BFloat16[Array, "*B"]]:
    """Rounds each token and head to the nearest numbers that its scale can express, ties to even.

    A token that is not finite has a scale that is not, and stands for NaN. append.cc computes the
    same bits.
    """
    exact = numbers.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=-1)
    # XLA may leave out a cast that is undone at once (``xla_allow_excess_precision``); never this.
    scale = lax.reduce_precision(
        jnp.where(largest < LEAST, 0, largest * np.float32(1 / MAX_INT8)), 8, 7
    )
    step = scale[..., None]
    is_usable = (step > 0) & (step < jnp.inf)
    # One quotient for each token: one for each number XLA may turn into products, which round
    # otherwise.
    inverse = jnp.where(is_usable, 1 / jnp.where(is_usable, step, 1), 0)
    # The scale was rounded, too, by 2^-8 at most: nothing above 127.497 comes here.
    ratio = jnp.where(is_usable, exact * inverse, 0)
    return jnp.round(ratio).astype(jnp.int8), scale.astype(SCALE_DTYPE)


def dequantize(values: Int8[Array, "*B H"], scale: BFloat16[Array, "*B"]) -> Float32[Array, "*B H"]:
    """The numbers that values and scales stand for; exact."""
    return values.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def cell_bytes(head_dim: int, dtype: np.dtype) -> int:
    """Bytes of the keys, or the values, of one token and head in a pool of this dtype."""
    scale_bytes = SCALE_DTYPE.itemsize if dtype == np.int8 else 0
    return head_dim * np.dtype(dtype).itemsize + scale_bytes
