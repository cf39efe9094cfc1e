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

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import PRESETS, preset
from jaxserve.models.registry import model_config
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights import orbax
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.hub import resolve_model
from jaxserve.weights.load import AxisNames, axis_names, load_params, random_params
from jaxserve.weights.reading import Index
from jaxserve.weights.safetensors import read_json_object, read_tokenizer_files
from sharding.placement import place

DUMMY = "dummy:"
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


def read_model_config(model: str, *, assets_dir: Path, offline: bool) -> ModelConfig:
    """Reads what a model is, and none of its weights: of a hub id only ``config.json`` is fetched.

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is damaged.
        UnsupportedModelError: no built-in model of that name, or not our architecture.
    """
    if model.startswith(DUMMY):
        return preset(model.removeprefix(DUMMY))
    path = resolve_model(model, assets_dir=assets_dir, offline=offline, files=(CONFIG_FILE,))
    config_path = path if path.name == CONFIG_FILE else path / CONFIG_FILE
    if config_path.is_file() and not any(path.glob("*.gguf")):
        return model_config(read_json_object(config_path))
    where = {"assets_dir": assets_dir, "offline": offline}
    with closing(open_source(str(path), random_weights=False, seed=0, **where)) as source:
        return source.model_config()


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

    def load(self, model: Model, *, dtype: Any, shardings: Params, progress: Progress) -> Params:
        """Restores every shard on its own device.

        A weight that the mesh does not divide comes by way of the host, which stretches it.
        """
        abstract = model.abstract(dtype, stacked=True)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        progress(0, total)
        stored = Model(model.layout.config).abstract(dtype, stacked=True)

        def wanted(true: jax.ShapeDtypeStruct, here: jax.ShapeDtypeStruct, sharding: Any) -> Any:
            if true.shape == here.shape:
                return jax.ShapeDtypeStruct(true.shape, true.dtype, sharding=sharding)
            return np.zeros(true.shape, true.dtype)

        tree = jax.tree.map(wanted, stored, abstract, shardings)
        restored = orbax.restore(self._path, {"ends": tree.ends, "layers": tree.layers})

        def placed(axes: AxisNames, value: Any, here: jax.ShapeDtypeStruct, to: Any) -> jax.Array:
            if isinstance(value, jax.Array):
                return value
            return place(partial(_box_of, value, model, axes), here.shape, here.dtype, to)

        params = Params(restored["ends"], restored["layers"])
        axes = axis_names(model, stacked=True)
        params = jax.tree.map(placed, axes, params, abstract, shardings)
        progress(total, total)
        return params

    def close(self) -> None:
        """Holds nothing open."""


def save_model(path: Path, model: Model, params: Params, source: ModelSource) -> None:
    """Writes served weights as a directory that ``open_source`` opens again, for any mesh.

    Raises:
        CheckpointError: the path exists or cannot be written.
    """

    def true(axes: AxisNames, array: jax.Array) -> jax.Array:
        return model.layout.shrink(array, axes.words)

    params = jax.tree.map(true, axis_names(model, stacked=True), params)
    metadata = {"config": dict(source.config), "model_digest": source.digest()}
    tree = {"ends": params.ends, "layers": params.layers}
    orbax.save(path, tree, metadata, source.tokenizer())


def _box_of(stored: np.ndarray, model: Model, axes: AxisNames, index: Index) -> np.ndarray:
    """A box of a stretched weight, from the whole as it was saved."""
    out = np.zeros([part.stop - part.start for part in index], stored.dtype)
    for into, box in model.layout.boxes(axes.words, index):
        out[into] = stored[box]
    return out
