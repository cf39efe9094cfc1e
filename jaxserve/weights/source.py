"""Where a model comes from: a checkpoint file, a directory that jaxserve saved, or nowhere.

``open_source`` looks at what the operator named and gives one of three sources with the same
methods, so that launching does not care. Formats are read in the files beside this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
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
from jaxserve.weights.packed import Quantization, choose_formats, rounded_formats
from jaxserve.weights.reading import Index
from jaxserve.weights.safetensors import read_json_object, read_tokenizer_files
from pallas_kernels.quantized_matmul import Format
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
        config = model_config(read_json_object(config_path))
        # Safetensors hold plain numbers.
        return config, _formats_of_numbers(config, model, quantization)
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
        """None are of themselves; what is asked for is rounded where it is made."""
        return _formats_of_numbers(self._model, self.name, quantization)

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
        """What was saved are plain numbers, which are not rounded."""
        if quantization in ("none", "auto"):
            return {}
        raise CheckpointError(
            f"{self.name} cannot be held as {quantization}: weights are rounded while safetensors "
            "or GGUF are read; give such a checkpoint, or --quantization none"
        )

    def load(self, model: Model, *, dtype: Any, shardings: Params, progress: Progress) -> Params:
        """Reads weight by weight, each shard by itself."""
        abstract = model.abstract(dtype, stacked=True)
        true = Model(model.layout.config).abstract(dtype, stacked=True)
        stored = orbax.open_arrays(self._path, {"ends": true.ends, "layers": true.layers})
        placed = reporter(abstract, progress)

        def load(
            axes: AxisNames, array: orbax.StoredArray, here: jax.ShapeDtypeStruct, to: Any
        ) -> jax.Array:
            read = partial(_read_box, array, model.layout, axes, here.dtype)
            return placed(place(read, here.shape, here.dtype, to))

        axes = axis_names(model, stacked=True)
        return jax.tree.map(
            load, axes, Params(stored["ends"], stored["layers"]), abstract, shardings
        )

    def close(self) -> None:
        """Holds nothing open."""


def _formats_of_numbers(
    config: ModelConfig, name: str, quantization: Quantization
) -> dict[str, Format]:
    """What weights are held as that are stored as plain numbers, or nowhere."""
    if quantization in ("none", "auto"):
        return {}
    return rounded_formats(config, name, quantization)


def save_model(path: Path, model: Model, params: Params, source: ModelSource) -> None:
    """Writes stacked weights as a directory that ``open_source`` opens again, for any mesh.

    What the mesh has stretched is copied on the host first.

    Raises:
        CheckpointError: the path exists or cannot be written, or the weights are quantized.
    """
    if model.formats:
        raise CheckpointError(
            "quantized weights are not saved: what was rounded cannot be had back; start with "
            "--quantization none, or use jaxserve convert"
        )
    axes = axis_names(model, stacked=True)
    params = jax.tree.map(partial(_true_array, model.layout), axes, params)

    def chunks(names: AxisNames) -> orbax.Split:
        words = enumerate(names.words)
        return orbax.Split(tuple(axis for axis, word in words if word in STORED_SINGLY))

    split = jax.tree.map(chunks, axes)
    metadata = {"config": dict(source.config), "model_digest": source.digest()}
    orbax.save(
        path,
        {"ends": params.ends, "layers": params.layers},
        metadata,
        source.tokenizer(),
        split={"ends": split.ends, "layers": split.layers},
    )


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
    stored: orbax.StoredArray, layout: Layout, axes: AxisNames, dtype: Any, index: Index
) -> np.ndarray:
    """A box of a weight, as the layout has stretched it."""
    out = host_zeros(tuple(part.stop - part.start for part in index), dtype)
    for into, box in layout.boxes(axes.words, index):
        stored.read_into(out[into], box)
    return out
