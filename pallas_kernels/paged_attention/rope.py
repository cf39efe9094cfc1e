"""Rotary positions: what they mean."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rope(
    x: Float[Array, "B T heads H"], table: Float[Array, "2 B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotates each head by its position (RoFormer, equation 34).

    The two members of a pair are ``H / 2`` apart, as in Hugging Face's checkpoints, and not
    neighbours as in the paper.

    Args:
        x: Heads.
        table: Cosine and sine of every pair's angle.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = table[0][:, :, None, :], table[1][:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
