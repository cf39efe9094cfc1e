"""Where a model comes from: a checkpoint file, a directory that jaxserve saved, or nowhere.

``open_source`` looks at what the operator named and gives one of three sources with the same
methods, so that launching does not care. Formats are read in the files beside this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import PRESETS, preset
from jaxserve.models.registry import model_config
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights import orbax
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.hub import resolve_model
from jaxserve.weights.load import load_params, random_params
from jaxserve.weights.packed import (
    ROUNDED,
    Quantization,
    check_method,
    choose_formats,
    rounded_formats,
    why_widened,
)
from jaxserve.weights.safetensors import read_json_object, read_tokenizer_files
from jaxserve.weights.saved import SavedSource
from jaxserve.weights.schemes import Scheme, scheme_of
from pallas_kernels.quantized_matmul import Format

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


def _formats_of_numbers(
    config: ModelConfig, name: str, quantization: Quantization, scheme: Scheme | None = None
) -> dict[str, Format]:
    """What weights are held as that are stored as plain numbers, or nowhere.

    With a scheme they are those of a checkpoint whose layers it quantizes, columns in order.
    """
    if quantization in ("awq", "gptq"):
        check_method(name, scheme and scheme.method, quantization)
    elif quantization not in ("none", "auto"):
        return rounded_formats(config, name, ROUNDED[quantization])
    if scheme is None or quantization == "none":
        return {}
    formats = rounded_formats(config, name, scheme.format)
    return {weight: format for weight, format in formats.items() if weight.startswith("w_")}
