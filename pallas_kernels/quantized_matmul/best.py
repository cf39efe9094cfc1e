"""The best of each row's answers: the largest, which it is, and whether all of them are finite.

Defined for answers that are in memory; ``native`` finds the same while it multiplies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Best(NamedTuple):
    """Of the answers of each row."""

    answer: Float[Array, " B"]
    """The largest; minus infinity when there are none."""
    place: Int[Array, " B"]
    """Where it stands, int32; of equals the lowest. In range whatever the answers are."""
    is_finite: Bool[Array, " B"]
    """Whether all are. If not, ``answer`` and ``place`` may be any."""


def best_of(answers: Float[Array, "B O"], count: int | Int[Array, ""] | None = None) -> Best:
    """Finds the best of the first ``count`` answers; of all of them when None."""
    size = answers.shape[-1]
    # All as maxima of floats, which XLA's CPU backend computes with vectors; it adds, and finds
    # an argmax, one number after the other.
    spoilt = jnp.where(jnp.isfinite(answers), 0.0, 1.0)
    if count is not None:
        counts = jnp.arange(size, dtype=jnp.int32)[None] < count
        spoilt = jnp.where(counts, spoilt, 0.0)
        answers = jnp.where(counts, answers, -jnp.inf)
    answer, place = largest(answers)
    return Best(answer, place, jnp.max(spoilt, axis=-1) == 0.0)


def largest(answers: Float[Array, "B O"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """The largest answer of each row, and its place; of equals the lowest."""
    size = answers.shape[-1]
    answer = jnp.max(answers, axis=-1)
    # Places are exact: a matrix has far fewer rows than 2**24.
    places = -jnp.arange(size, dtype=jnp.int32).astype(jnp.float32)
    place = -jnp.max(jnp.where(answers == answer[:, None], places[None], 1.0 - size), axis=-1)
    return answer, place.astype(jnp.int32)
