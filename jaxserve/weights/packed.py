"""Quantized weights out of a checkpoint: which are, and the arrays that they consist of.

A quantized weight is two or three arrays with the axes of the weight, the last one shortened. Each
is read as if the checkpoint held tensors of that array's shape, so that what is known of parts,
shards and padding serves them all. A GGUF file's own blocks are taken apart and not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import weight_sources
from jaxserve.models.sources import Source
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.reading import Index
from pallas_kernels.quantized_matmul import GROUP, Format, Quantized, quantized

type Quantization = Literal["none", "int8", "int4", "auto"]
type ArrayName = Literal["values", "scale", "minimum"]
"""The arrays of ``Quantized``."""
Boxes = Callable[[Index], Iterable[tuple[Index, Index]]]

MATRICES = ("embed", "head")
"""Of the ends. An embedding of 4 bits costs more than it saves, so int4 has them as int8."""


def choose_formats(
    config: ModelConfig, checkpoint: Checkpoint, quantization: Quantization
) -> dict[str, Format]:
    """Decides which weights are held quantized.

    Args:
        config: of the model.
        checkpoint: whose weights they are.
        quantization: ``auto`` takes what the checkpoint stores so, and rounds nothing; ``int8`` and
            ``int4`` are for every matrix, rounded where it is stored otherwise.

    Raises:
        CheckpointError: a matrix cannot be, since its last axis is not a multiple of 32.
    """
    if quantization == "none":
        return {}
    if quantization != "auto":
        return rounded_formats(config, checkpoint.source, quantization)
    formats: dict[str, Format] = {}
    for name, source in _matrices(config).items():
        stored = _stored(source, config.layers, checkpoint)
        if stored is not None and _depth(source) % GROUP == 0:
            formats[name] = stored
    return formats


def rounded_formats(config: ModelConfig, name: str, format: Format) -> dict[str, Format]:
    """Returns what every matrix is held as where all are rounded.

    Args:
        config: of the model.
        name: of the model, for messages.
        format: of the layers' matrices.

    Raises:
        CheckpointError: a matrix cannot be, since its last axis is not a multiple of 32.
    """
    matrices = _matrices(config)
    if odd := [matrix for matrix, source in matrices.items() if _depth(source) % GROUP]:
        raise CheckpointError(
            f"{name} cannot be held as {format}: the last axis of {', '.join(odd)} is not a "
            f"multiple of {GROUP}; give --quantization none"
        )
    return {matrix: "int8" if matrix in MATRICES else format for matrix in matrices}


def _matrices(config: ModelConfig) -> dict[str, Source]:
    """The weights that may be quantized."""
    sources = weight_sources(config)
    ends = {name: source for name, source in sources.ends.items() if name in MATRICES}
    return ends | {name: source for name, source in sources.layer.items() if name.startswith("w_")}


def _depth(source: Source) -> int:
    return source.parts[0].split[-1][-1]


def _stored(source: Source, layers: int, checkpoint: Checkpoint) -> Format | None:
    """The format that all parts of a weight are stored in, in every layer; None if none is."""
    formats: set[Format | None] = {
        checkpoint.stored_format(part.name.format(layer=layer))
        for part in source.parts
        for layer in range(layers)
    }
    return formats.pop() if len(formats) == 1 else None


def arrays_of(format: Format) -> tuple[ArrayName, ...]:
    """The arrays that a format consists of."""
    return ("values", "scale") if format == "int8" else ("values", "scale", "minimum")


def format_of(weight: Quantized) -> Format:
    """The format that a weight, or its shapes, is of."""
    return "int8" if weight.minimum is None else "int4"


@dataclass(frozen=True)
class View:
    """One array of a checkpoint's quantized tensors, read as if it were the tensor."""

    checkpoint: Checkpoint
    format: Format
    array: ArrayName
    kept: dict[tuple[object, ...], Quantized] = field(default_factory=dict)
    """Scales of what was rounded for ``values``, until they are asked for: shared by a weight's
    views, which read the same boxes in the order of ``arrays_of``."""

    @property
    def factor(self) -> int:
        """Entries of the tensor's last axis for one of this array's."""
        if self.array != "values":
            return GROUP
        return 1 if self.format == "int8" else 2

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a box, of which the last slice counts this array's entries.

        Raises:
            CheckpointError: what is rounded has numbers that the format has none for.
        """
        if self.checkpoint.stored_format(name) == self.format:
            return self.checkpoint.read_stored(name, self.array, index)
        wide = widened(index, self.factor)
        key = (name, *((part.start, part.stop) for part in wide))
        # A box that goes to several places is read for each of them.
        rounded = None if self.array == "values" else self.kept.pop(key, None)
        if rounded is None:
            rounded = self._rounded(name, wide)
        last = arrays_of(self.format)[-1]
        if self.array != last:
            self.kept[key] = replace(rounded, values=rounded.values[:0])
        return getattr(rounded, self.array)

    def _rounded(self, name: str, index: Index) -> Quantized:
        values = self.checkpoint.read(name, index)
        try:
            return quantized(values, self.format)
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint.source}: {name!r} cannot be held as {self.format}: {error}: "
                "give --quantization none"
            ) from error

    def narrowed(self, source: Source) -> Source:
        """What makes up a weight, as tensors of this array."""
        parts = (
            replace(
                part,
                split=(
                    *part.split[:-1],
                    (*part.split[-1][:-1], part.split[-1][-1] // self.factor),
                ),
            )
            for part in source.parts
        )
        return replace(source, parts=tuple(parts))

    def boxes(self, boxes: Boxes) -> Boxes:
        """Turns a function of the weight's boxes into one of this array's."""

        def narrow(index: Index) -> Iterator[tuple[Index, Index]]:
            for into, box in boxes(widened(index, self.factor)):
                yield self._narrow(into), self._narrow(box)

        return narrow

    def _narrow(self, index: Index) -> Index:
        last = index[-1]
        return (*index[:-1], slice(last.start // self.factor, last.stop // self.factor))


def widened(index: Index, factor: int) -> Index:
    """A box whose last slice counts ``factor`` times as many entries."""
    last = index[-1]
    return (*index[:-1], slice(last.start * factor, last.stop * factor))


def views(checkpoint: Checkpoint, weight: Quantized) -> Quantized:
    """A view for each array of a weight, given its shapes."""
    format, kept = format_of(weight), {}
    made = {array: View(checkpoint, format, array, kept) for array in arrays_of(format)}
    return Quantized(**made)


def tree_of(weight: Quantized, *others: Quantized, make: Callable[..., jax.Array]) -> Quantized:
    """Calls ``make`` with the same array of each, in the order of ``arrays_of``."""
    arrays = arrays_of(format_of(weight))
    return Quantized(
        **{array: make(*(getattr(one, array) for one in (weight, *others))) for array in arrays}
    )
