"""Directories that jaxserve wrote: weights as the program holds them, quantized or not.

``orbax.py`` knows how arrays lie on the disk; here is which arrays a model consists of, and how
they come onto a mesh that is not the one they were saved from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.layout import Layout
from jaxserve.models.registry import model_config
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights import orbax
from jaxserve.weights.load import AxisNames, Progress, axis_names, reporter
from jaxserve.weights.packed import Boxes, Narrow, Quantization, narrows, tree_of
from jaxserve.weights.reading import Index
from pallas_kernels.quantized_matmul import Format, Quantized, spec
from sharding.placement import host_zeros, place

if TYPE_CHECKING:
    from jaxserve.weights.source import ModelSource

STORED_SINGLY = frozenset({"layer", "kv_heads", "q_heads"})
"""Axes of a saved weight that are cut at every entry, so that a shard's heads are read alone. Long
axes, feed-forward and vocabulary, are cut where a chunk is full."""


class SavedSource:
    """A directory that ``save_model`` wrote: our own tree, restored straight into its shardings."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        metadata = orbax.read_metadata(path)
        self.config: Mapping[str, Any] = metadata["config"]
        self._digest = str(metadata["model_digest"])
        self._formats: dict[str, Format] = dict(metadata.get("formats", {}))

    def model_config(self) -> ModelConfig:
        """Returns the config; refuses what is not implemented."""
        return model_config(dict(self.config))

    def tokenizer(self) -> TokenizerSource | None:
        """Returns what was saved; None for a model that had none."""
        source = orbax.read_tokenizer(self._path)
        return source if source.files or source.gguf is not None else None

    def digest(self) -> str:
        """That of the model it was saved from."""
        return self._digest

    def formats(self, quantization: Quantization) -> dict[str, Format]:
        """Those it was saved in; what was saved is neither rounded nor widened."""
        kinds = {spec(format).kind for name, format in self._formats.items() if name[:2] == "w_"}
        if quantization == "auto" or quantization in (kinds or {"none"}):
            return self._formats
        if kinds:
            raise CheckpointError(
                f"{self.name} cannot be held as {quantization}: it was saved as "
                f"{'+'.join(sorted(kinds))}; give --quantization auto"
            )
        raise CheckpointError(
            f"{self.name} cannot be held as {quantization}: weights are rounded while safetensors "
            "or GGUF are read; give such a checkpoint, or --quantization none"
        )

    def why_widened(self, held: dict[str, Format]) -> dict[str, str]:
        """None are."""
        return {}

    def load(self, model: Model, *, dtype: Any, shardings: Params, progress: Progress) -> Params:
        """Reads weight by weight, each shard by itself."""
        abstract = model.abstract(dtype, stacked=True)
        true = Model(model.layout.config, 1, self._formats).abstract(dtype, stacked=True)
        stored = orbax.open_arrays(self._path, _as_saved(true))
        placed = reporter(abstract, progress)

        def load_array(array: Any, here: jax.ShapeDtypeStruct, to: Any, boxes: Boxes) -> jax.Array:
            read = partial(_read_box, array.read_into, boxes, here.dtype)
            return placed(place(read, here.shape, here.dtype, to))

        def load(axes: Any, arrays: Any, here: Any, to: Any, saved: Any) -> jax.Array | Quantized:
            if not isinstance(here, Quantized):
                boxes = partial(model.layout.boxes, axes.words)
                return load_array(arrays, here, to, boxes)

            def load_part(here: Any, narrow: Narrow, to: Any) -> jax.Array:
                regrouped = _Regrouped(arrays[narrow.array], narrow, saved.group)
                boxes = narrow.boxes(model.layout, axes.values.words)
                return load_array(regrouped, here, to, boxes)

            loaded = tree_of(here, narrows(here, saved.shape[-1]), to, make=load_part)
            if here.order is None:
                return loaded
            whole = partial(model.layout.boxes, axes.order.words)
            order = load_array(arrays["order"], here.order, to.order, whole)
            return replace(loaded, order=order)

        axes = axis_names(model, stacked=True)
        return jax.tree.map(
            load,
            *(axes, Params(stored["ends"], stored["layers"]), abstract, shardings, true),
            is_leaf=lambda node: isinstance(node, AxisNames | Quantized),
        )

    def close(self) -> None:
        """Holds nothing open."""


@dataclass(frozen=True)
class _Regrouped:
    """A saved array of a quantized weight, read for groups of another size."""

    array: orbax.StoredArray
    narrow: Narrow
    group: int
    """Of the saved weight."""

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fills ``out`` with a box."""
        if self.narrow.array == "values" or self.narrow.group == self.group:
            self.array.read_into(out, index)
            return

        def read(index: Index) -> np.ndarray:
            box = np.empty([part.stop - part.start for part in index], out.dtype)
            self.array.read_into(box, index)
            return box

        out[...] = self.narrow.regrouped(read, index, self.group)


def save_model(path: Path, model: Model, params: Params, source: ModelSource) -> None:
    """Writes stacked weights as a directory that ``open_source`` opens again, for any mesh.

    What the mesh has stretched is copied on the host first.

    Raises:
        CheckpointError: the path exists or cannot be written, or the weights are quantized and
            laid out for several devices.
    """
    if model.formats and model.layout.tensor > 1:
        raise CheckpointError(
            f"quantized weights are saved from one device along the tensor axis, not "
            f"{model.layout.tensor}: give --mesh 1x1; what is saved restores on any mesh"
        )
    axes = axis_names(model, stacked=True)
    params = jax.tree.map(partial(_true_array, model.layout), axes, params)

    def chunks(names: AxisNames) -> orbax.Split:
        words = enumerate(names.words)
        return orbax.Split(tuple(axis for axis, word in words if word in STORED_SINGLY))

    split = jax.tree.map(chunks, axes)
    # How the original was quantized says nothing of what is saved.
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    metadata: dict[str, Any] = {"config": config, "model_digest": source.digest()}
    if model.formats:
        metadata["formats"] = model.formats
    orbax.save(path, _as_saved(params), metadata, source.tokenizer(), split=_as_saved(split))


def _as_saved(params: Params) -> dict[str, Any]:
    """Weights as nested dicts, which a quantized one is too."""

    def saved(weight: Any) -> Any:
        if not isinstance(weight, Quantized):
            return weight
        return {name: part for name, part in vars(weight).items() if part is not None}

    def is_weight(node: object) -> bool:
        return isinstance(node, Quantized)

    assert isinstance(params.layers, dict)
    return {
        "ends": jax.tree.map(saved, params.ends, is_leaf=is_weight),
        "layers": jax.tree.map(saved, params.layers, is_leaf=is_weight),
    }


def _true_array(
    layout: Layout, axes: AxisNames, array: jax.Array | np.ndarray
) -> jax.Array | np.ndarray:
    """A weight as the checkpoint has it: itself, or put together on the host."""
    shape = layout.true_shape(array.shape, axes.words)
    if shape == array.shape:
        return array
    assert isinstance(array, jax.Array)
    out = np.zeros(shape, array.dtype)
    for shard in array.addressable_shards:
        index = tuple(
            slice(*part.indices(size)[:2])
            for part, size in zip(shard.index, array.shape, strict=True)
        )
        data = np.asarray(shard.data)
        for into, box in layout.boxes(axes.words, index):
            out[box] = data[into]
    return out


def _read_box(
    read_into: Callable[[np.ndarray, Index], None], boxes: Boxes, dtype: Any, index: Index
) -> np.ndarray:
    """A box of a weight, as the layout has stretched it."""
    out = host_zeros(tuple(part.stop - part.start for part in index), dtype)
    for into, box in boxes(index):
        read_into(out[into], box)
    return out
