"""Quantized weights out of a checkpoint: which are, and the arrays that they consist of.

A quantized weight is two or three arrays with the axes of the weight, the last one shortened. Each
is read as if the checkpoint held tensors of that array's shape, so that what is known of parts,
shards and padding serves them all. What a checkpoint stores so is taken apart and not rounded
again; scales of larger groups are repeated where smaller ones are held, which changes no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.layout import Axes, Layout
from jaxserve.models.registry import weight_sources
from jaxserve.models.sources import Source
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.reading import Index
from pallas_kernels.quantized_matmul import GROUP, Format, Kind, Quantized, Spec, quantized, spec

type Quantization = Literal["none", "int8", "int4", "fp8", "w8a8", "awq", "gptq", "auto"]
type ArrayName = Literal["values", "scale", "minimum"]
"""The arrays of ``Quantized`` that have the weight's axes."""
Boxes = Callable[[Index], Iterable[tuple[Index, Index]]]

MATRICES = ("embed", "head")
"""Of the ends. An embedding of 4 bits costs more than it saves, and one of fp8 is coarser than one
of int8 for the same bytes, so both have them as int8."""
ROUNDED: dict[Quantization, Format] = {
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8",
    "w8a8": "int8/row",
}
"""What each quantization that rounds makes of a layer's matrices. Of ``w8a8`` products are integers
throughout: activations are rounded, too, which a scale for each row of the matrix allows."""
SPLIT_INPUTS = ("w_o", "w_down")
"""Weights whose last axes are divided among the devices of a mesh's tensor axis."""


def choose_formats(
    config: ModelConfig, checkpoint: Checkpoint, quantization: Quantization
) -> dict[str, Format]:
    """Decides which weights are held quantized, whatever the devices; see ``held_formats``.

    Args:
        config: of the model.
        checkpoint: whose weights they are.
        quantization: ``auto`` takes what the checkpoint stores so, and rounds nothing, as do
            ``awq`` and ``gptq``, which insist on its tool; the others are for every matrix, rounded
            where it is stored otherwise.

    Raises:
        CheckpointError: the checkpoint is not what is insisted on, or a matrix's last axis is no
            whole groups.
    """
    if quantization == "none":
        return {}
    if quantization in ("awq", "gptq"):
        check_method(checkpoint.source, getattr(checkpoint, "method", None), quantization)
    elif quantization != "auto":
        return rounded_formats(config, checkpoint.source, ROUNDED[quantization])
    formats: dict[str, Format] = {}
    for name, source in _matrices(config).items():
        stored = _stored(name, source, config, checkpoint)
        if stored is None:
            continue
        its = spec(stored)
        if its.group is None:  # Only the tools' checkpoints have one scale a row.
            its = its._replace(group=getattr(checkpoint, "group_of_rows", None))
        if (fitting := _fitting(its.name, depth_of(source))) is not None:
            formats[name] = fitting
    return formats


def check_method(name: str, method: str | None, asked: Quantization) -> None:
    """Refuses a checkpoint of another tool than was asked for.

    Raises:
        CheckpointError: it is.
    """
    if method != asked:
        found = f"quantized with {method}" if method else "not quantized by such a tool"
        raise CheckpointError(
            f"{name} is {found}, and --quantization is {asked}; give --quantization auto, which "
            f"takes what is stored, or a checkpoint whose quantization_config says {asked}"
        )


def rounded_formats(
    config: ModelConfig, name: str, format: Format, remedy: str = "give --quantization none"
) -> dict[str, Format]:
    """Returns what every matrix is held as where all are rounded.

    Args:
        config: of the model.
        name: of the model, for messages.
        format: of the layers' matrices; in smaller groups where an axis has no whole ones.
        remedy: what is to be done where that cannot be, for the message.

    Raises:
        CheckpointError: a matrix cannot be, since its last axis is not a multiple of 32.
    """
    matrices = _matrices(config)
    wanted = {matrix: "int8" if matrix in MATRICES else format for matrix in matrices}
    fitting = {matrix: _fitting(wanted[matrix], depth_of(matrices[matrix])) for matrix in matrices}
    if odd := [matrix for matrix, found in fitting.items() if found is None]:
        raise CheckpointError(
            f"{name} cannot be held as {format}: the last axis of "
            f"{', '.join(f'{matrix} ({depth_of(matrices[matrix])})' for matrix in odd)} is not a "
            f"multiple of {GROUP}; {remedy}"
        )
    return {matrix: found for matrix, found in fitting.items() if found is not None}


def held_formats(
    formats: dict[str, Format], config: ModelConfig, *, has_native: bool, tensor: int
) -> dict[str, Format]:
    """Decides how weights are held on some devices, given their formats in the checkpoint.

    Args:
        formats: as ``choose_formats`` returns them.
        config: of the model.
        has_native: products are the CPU's kernels, which read groups of 32: the scales of larger
            ones are repeated, and what is rounded while it is read has groups of its own.
        tensor: devices that share one copy of the model. Where they divide columns, these are not
            in another order: such a weight is widened.
    """
    depths = {name: depth_of(source) for name, source in _matrices(config).items()}
    held: dict[str, Format] = {}
    for name, format in formats.items():
        its = spec(format)
        if its.ordered and tensor > 1 and name in SPLIT_INPUTS:
            continue
        if has_native and its.kind != "fp8" and depths[name] % GROUP == 0:
            its = its._replace(group=GROUP)
        held[name] = its.name
    return held


def why_widened(
    config: ModelConfig, checkpoint: Checkpoint, held: dict[str, Format]
) -> dict[str, str]:
    """Says of each weight that is stored in few bits and not held so why it is not."""
    reasons: dict[str, str] = {}
    for name, source in _matrices(config).items():
        tensors = _tensors(source, config.layers)
        kinds = sorted({kind for tensor in tensors if (kind := checkpoint.stored_as(tensor))})
        if not kinds or name in held:
            continue
        stored = _stored(name, source, config, checkpoint)
        if stored is not None and _fitting(stored, depth_of(source)) is None:
            why = f"its last axis of {depth_of(source)} is no whole groups of {GROUP}"
        elif stored is not None and spec(stored).ordered:
            why = "its columns are in another order and divided among devices"
        elif stored is not None:
            why = "the CPU has no kernels built that read it so"
        elif len(kinds) > 1 or not all(map(checkpoint.stored_as, tensors)):
            why = "its tensors are stored differently, and it has one format"
        elif not all(map(checkpoint.stored_format, tensors)):
            why = "no format here has its numbers"
        else:
            why = "its tensors have their columns in different orders"
        reasons[name] = f"stored as {', '.join(kinds)}; {why}"
    return reasons


def _fitting(format: Format, depth: int) -> Format | None:
    """The format with the largest groups that an axis is whole multiples of."""
    its = spec(format)
    if its.group is None:
        return format
    group = math.gcd(its.group, depth)
    return its._replace(group=group).name if group % GROUP == 0 else None


def _matrices(config: ModelConfig) -> dict[str, Source]:
    """The weights that may be quantized."""
    sources = weight_sources(config)
    ends = {name: source for name, source in sources.ends.items() if name in MATRICES}
    return ends | {name: source for name, source in sources.layer.items() if name.startswith("w_")}


def depth_of(source: Source) -> int:
    """Entries of a weight's last axis."""
    return source.parts[0].split[-1][-1]


def _tensors(source: Source, layers: int) -> list[str]:
    """The tensors that make up a weight, in every layer."""
    return [part.name.format(layer=layer) for layer in range(layers) for part in source.parts]


def _stored(
    name: str, source: Source, config: ModelConfig, checkpoint: Checkpoint
) -> Format | None:
    """The format that all parts of a weight are stored in, in every layer; None if none is."""
    tensors = _tensors(source, config.layers)
    formats: set[Format | None] = {checkpoint.stored_format(tensor) for tensor in tensors}
    its = {spec(format) if format else None for format in formats}
    bare = {one and one._replace(ordered=False) for one in its}
    found = bare.pop()
    if bare or found is None:
        return None
    if not any(one and one.ordered for one in its):
        return found.name
    # Rows of the ends are looked up, which an order has no meaning for; each expert has its own.
    plain = name not in MATRICES and not (config.experts and name in ("w_gate_up", "w_down"))
    if not plain or not _orders_agree(source, config.layers, checkpoint):
        return None
    return found._replace(ordered=True).name


def _orders_agree(source: Source, layers: int, checkpoint: Checkpoint) -> bool:
    """Whether all parts of a weight have their columns in the same order, layer by layer."""
    for layer in range(layers):
        first, *others = (
            checkpoint.read_order(part.name.format(layer=layer)) for part in source.parts
        )
        for other in others:
            same = first is other if first is None or other is None else (first == other).all()
            if not same:
                return False
    return True


def arrays_of(kind: Kind) -> tuple[ArrayName, ...]:
    """The arrays that numbers of a kind consist of."""
    return ("values", "scale", "minimum") if kind == "int4" else ("values", "scale")


@dataclass(frozen=True)
class Narrow:
    """One array of a quantized weight, seen beside the weight itself."""

    kind: Kind
    array: ArrayName
    group: int
    """Columns that share a scale."""
    is_row: bool
    """They are all of the weight's last axis, zeros that a mesh adds to it included."""

    @property
    def factor(self) -> int:
        """Entries of the weight's last axis for one of this array's."""
        return Spec(self.kind).per_byte if self.array == "values" else self.group

    def source(self, source: Source) -> Source:
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

    def boxes(self, layout: Layout, words: Axes) -> Boxes:
        """Says which true boxes of this array make up one of a stretched array."""
        if self.is_row and self.array != "values":
            return partial(layout.boxes, (*words[:-1], None))

        def narrow(index: Index) -> Iterator[tuple[Index, Index]]:
            for into, box in layout.boxes(words, widened(index, self.factor)):
                yield self._narrow(into), self._narrow(box)

        return narrow

    def regrouped(
        self, read: Callable[[Index], np.ndarray], index: Index, group: int
    ) -> np.ndarray:
        """Reads a box of this array where it is stored for groups of another size.

        Args:
            read: reads a box of the stored array.
            index: the last slice counts this array's entries.
            group: of the stored scales; a multiple of this one.
        """
        if self.array == "values" or group == self.group:
            return read(index)
        times = group // self.group
        last = index[-1]
        first = last.start // times
        box = read((*index[:-1], slice(first, -(-last.stop // times)))).repeat(times, axis=-1)
        return box[..., last.start - first * times : last.stop - first * times]

    def _narrow(self, index: Index) -> Index:
        last = index[-1]
        return (*index[:-1], slice(last.start // self.factor, last.stop // self.factor))


@dataclass(frozen=True)
class View:
    """One array of a checkpoint's quantized tensors, read as if it were the tensor."""

    checkpoint: Checkpoint
    narrow: Narrow
    ordered: bool
    """Columns are in the order of the checkpoint's."""
    kept: dict[tuple[object, ...], Quantized] = field(default_factory=dict)
    """Scales of what was rounded for ``values``, until they are asked for: shared by a weight's
    views, which read the same boxes in the order of ``arrays_of``."""

    @property
    def factor(self) -> int:
        """Entries of the tensor's last axis for one of this array's."""
        return self.narrow.factor

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a box, of which the last slice counts this array's entries.

        Raises:
            CheckpointError: what is rounded has numbers that the format has none for.
        """
        narrow = self.narrow
        if group := self._stored_group(name):
            read = partial(self.checkpoint.read_stored, name, narrow.array)
            return narrow.regrouped(read, index, group)
        wide = widened(index, self.factor)
        last, group = wide[-1], narrow.group
        # Whole groups decide a scale, of which a shard may have a part where they are whole rows.
        whole = slice(last.start // group * group, -(-last.stop // group) * group)
        key = (name, *((part.start, part.stop) for part in (*wide[:-1], whole)))
        # A box that goes to several places is read for each of them.
        rounded = None if narrow.array == "values" else self.kept.pop(key, None)
        if rounded is None:
            rounded = self._rounded(name, (*wide[:-1], whole))
        if narrow.array != arrays_of(narrow.kind)[-1]:
            self.kept[key] = replace(rounded, values=rounded.values[:0])
        array = getattr(rounded, narrow.array)
        if whole == last or narrow.array != "values":
            return array
        return array[..., last.start - whole.start : last.stop - whole.start]

    def _stored_group(self, name: str) -> int:
        """The group of a tensor that is stored as it is held, but for smaller groups; or 0."""
        format = self.checkpoint.stored_format(name)
        if format is None:
            return 0
        its = spec(format)
        group = its.group or self.checkpoint.shape(name)[-1]
        alike = its.kind == self.narrow.kind and (self.ordered or not its.ordered)
        return group if alike and group % self.narrow.group == 0 else 0

    def _rounded(self, name: str, index: Index) -> Quantized:
        values = self.checkpoint.read(name, index)
        try:
            return quantized(values, Spec(self.narrow.kind, self.narrow.group).name)
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint.source}: {name!r} cannot be held as {self.narrow.kind}: {error}:"
                " give --quantization none"
            ) from error


def widened(index: Index, factor: int) -> Index:
    """A box whose last slice counts ``factor`` times as many entries."""
    last = index[-1]
    return (*index[:-1], slice(last.start * factor, last.stop * factor))


def narrows(weight: Quantized, depth: int) -> Quantized:
    """A ``Narrow`` for each array of a weight.

    Args:
        weight: its shapes.
        depth: of its last axis, without what a mesh adds.
    """
    is_row = weight.scale.shape[-1] == 1
    group = depth if is_row else weight.group
    made = {name: Narrow(weight.kind, name, group, is_row) for name in arrays_of(weight.kind)}
    return Quantized(**made)


def views(checkpoint: Checkpoint, weight: Quantized, depth: int) -> Quantized:
    """A view for each array of a weight, given its shapes; ``depth`` as for ``narrows``."""
    kept: dict[tuple[object, ...], Quantized] = {}

    def view(narrow: Narrow) -> View:
        return View(checkpoint, narrow, weight.order is not None, kept)

    return jax.tree.map(view, narrows(weight, depth))


def tree_of(weight: Quantized, *others: Quantized, make: Callable[..., jax.Array]) -> Quantized:
    """Calls ``make`` with the same array of each, in the order of ``arrays_of``."""
    arrays = arrays_of(weight.kind)
    return Quantized(
        **{array: make(*(getattr(one, array) for one in (weight, *others))) for array in arrays}
    )
