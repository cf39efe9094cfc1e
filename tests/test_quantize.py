"""``jaxserve quantize``: what is written serves, and what cannot be is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve import LLM
from jaxserve.calibration import SEARCHED
from jaxserve.config import ServeConfig
from jaxserve.convert import OpenModel, convert
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxserve.models.decoder import Params
from jaxserve.models.presets import PRESETS, preset
from jaxserve.quantize import Calibration, quantize
from jaxserve.weights.packed import rounded_formats

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely. " * 40


def config_of(model: Path | str, tmp_path: Path) -> ServeConfig:
    return ServeConfig(
        model=str(model), assets_dir=tmp_path, cache_dir=tmp_path / "cache", device="cpu"
    )


@pytest.fixture
def wide_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model whose heads are whole groups."""
    wide = PRESETS["tiny-llama"] | {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256}
    monkeypatch.setitem(PRESETS, "tiny-wide", wide)
    return "dummy:tiny-wide"


def served(model: str | Path, **config: Any) -> LLM:
    return LLM(
        str(model),
        **{"dtype": "float32", "context_tokens": 64, "max_rows": 1, "step_tokens": 16} | config,
        kv_memory_bytes=2**20,
        progress=False,
        cache_dir=Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "group", "mesh", "off"),
    [("int4", 64, {"device": "cpu:2", "mesh": "1x2"}, 3.0), ("fp8", None, {"device": "cpu"}, 1.5)],
)
def test_what_is_written_serves_on_any_mesh(
    format: str,
    group: int | None,
    mesh: dict[str, str],
    off: float,
    wide_preset: str,
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    config = config_of(wide_preset, tmp_path)
    done = quantize(
        *(config, tmp_path / "out", format),
        group=group,
        calibration=Calibration(path=text, tokens=600),
    )
    assert done.calibration_tokens == 512
    assert len(done.layers) == len(done.layer_seconds) == 2
    assert all(one.error <= one.plain_error for found in done.layers for one in found)
    layers = "int4/64" if group else format
    assert done.formats == dict.fromkeys(SEARCHED, layers) | {"embed": "int8"}
    with served(tmp_path / "out", **mesh) as llm:
        assert llm.info.quantization == ("int4+int8" if group else "fp8+int8")
        found = llm.score("The sky is blue").total_logprob
    with served(wide_preset, device="cpu", quantization="none") as llm:
        plain = llm.score("The sky is blue").total_logprob
    assert found == pytest.approx(plain, abs=off)


def test_without_text_weights_are_rounded_as_they_are(wide_preset: str, tmp_path: Path) -> None:
    stages: list[str] = []
    done = quantize(
        *(config_of(wide_preset, tmp_path), tmp_path / "out", "int4"),
        report=lambda stage, done, total, detail: stages.append(stage),
    )
    assert (done.layers, done.calibration_tokens) == ([], 0)
    assert list(dict.fromkeys(stages)) == ["weights", "quantize", "save"]
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(config_of(wide_preset, tmp_path), tmp_path / "out", "int4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"text.txt gives 0 tokens and at least 256 are needed; give text like what"),
        (b"too short", r"gives 9 tokens and at least 256"),
        (b"\xff\xfe\x00", r"text.txt cannot be read: it is not UTF-8; give a file of text"),
        (None, r"text.txt cannot be read: No such file or directory"),
    ],
)
def test_text_that_says_nothing_is_refused(
    content: bytes | None, message: str, wide_preset: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        quantize(
            *(config_of(wide_preset, tmp_path), tmp_path / "out", "int4"),
            calibration=Calibration(path=text),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", [-5000, 0, 100])
def test_too_few_tokens_to_search_on_are_refused(
    tokens: int, wide_preset: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("much to read " * 1000)
    with pytest.raises(ConfigError, match=rf"--calibration-tokens is {tokens}; give at least 256"):
        quantize(
            *(config_of(wide_preset, tmp_path), tmp_path / "out", "int4"),
            calibration=Calibration(path=text, tokens=tokens),
        )


def test_what_was_saved_quantized_is_not_rounded_again(wide_preset: str, tmp_path: Path) -> None:
    config = config_of(wide_preset, tmp_path)
    quantize(config, tmp_path / "out", "int4")
    saved = replace(config, model=str(tmp_path / "out"))
    said = r"out was saved as int4\+int8, which is neither rounded nor widened again; give the"
    with pytest.raises(CheckpointError, match=said):
        quantize(saved, tmp_path / "again", "int8")
    with pytest.raises(CheckpointError, match=said):
        convert(saved, tmp_path / "again")


def test_what_cannot_be_asked_for_is_refused(wide_preset: str, tmp_path: Path) -> None:
    config, out = config_of(wide_preset, tmp_path), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"format is 'int3'; choose one of int4, int8, fp8"):
        quantize(config, out, "int3")
    for group in (0, 48, -32):
        with pytest.raises(ConfigError, match=rf"group is {group}; give a multiple of 32"):
            quantize(config, out, "int4", group=group)
    with pytest.raises(
        CheckpointError, match=r"the last axis of w_o \(16\) is not a multiple of 32"
    ):
        quantize(config_of("dummy:tiny-llama", tmp_path), out, "int4")


def test_weights_that_are_not_finite_are_refused(
    wide_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = OpenModel.load

    def spoilt(self: Any, report: Any) -> Params:
        params = load(self, report)
        assert isinstance(params.layers, dict)
        params.layers["w_o"] = params.layers["w_o"].at[0, 0].set(jnp.nan)
        return params

    config = config_of(wide_preset, tmp_path)
    monkeypatch.setattr(OpenModel, "load", spoilt)
    with pytest.raises(ConfigError, match=r"tiny-wide: w_o cannot be held as int4: .*that is nan"):
        quantize(config, tmp_path / "out", "int4")


def test_scales_of_experts_are_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = PRESETS["tiny-mixtral"] | {"head_dim": 32}
    monkeypatch.setitem(PRESETS, "tiny-wide-mixtral", wide)
    config = config_of("dummy:tiny-wide-mixtral", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(
        UnsupportedModelError, match=r"is a mixture of \d+ experts, for which .*--c"
    ):
        quantize(config, tmp_path / "out", "int4", calibration=Calibration(path=text))
    assert quantize(config, tmp_path / "out", "int4").formats["w_down"] == "int4"


def test_formats_of_every_matrix_are_named() -> None:
    formats = rounded_formats(preset("smollm2-135m"), "smollm2", "int4/128")
    assert formats == {
        "embed": "int8",
        "w_qkv": "int4/64",  # 576 columns are no whole 128.
        "w_o": "int4/64",
        "w_gate_up": "int4/64",
        "w_down": "int4/128",
    }
