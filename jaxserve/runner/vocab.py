"""One shard's part of the vocabulary, and the exchanges between the parts.

Logits stay where the head's rows are. What leaves a shard is a number or a few candidates per row:
sums and maxima of the whole, and the best tokens of each part, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class VocabShard:
    """Which tokens a shard has logits of. Without an axis it has all of them."""

    total: int
    """Token ids are below this; padding follows."""
    axis: str | None = None
    """Mesh axis that the vocabulary is split over."""

    def ids(self, size: int) -> Int[Array, " V"]:
        """Token id of each of this shard's ``size`` places."""
        return self._first(size) + jnp.arange(size, dtype=jnp.int32)

    def tokens(self, size: int) -> Int[Array, ""] | int | None:
        """How many of this shard's first places are tokens; None when all are. Padding follows."""
        if self._padded(size) == self.total:
            return None
        left = self.total - self._first(size)
        return min(left, size) if isinstance(left, int) else jnp.clip(left, 0, size)

    def is_token(self, size: int) -> Bool[Array, " V"] | None:
        """Which places are tokens and not padding; None when all are."""
        return None if self._padded(size) == self.total else self.ids(size) < self.total

    def local(self, token: Int[Array, "*B"], size: int) -> Int[Array, "*B"]:
        """Place of each token on this shard; ``size``, one past the end, when it is elsewhere."""
        place = token - self._first(size)
        return jnp.where((place >= 0) & (place < size), place, size)

    def bits(self, words: Int[Array, "B M"], size: int) -> Bool[Array, "B V"]:
        """This shard's part of masks that have a bit for every token of the whole vocabulary."""
        places = jnp.arange(32, dtype=jnp.int32)[None, None]
        every = (words[:, :, None] >> places & 1).reshape(words.shape[0], -1) > 0
        every = jnp.pad(every, ((0, 0), (0, max(0, self._padded(size) - every.shape[1]))))
        return lax.dynamic_slice_in_dim(every, self._first(size), size, axis=1)

    def pick(self, values: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
        """The value of one token per row, wherever it is; 0 for what is no token."""
        place = self.local(token, values.shape[-1])[:, None]
        own = jnp.take_along_axis(values, place, axis=-1, mode="fill", fill_value=0)
        return self.sum(own[:, 0])

    def sum(self, value: Array) -> Array:
        """Sum over the shards."""
        return value if self.axis is None else lax.psum(value, self.axis)

    def max(self, value: Array) -> Array:
        """Maximum over the shards."""
        return value if self.axis is None else lax.pmax(value, self.axis)

    def gather(self, candidates: Int[Array, "B C"]) -> Int[Array, "B S C"]:
        """The candidates of every shard, in the order of their tokens."""
        if self.axis is None:
            return candidates[:, None]
        return lax.all_gather(candidates, self.axis, axis=1)

    def logsumexp(self, logits: Float[Array, "B V"]) -> Float[Array, " B"]:
        """The logarithm of the sum of exponentials over the whole vocabulary."""
        top = self.max(jnp.max(logits, axis=-1))
        return top + jnp.log(self.sum(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)))

    def _padded(self, size: int) -> int:
        """Places of all shards together."""
        return size * (1 if self.axis is None else lax.axis_size(self.axis))

    def _first(self, size: int) -> Int[Array, ""] | int:
        return 0 if self.axis is None else lax.axis_index(self.axis) * size
