"""Rounds a model's weights and writes them as an orbax checkpoint that is served as it is.

    open the source -> load as float32 -> search scales on text (calibration.py) -> round -> write

Without calibration text nothing is searched and the weights are rounded as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.calibration import Found, folded, search_scales
from jaxserve.config import ServeConfig
from jaxserve.convert import OpenModel, open_model
from jaxserve.errors import ConfigError, UnsupportedModelError
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.launch import Report, silent
from jaxserve.models.decoder import Model, Params
from jaxserve.weights.orbax import check_new
from jaxserve.weights.packed import rounded_formats
from jaxserve.weights.saved import save_model
from pallas_kernels.quantized_matmul import Format, Quantized, Spec, quantized, spec

FORMATS = ("int4", "int8", "fp8")
SEQUENCE_TOKENS = 256
"""Of calibration text that are attended to together."""
CALIBRATION_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text that stands for what the model will read."""

    path: Path
    tokens: int = CALIBRATION_TOKENS
    """Read at most. More take longer, and help as far as the text varies."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What was written."""

    path: Path
    file_bytes: int
    """Of everything in the directory."""
    parameters: int
    formats: dict[str, Format]
    layers: list[list[Found]]
    """What was found for the matrices of each layer; empty without calibration."""
    layer_seconds: list[float]
    calibration_tokens: int
    seconds: float


def quantize(
    config: ServeConfig,
    out: Path,
    format: str,
    *,
    group: int | None = None,
    calibration: Calibration | None = None,
    report: Report = silent,
) -> Rounded:
    """Rounds a model to a new directory, which is a model that can be launched.

    Args:
        config: of the model and the device.
        out: must not exist.
        format: one of ``FORMATS``.
        group: columns that share a scale; None: 32, and for fp8 all of a row. Where an axis is not
            whole groups, its groups are smaller.
        calibration: without it, matrices are rounded as they are.
        report: hears of the stages ``weights``, ``quantize`` and ``save``.

    Raises:
        LaunchError: a flag, a file or the machine has to change; the message says which and how.
    """
    start_s = time.perf_counter()
    wanted = _format(format, group)
    check_new(out)  # Before the weights are loaded for nothing.
    config = replace(config, mesh="1x1", dtype="float32")
    with open_model(config, stretched=False) as opened:
        model, name = opened.plan.model, opened.source.name
        if calibration is not None and model.experts:
            raise UnsupportedModelError(
                f"{name} is a mixture of {model.experts} experts, for which scales are not "
                "searched; leave --calibration out to round its weights as they are"
            )
        tokens = None if calibration is None else _calibration_tokens(opened, calibration)
        formats = rounded_formats(model, name, wanted, "it can only be served as it is")
        params = opened.load(report)
        made = _Rounding(opened, params, formats, report)
        layers, seconds = made.layers(tokens)
        report("save", 0, 1, str(out))
        model = Model(opened.plan.model, 1, formats)
        save_model(out, model, made.params(layers), opened.source)
        report("save", 1, 1, str(out))
        return Rounded(
            path=out,
            file_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            parameters=opened.plan.model.params,
            formats=formats,
            layers=made.found,
            layer_seconds=seconds,
            calibration_tokens=0 if tokens is None else tokens.size,
            seconds=time.perf_counter() - start_s,
        )


class _Rounding:
    """Rounds a loaded model layer by layer."""

    def __init__(
        self, opened: OpenModel, params: Params, formats: dict[str, Format], report: Report
    ) -> None:
        self.found: list[list[Found]] = []
        self._model, self._name = opened.plan.model, opened.source.name
        self._params, self._formats, self._report = params, formats, report

    def layers(self, tokens: np.ndarray | None) -> tuple[list[dict[str, Any]], list[float]]:
        """Returns the weights of each layer, and the seconds that each took."""
        assert isinstance(self._params.layers, dict)
        searches: Iterator[list[Found]] | None = None
        if tokens is not None:
            searches = search_scales(self._model, self._params, self._formats, tokens)
        made, seconds = list[dict[str, Any]](), list[float]()
        for number in range(self._model.layers):
            self._report("quantize", number, self._model.layers, self._name)
            start_s = time.perf_counter()
            stacks = self._params.layers.items()
            weights = {name: np.asarray(stack[number]) for name, stack in stacks}
            if searches is not None:
                self.found.append(next(searches))
                weights = folded(weights, self.found[-1], offset=self._model.norm_offset)
            made.append({name: self._rounded(name, array) for name, array in weights.items()})
            seconds.append(time.perf_counter() - start_s)
        self._report("quantize", self._model.layers, self._model.layers, self._name)
        return made, seconds

    def params(self, layers: list[dict[str, Any]]) -> Params:
        """Returns the whole model, layers stacked."""
        ends = {
            name: self._rounded(name, np.asarray(array))
            for name, array in self._params.ends.items()
        }
        return Params(ends, jax.tree.map(lambda *arrays: np.stack(arrays), *layers))

    def _rounded(self, name: str, array: np.ndarray) -> np.ndarray | Quantized:
        if name not in self._formats:
            if not np.isfinite(array).all():
                raise ConfigError(
                    f"{self._name}: {name} has a number that is not finite; fetch the checkpoint "
                    "again"
                )
            return array
        try:
            return quantized(array, self._formats[name])
        except ValueError as error:
            raise ConfigError(
                f"{self._name}: {name} cannot be held as {self._formats[name]}: {error}"
            ) from error


def _format(kind: str, group: int | None) -> Format:
    """The name of what is asked for."""
    if kind not in FORMATS:
        raise ConfigError(f"format is {kind!r}; choose one of {', '.join(FORMATS)}")
    its = spec(kind)
    if group is None:
        return kind
    if group < 32 or group % 32:
        raise ConfigError(f"group is {group}; give a multiple of 32, such as 32, 64 or 128")
    return Spec(its.kind, group).name


def _calibration_tokens(opened: OpenModel, calibration: Calibration) -> np.ndarray:
    """Reads sequences ``[B, T]`` of tokens.

    Raises:
        ConfigError: the file cannot be read, or holds less than a sequence.
    """
    path = calibration.path
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"--calibration {path} cannot be read: {reason}; give a file of text"
        ) from error
    length = min(SEQUENCE_TOKENS, opened.plan.model.context_tokens)
    if calibration.tokens < length:
        raise ConfigError(
            f"--calibration-tokens is {calibration.tokens}; give at least {length}, the tokens of "
            f"a sequence ({CALIBRATION_TOKENS} are usual)"
        )
    files = opened.source.tokenizer()
    tokenizer = byte_tokenizer() if files is None else load_tokenizer(files)
    ids = tokenizer.encode(text, add_special_tokens=False)[: calibration.tokens]
    if len(ids) < length:
        raise ConfigError(
            f"--calibration {path} gives {len(ids)} tokens and at least {length} are needed; give "
            f"text like what the model will read: {CALIBRATION_TOKENS} tokens are some 16 kB"
        )
    return np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
