"""Where a model comes from: a checkpoint file, a directory that jaxserve saved, or nowhere.

``open_source`` looks at what the operator named and gives one of three sources with the same
methods, so that launching does not care. Formats are read in the files beside this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.layout import Layout
from jaxserve.models.presets import PRESETS, preset
from jaxserve.models.registry import model_config
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights import orbax
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.hub import resolve_model
from jaxserve.weights.load import AxisNames, axis_names, load_params, random_params, reporter
from jaxserve.weights.packed import (
    Boxes,
    Narrow,
    Quantization,
    check_method,
    choose_formats,
    narrows,
    rounded_formats,
    tree_of,
    why_widened,
)
from jaxserve.weights.reading import Index
from jaxserve.weights.safetensors import read_json_object, read_tokenizer_files
from jaxserve.weights.schemes import Scheme, scheme_of
from pallas_kernels.quantized_matmul import Format, Quantized, spec
from sharding.placement import host_zeros, place

DUMMY = "dummy:"
STORED_SINGLY = frozenset({"layer", "kv_heads", "q_heads"})
"""Axes of a saved weight that are cut at every entry, so that a shard's heads are read alone. Long
axes, feed-forward and vocabulary, are cut where a chunk is full."""
CONFIG_FILE = "config.json"
Progress = Callable[[int, int], None]
"""``progress(done_bytes, total_bytes)``."""


@runtime_checkable
class ModelSource(Protocol):
    """One model's config, tokenizer and weights."""

    name: str
    """For messages and progress."""
    config: Mapping[str, Any]
    """In the conventions of a Hugging Face ``config.json``."""

    def model_config(self) -> ModelConfig:
        """Returns the config in our own words; refuses what is not implemented."""
        ...

    def tokenizer(self) -> TokenizerSource | None:
        """Returns what the tokenizer is built from; None when there is none to be had."""
        ...

    def digest(self) -> str:
        """SHA-256 (hex) of weights, config and tokenizer."""
        ...

    def formats(self, quantization: Quantization) -> dict[str, Format]:
        """Returns which weights are held quantized, and how, by their names in the model.

        Raises:
            CheckpointError: the weights cannot be held so.
        """
        ...

    def why_widened(self, held: dict[str, Format]) -> dict[str, str]:
        """Says of each weight that is stored in few bits and not held so why it is not.

        Args:
            held: which weights are held quantized.
        """
        ...

    def load(self, model: Model, *, dtype: Any, shardings: Params, progress: Progress) -> Params:
        """Puts the weights onto their devices, layers stacked."""
        ...

    def close(self) -> None:
        """Closes files."""
        ...


def open_source(
    model: str, *, assets_dir: Path, offline: bool, random_weights: bool, seed: int
) -> ModelSource:
    """Finds a model: ``dummy:NAME``, a directory that ``save_model`` wrote, or a checkpoint.

    With ``random_weights`` a directory needs no more than its ``config.json``.

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is damaged.
        UnsupportedModelError: no built-in model of that name, or not our architecture.
    """
    if model.startswith(DUMMY):
        return RandomSource(model, preset(model.removeprefix(DUMMY)), seed)
    path = resolve_model(model, assets_dir=assets_dir, offline=offline)
    config_path = path / CONFIG_FILE
    if config_path.is_file() and not any(path.glob("*.gguf")):
        # Before weights are looked for: fetching them would not help an architecture we lack.
        hf_config = read_json_object(config_path)
        config = model_config(hf_config)
        scheme_of(str(path), hf_config)  # Refuses what is not read.
        if random_weights:
            tokenizer = read_tokenizer_files(path)
            if not tokenizer.files.keys() - {"config.json"}:
                tokenizer = None  # Bytes will do.
            return RandomSource(str(path), config, seed, hf_config, tokenizer)
    source = SavedSource(path) if orbax.is_orbax(path) else CheckpointSource(path)
    if random_weights:
        return RandomSource(
            source.name, source.model_config(), seed, source.config, source.tokenizer()
        )
    return source


def read_model_facts(
    model: str, quantization: Quantization, *, assets_dir: Path, offline: bool
) -> tuple[ModelConfig, dict[str, Format]]:
    """Reads what a model is, and none of its weights: of a hub id only ``config.json`` is fetched.

    Returns:
        Its config, and which weights are held quantized, as ``ModelSource.formats`` says it.

    Raises:
        CheckpointError: it is not there, cannot be fetched, is damaged, or cannot be held so.
        UnsupportedModelError: no built-in model of that name, or not our architecture.
    """
    if model.startswith(DUMMY):
        config = preset(model.removeprefix(DUMMY))
        return config, _formats_of_numbers(config, model, quantization)
    path = resolve_model(model, assets_dir=assets_dir, offline=offline, files=(CONFIG_FILE,))
    config_path = path if path.name == CONFIG_FILE else path / CONFIG_FILE
    if config_path.is_file() and not any(path.glob("*.gguf")):
        hf_config = read_json_object(config_path)
        scheme = scheme_of(str(path), hf_config)
        # What a tool has quantized is known by its tensors, if they are there.
        if scheme is None or not any(path.glob("*.safetensors")):
            config = model_config(hf_config)
            return config, _formats_of_numbers(config, model, quantization, scheme)
    where = {"assets_dir": assets_dir, "offline": offline}
    with closing(open_source(str(path), random_weights=False, seed=0, **where)) as source:
        return source.model_config(), source.formats(quantization)


class RandomSource:
    """A config with random weights, the same ones for the same seed."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        seed: int,
        hf_config: Mapping[str, Any] | None = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        self.name = name
        self.config: Mapping[str, Any] = (
            PRESETS[name.removeprefix(DUMMY)] if hf_config is None else hf_config
        )
        self._model = config
        self._seed = seed
        self._tokenizer = tokenizer

    def model_config(self) -> ModelConfig:
        """Returns the config that it was made with."""
        return self._model

    def tokenizer(self) -> TokenizerSource | None:
        """Returns the checkpoint's, when only the weights are random."""
        return self._tokenizer

    def digest(self) -> str:
        """Random weights are known by their config and seed."""
        facts = json.dumps([dict(self.config), self._seed], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def formats(self, quantization: Quantization) -> dict[str, Format]:
        """What its config says, or what is asked for, rounded where it is made."""
        scheme = scheme_of(self.name, self.config)
        return _formats_of_numbers(self._model, self.name, quantization, scheme)

    def why_widened(self, held: dict[str, Format]) -> dict[str, str]:
        """None are stored."""
        return {}

    def load(self, model: Model, *, dtype: Any, shardings: Params, progress: Progress) -> Params:
        """Makes the weights on their devices."""
        return random_params(
            model,
            seed=self._seed,
            dtype=dtype,
            stacked=True,
            shardings=shardings,
            progress=progress,
        )

    def close(self) -> None:
        """Holds nothing open."""


class CheckpointSource:
    """A GGUF file or a folder of safetensors."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._checkpoint: Checkpoint = open_checkpoint(path)
        self.config: Mapping[str, Any] = self._checkpoint.config

    def model_config(self) -> ModelConfig:
        """Returns the config; refuses what is not implemented."""
        return model_config(dict(self.config))

    def tokenizer(self) -> TokenizerSource | None:
        """Returns the checkpoint's files or metadata."""
        return self._checkpoint.tokenizer_files()

    def digest(self) -> str:
        """Of the checkpoint's contents."""
        return self._checkpoint.digest()

    def formats(self, quantization: Quantization) -> dict[str, Format]:
        """Those of the checkpoint's own blocks, or what is asked for."""
        return choose_formats(self.model_config(), self._checkpoint, quantization)

    def why_widened(self, held: dict[str, Format]) -> dict[str, str]:
        """Those whose tensors have no one format; see ``packed.why_widened``."""
        return why_widened(self.model_config(), self._checkpoint, held)

    def load(self, model: Model, *, dtype: Any, shardings: Params, progress: Progress) -> Params:
        """Reads tensor by tensor, each shard by itself."""
        return load_params(
            model,
            self._checkpoint,
            dtype=dtype,
            stacked=True,
            shardings=shardings,
            progress=progress,
        )

    def close(self) -> None:
        """Closes the files."""
        self._checkpoint.close()


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


def _formats_of_numbers(
    config: ModelConfig, name: str, quantization: Quantization, scheme: Scheme | None = None
) -> dict[str, Format]:
    """What weights are held as that are stored as plain numbers, or nowhere.

    With a scheme they are those of a checkpoint whose layers it quantizes, columns in order.
    """
    if quantization in ("awq", "gptq"):
        check_method(name, scheme and scheme.method, quantization)
    elif quantization not in ("none", "auto"):
        return rounded_formats(config, name, quantization)
    if scheme is None or quantization == "none":
        return {}
    formats = rounded_formats(config, name, scheme.format)
    return {weight: format for weight, format in formats.items() if weight.startswith("w_")}


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


def _true_array(layout: Layout, axes: AxisNames, array: jax.Array) -> jax.Array | np.ndarray:
    """A weight as the checkpoint has it: itself, or put together on the host."""
    shape = layout.true_shape(array.shape, axes.words)
    if shape == array.shape:
        return array
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
