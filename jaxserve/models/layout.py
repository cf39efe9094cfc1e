"""How a model's axes are stretched until a mesh divides them, and where each part comes from.

Some axes are split over the mesh's tensor axis. Feed-forwards, each expert's included, and the
vocabulary are padded with zeros at their end. Key/value heads travel with their query heads as one
group, and either whole groups of zeros are added, or each group is copied and its query heads are
dealt out to the copies, whichever leaves a device with fewer bytes:

    SmolLM2, 3 groups of 3, 2 devices   1 copy,   4 groups of 3:  a device holds 2
    Gemma 3, 1 group of 4, 4 devices    4 copies, 4 groups of 1:  a device holds 1

Zeros change no answer: a query of zeros meets zero rows of the output projection, and so do the
padded channels of the feed-forward. Padded tokens have logit 0, which sampling masks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxserve.models.config import ModelConfig

Axes = tuple[str | None, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """A model's true sizes, and those that its arrays have on a mesh."""

    config: ModelConfig
    """As the checkpoint has it."""
    tensor: int
    """Devices that share one copy of the model."""
    copies: int
    """Of each key/value head; its query heads are dealt out to them."""
    step: int = 1
    """A device's part of the feed-forward is a multiple of it, when there are several."""

    @property
    def group(self) -> int:
        """Query heads of one group, zeros included."""
        return -(-self.config.group // self.copies)

    @property
    def groups(self) -> int:
        """Key/value heads, copies and zeros included."""
        return _round_up(self.config.kv_heads * self.copies, self.tensor)

    @property
    def stretched(self) -> ModelConfig:
        """The model with the sizes that its arrays have."""
        config = self.config
        ffn_step = self.tensor * (self.step if self.tensor > 1 else 1)
        return replace(
            config,
            kv_heads=self.groups,
            q_heads=self.groups * self.group,
            ffn=_round_up(config.ffn, ffn_step),
            shared_ffn=_round_up(config.shared_ffn, ffn_step),
            vocab_size=_round_up(config.vocab_size, self.tensor),
        )

    def notes(self) -> list[str]:
        """One line for each axis that is padded or copied, with what it costs."""
        true, here = self.config, self.stretched
        notes: list[str] = []
        if self.copies > 1:
            notes.append(
                f"kv_heads: {true.kv_heads} copied {self.copies} times, query heads dealt out"
            )
        if self.groups > true.kv_heads * self.copies or here.q_heads > true.q_heads:
            notes.append(
                f"q_heads: {true.q_heads} padded to {here.q_heads} in {self.groups} groups of "
                f"{self.group}"
            )
        notes += [
            f"{name}: {size} padded to {padded} (+{padded / size - 1:.1%})"
            for name, size, padded in (
                ("ffn", true.ffn, here.ffn),
                ("shared_ffn", true.shared_ffn, here.shared_ffn),
                ("vocab", true.vocab_size, here.vocab_size),
            )
            if padded > size
        ]
        return notes

    def stretch(self, array: Array, axes: Axes) -> Array:
        """Gives an array of true sizes those it has on the mesh.

        Args:
            array: of the checkpoint's sizes; axes before those of ``axes`` are left alone.
            axes: a word for each of its last axes.
        """
        found = self._origin(axes)
        if found is None:
            return array
        place = array.ndim - len(axes) + found.place
        sources = np.where(found.sources < 0, math.prod(found.true_shape), found.sources)
        return _take(array, place, found.true_shape, sources)

    def true_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """Returns the shape that an array on the mesh has in the checkpoint."""
        found = self._origin(axes)
        if found is None:
            return shape
        end = found.place + found.sources.ndim
        return (*shape[: found.place], *found.true_shape, *shape[end:])

    def boxes(self, axes: Axes, box: Index) -> Iterator[tuple[Index, Index]]:
        """Says which true boxes make up a box of a stretched array; the rest of it is zero.

        Args:
            axes: a word for each axis.
            box: a slice with both bounds for each axis.

        Yields:
            Where in the box, and the box of the true array that belongs there.
        """
        into: Index = tuple(slice(0, part.stop - part.start) for part in box)
        found = self._origin(axes)
        if found is None:
            yield into, box
            return
        place, end = found.place, found.place + found.sources.ndim
        wanted = found.sources[box[place:end]]
        for *outer, start, stop in _runs(wanted):
            at = (*(slice(i, i + 1) for i in outer), slice(start, stop))
            flat = int(wanted[(*outer, start)])
            first = np.unravel_index(flat, found.true_shape)
            true = (
                *(slice(int(i), int(i) + 1) for i in first[:-1]),
                slice(int(first[-1]), int(first[-1]) + stop - start),
            )
            yield (*into[:place], *at, *into[end:]), (*box[:place], *true, *box[end:])

    def _origin(self, axes: Axes) -> _Origin | None:
        """Which axis of an array is stretched; none has two. None when its true size will do."""
        true, here = self.config, self.stretched
        sizes = {
            "ffn": (true.ffn, here.ffn),
            "shared_ffn": (true.shared_ffn, here.shared_ffn),
            "vocab": (true.vocab_size, here.vocab_size),
        }
        for place, word in enumerate(axes):
            if word in sizes:
                size, padded = sizes[word]
                sources = np.arange(padded)
                origin = _Origin(place, (size,), np.where(sources < size, sources, -1))
            elif word == "q_heads":
                origin = _Origin(place, (true.q_heads,), self._queries().ravel())
            elif word == "kv_heads":
                assert axes[place + 1] == "group", "keys and values travel with their queries"
                origin = _Origin(place, (true.kv_heads, true.group + 2), self._groups())
            else:
                continue
            return None if origin.sources.shape == origin.true_shape else origin
        return None

    def _queries(self) -> np.ndarray:
        """The true query head of each place ``[groups, group]``, -1 for zeros."""
        copy = np.arange(self.groups)[:, None]
        within = copy % self.copies * self.group + np.arange(self.group)[None, :]
        head = copy // self.copies * self.config.group + within
        real = (copy < self.config.kv_heads * self.copies) & (within < self.config.group)
        return np.where(real, head, -1)

    def _groups(self) -> np.ndarray:
        """The true row of each place ``[groups, group + 2]``: queries, the key, the value."""
        rows = self.config.group + 2
        query, copy = self._queries(), np.arange(self.groups)[:, None]
        kv_head, within = np.divmod(query, self.config.group)
        queries = np.where(query >= 0, kv_head * rows + within, -1)
        both = copy // self.copies * rows + self.config.group + np.arange(2)[None, :]
        both = np.where(copy < self.config.kv_heads * self.copies, both, -1)
        return np.concatenate([queries, both], axis=1)


@dataclass(frozen=True)
class _Origin:
    """Where the entries of a stretched axis come from, or of two neighbours taken as one."""

    place: int
    true_shape: tuple[int, ...]
    sources: np.ndarray
    """In the stretched shape: an index into the flat true axes, or -1 for zeros."""


def choose_layout(config: ModelConfig, tensor: int, *, step: int = 1) -> Layout:
    """Returns the layout with the fewest bytes of attention weights on a device.

    Each group on a device costs its query heads twice (their rows and the output's columns), a key
    and a value; of equals the one with fewer key/value heads, which the cache repeats.
    """

    def cost(layout: Layout) -> tuple[int, int]:
        here = layout.groups // tensor
        return here * (2 * layout.group + 2), here

    return min((Layout(config, tensor, n, step) for n in range(1, config.group + 1)), key=cost)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _take(array: Array, place: int, shape: tuple[int, ...], sources: np.ndarray) -> Array:
    """Replaces the axes of ``shape`` at ``place``; an index past their end gives zeros."""
    before, after = array.shape[:place], array.shape[place + len(shape) :]
    assert array.shape[place : place + len(shape)] == shape, (array.shape, place, shape)
    flat = array.reshape(*before, math.prod(shape), *after)
    taken = jnp.take(flat, sources.ravel(), axis=place, mode="fill", fill_value=0)
    return taken.reshape(*before, *sources.shape, *after)


def _runs(sources: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Runs of consecutive entries along the last axis: its other indices, start and stop."""
    for outer in np.ndindex(sources.shape[:-1]):
        line = sources[outer]
        breaks = np.flatnonzero(np.diff(line) != 1) + 1
        edges = [0, *breaks.tolist(), line.size]
        for start, stop in itertools.pairwise(edges):
            if line[start] >= 0:
                yield (*outer, start, stop)
