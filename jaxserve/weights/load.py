"""Fills a model's weights, from a checkpoint or at random, straight into their final shardings.

    shard of our weight -> boxes of the stored tensors it is made of -> host array -> device

One weight is on the host at a time, and what is read for it comes in bounded pieces, so the host's
peak is one weight; where the host is the device, it is the model, since what is read is served.
Which tensors make up a weight is said by the model's family; reading and dequantizing is the
checkpoint's business, and dividing among devices that of ``sharding``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.decoder import Model, Params
from jaxserve.models.registry import weight_sources
from jaxserve.models.sources import Part, Source, WeightSources
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.packed import Boxes, View, depth_of, tree_of, views
from jaxserve.weights.reading import Index
from pallas_kernels.quantized_matmul import Quantized
from sharding.placement import host_zeros, place

Progress = Callable[[int, int], None]
"""Called with the bytes that are in place and the bytes that there will be."""

type Reader = Checkpoint | View
"""What tensors are read from: as they are, or one array of their quantized form."""

PIECE_VALUES = 1 << 24
"""Values read at a time: 64 MiB in float32, the widest that dequantization gives."""
LISTED = 4
"""How many tensors a message names before it only counts them."""


def load_params(
    model: Model,
    checkpoint: Checkpoint,
    *,
    dtype: Any,
    stacked: bool,
    shardings: Params,
    progress: Progress | None = None,
) -> Params:
    """Reads every weight of a model.

    Args:
        model: whose architecture and sizes the checkpoint must have.
        checkpoint: open; stays open.
        dtype: of the result; stored values are rounded to it once.
        stacked: one array for all layers, or one per layer.
        shardings: a sharding for each leaf of ``model.abstract(dtype, stacked=stacked)``.
        progress: told after each weight.

    Raises:
        CheckpointError: naming the tensors that are missing, misshapen or unknown.
    """
    sources = weight_sources(model.layout.config)
    check_tensors(sources, model.config.layers, checkpoint)
    abstract = model.abstract(dtype, stacked=stacked)
    placed = reporter(abstract, progress)

    def load(weight: _Weight, target: Any, axes: Any, sharding: Any) -> Any:
        if isinstance(target, Quantized):
            make = partial(load_array, weight, axes.values.words)
            readers = views(checkpoint, target, depth_of(weight.sources[0]))
            loaded = tree_of(target, sharding, readers, make=make)
            if target.order is None:
                return loaded
            return replace(loaded, order=load_order(weight, target.order, sharding.order))
        return load_array(weight, axes.words, target, sharding, checkpoint)

    def load_order(weight: _Weight, target: Any, sharding: Any) -> jax.Array:
        def read(index: Index) -> np.ndarray:
            """Parts of a weight have the same order."""
            layers = weight.sources[index[0]] if weight.stacked else weight.sources
            orders = [checkpoint.read_order(source.parts[0].name) for source in layers]
            # One that happens to be in order beside others that are not.
            plain = np.arange(target.size // len(weight.sources), dtype=np.int32)
            found = np.stack([plain if order is None else order for order in orders])
            whole = found.reshape(len(orders) if weight.stacked else 1, *target.shape[1:])
            return whole[(slice(None), *index[1:])]

        return placed(place(read, target.shape, target.dtype, sharding))

    def load_array(
        weight: _Weight, words: Any, target: Any, sharding: Any, reader: Reader
    ) -> jax.Array:
        boxes: Boxes = partial(model.layout.boxes, words)
        if isinstance(reader, View):
            weight, boxes = weight.narrowed(reader), reader.narrow.boxes(model.layout, words)
        read = partial(_read_weight, reader, weight, target.dtype, boxes)
        return placed(place(read, target.shape, target.dtype, sharding))

    weights = _weights(sources, model.config.layers, stacked)
    # A stacked weight is read layer by layer.
    axes = axis_names(model, stacked=False)
    if stacked:
        assert isinstance(axes.layers, tuple)
        axes = Params(axes.ends, axes.layers[0])
    return jax.tree.map(load, weights, abstract, axes, shardings)


@dataclass(frozen=True)
class AxisNames:
    """The words of one weight's axes; a leaf, where the tuple itself would be a branch."""

    words: tuple[str | None, ...]


def axis_names(model: Model, *, stacked: bool) -> Params:
    """Returns ``model.logical_axes`` as a tree that can be walked beside the weights."""

    def is_axes(node: object) -> bool:
        return isinstance(node, tuple) and all(isinstance(word, str | None) for word in node)

    return jax.tree.map(AxisNames, model.logical_axes(stacked=stacked), is_leaf=is_axes)


def random_params(
    model: Model,
    *,
    seed: int,
    dtype: Any,
    stacked: bool,
    shardings: Params,
    progress: Progress | None = None,
) -> Params:
    """Makes random weights on the devices, the same ones whatever the shardings.

    Layers that are not stacked share one compiled program. Arguments as for ``load_params``.
    """
    placed = reporter(model.abstract(dtype, stacked=stacked), progress)
    ends_key, layer_keys = model.split_key(jax.random.key(seed))

    def make(init: Callable[..., Any], places: Any) -> Callable[[jax.Array], Any]:
        compiled = jax.jit(partial(init, dtype=dtype), out_shardings=places)
        return lambda key: jax.tree.map(placed, compiled(key))

    ends = make(model.init_ends, shardings.ends)(ends_key)
    if isinstance(shardings.layers, dict):
        return Params(ends, make(model.init_layers, shardings.layers)(layer_keys))
    init_layer = make(model.init_layer, shardings.layers[0])
    return Params(ends, tuple(init_layer(key) for key in layer_keys))


def check_tensors(sources: WeightSources, layers: int, checkpoint: Checkpoint) -> None:
    """Compares the checkpoint's list of tensors with the one that the model needs.

    Raises:
        CheckpointError: with the name, the expected shape and the actual one.
    """
    needed = {
        part.name: part.stored_shape
        for weight in jax.tree.leaves(_weights(sources, layers, stacked=False))
        for source in weight.sources
        for part in source.parts
    }
    stored = set(checkpoint.names())
    missing = [f"{name} {list(shape)}" for name, shape in needed.items() if name not in stored]
    misshapen = [
        f"{name} has shape {list(checkpoint.shape(name))}, expected {list(shape)}"
        for name, shape in needed.items()
        if name in stored and checkpoint.shape(name) != shape
    ]
    unknown = [
        name
        for name in sorted(stored - needed.keys())
        if not any(fnmatchcase(name, pattern) for pattern in sources.ignored)
        and not checkpoint.says_nothing(name)
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(needed)} tensors are missing: {_some(missing)}")
    if misshapen:
        problems.append(f"{len(misshapen)} tensors are misshapen: {_some(misshapen)}")
    if unknown:
        problems.append(
            f"{len(unknown)} tensors have no place in the model, and leaving them out would change "
            f"its answers: {_some(unknown)}"
        )
    if problems:
        raise CheckpointError(
            f"{checkpoint.source} does not fit its config. {'. '.join(problems)}. "
            "Fetch the checkpoint again, or correct its config.json"
        )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return "; ".join(items[:LISTED]) + more


@dataclass(frozen=True)
class _Weight:
    """One array of the result: a source, or one per layer along a new leading axis."""

    sources: tuple[Source, ...]
    stacked: bool

    def narrowed(self, view: View) -> _Weight:
        """The same of one array of a quantized weight."""
        return replace(self, sources=tuple(map(view.narrow.source, self.sources)))


def _weights(sources: WeightSources, layers: int, stacked: bool) -> Params:
    """The tree of weights, with layer numbers filled in."""

    def numbered(source: Source, layer: int) -> Source:
        parts = (replace(part, name=part.name.format(layer=layer)) for part in source.parts)
        return replace(source, parts=tuple(parts))

    def one_layer(layer: int) -> dict[str, _Weight]:
        return {
            name: _Weight((numbered(source, layer),), False)
            for name, source in sources.layer.items()
        }

    ends = {name: _Weight((source,), False) for name, source in sources.ends.items()}
    if not stacked:
        return Params(ends, tuple(one_layer(layer) for layer in range(layers)))
    return Params(
        ends,
        {
            name: _Weight(tuple(numbered(source, layer) for layer in range(layers)), True)
            for name, source in sources.layer.items()
        },
    )


def _read_weight(
    reader: Reader, weight: _Weight, dtype: Any, boxes: Boxes, index: Index
) -> np.ndarray:
    """Reads the box ``index`` of one weight, as the layout has stretched it."""
    wanted = weight.sources
    if weight.stacked:
        wanted, index = wanted[index[0]], index[1:]
    shape = (part.stop - part.start for part in index)
    # Zeros cost nothing where the whole is written afterwards: their pages are not touched before.
    out = host_zeros((len(wanted), *shape), dtype)
    pieces = list(boxes(index))
    for layer, source in enumerate(wanted):
        for into, box in pieces:
            _fill(out[layer][into], reader, source, box)
    return out if weight.stacked else out[0]


def _fill(out: np.ndarray, reader: Reader, source: Source, index: Index) -> None:
    """Writes the box ``index`` of what the parts make up together."""
    axis, offset = source.axis, 0
    for part in source.parts:
        size = part.shape[axis]
        # What this part holds of the wanted span, counted from the part's own start.
        start = max(index[axis].start - offset, 0)
        stop = min(index[axis].stop - offset, size)
        if start < stop:
            box = (*index[:axis], slice(start, stop), *index[axis + 1 :])
            at = start + offset - index[axis].start
            into = (slice(None),) * axis + (slice(at, at + stop - start),)
            _fill_part(out[into], reader, part, box)
        offset += size


def _fill_part(out: np.ndarray, reader: Reader, part: Part, box: Index) -> None:
    """Writes a box of one part, in pieces along its rows."""
    axis = _lead(part.split[0])
    first, last = box[axis].start, box[axis].stop
    # The arrays of a quantized weight in the same pieces of it.
    values = out.size * (reader.factor if isinstance(reader, View) else 1)
    step = max(1, PIECE_VALUES * (last - first) // values)
    before = (slice(None),) * axis
    for start in range(first, last, step):
        stop = min(start + step, last)
        piece = (*box[:axis], slice(start, stop), *box[axis + 1 :])
        out[(*before, slice(start - first, stop - first))] = _read_box(reader, part, piece)


def _read_box(reader: Reader, part: Part, box: Index) -> np.ndarray:
    """Reads the stored rows and columns that a box touches, and cuts the box out of them.

    A stored axis that became several is contiguous only along the leading one of them, which is
    sliced while reading; the others are afterwards.
    """
    stored: list[slice] = []
    split_shape: list[int] = []
    inner: list[slice] = []
    rest = list(box)
    for position, axes in enumerate(part.split):
        spans, rest = rest[: len(axes)], rest[len(axes) :]
        lead = _lead(axes)
        step = math.prod(axes[lead + 1 :])
        shift = part.first_row if position == 0 else 0
        stored.append(slice(shift + spans[lead].start * step, shift + spans[lead].stop * step))
        spans_read = list(axes)
        spans_read[lead] = spans[lead].stop - spans[lead].start
        split_shape += spans_read
        inner += [slice(None) if i == lead else span for i, span in enumerate(spans)]
    values = reader.read(part.name, tuple(stored))
    return values.reshape(split_shape)[tuple(inner)]


def _lead(axes: tuple[int, ...]) -> int:
    """The first axis that is longer than one."""
    return next((i for i, size in enumerate(axes) if size > 1), 0)


def reporter(abstract: Params, progress: Progress | None) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that waits for an array and adds it to what is reported."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    done = 0

    def placed(array: jax.Array) -> jax.Array:
        nonlocal done
        # The host array behind it is released only when the copy is over.
        array.block_until_ready()
        done += array.nbytes
        if progress is not None:
            progress(done, total)
        return array

    return placed
