"""Quantized weights: a GGUF file's blocks taken apart, plain numbers rounded, on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from jax.sharding import AxisType, Mesh

from jaxserve.errors import CheckpointError
from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import preset
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_params, random_params
from jaxserve.weights.packed import choose_formats, rounded_formats
from jaxserve.weights.saved import save_model
from jaxserve.weights.source import open_source
from pallas_kernels.quantized_matmul import (
    Format,
    Quantized,
    dequantized,
    quantized,
    spec,
)
from sharding.rules import ShardingRules
from sharding.specs import named_shardings, partition_specs
from tests.weights.test_gguf import one_tensor
from tests.weights.test_load import checkpoint_for

TINY = replace(preset("tiny-llama"), head_dim=32)
"""With whole groups along every axis that is summed over."""
EVERY: dict[str, Format] = dict.fromkeys(("embed", "w_qkv", "w_o", "w_gate_up", "w_down"), "int4")


def shardings_on(model: Model, devices: int) -> Any:
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = Mesh(np.array(jax.devices()[:devices])[None], ("data", "tensor"), axis_types=axes)
    return named_shardings(partition_specs(model.logical_axes(stacked=True), ShardingRules()), mesh)


def loaded(model: Model, checkpoint: Any, devices: int = 1) -> Params:
    return load_params(
        model,
        checkpoint,
        dtype=jnp.float32,
        stacked=True,
        shardings=shardings_on(model, devices),
    )


def random_on(model: Model, devices: int) -> Params:
    return random_params(
        model, seed=3, dtype=jnp.float32, stacked=True, shardings=shardings_on(model, devices)
    )


def plain(params: Params) -> dict[str, np.ndarray]:
    assert isinstance(params.layers, dict)
    return {
        name: np.asarray(dequantized(weight, jnp.float32))
        for name, weight in (params.ends | params.layers).items()
    }


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_taken_apart_and_not_rounded(name: str, tmp_path: Path) -> None:
    kind = Kind[name]
    # The top bit of every byte is clear, which keeps the float16 scales finite and positive.
    size = GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(1).integers(0, 64, (48, 3 * size), np.uint8)
    tensor = "model.embed_tokens.weight"
    with closing(one_tensor(tmp_path / "m.gguf", raw, kind)) as checkpoint:
        assert checkpoint.stored_format(tensor) == ("int8" if name == "Q8_0" else "int4")
        rows, groups = slice(5, 9), slice(1, 3)
        width = 16 if name != "Q8_0" else 32
        columns = slice(groups.start * width, groups.stop * width)
        box = Quantized(
            checkpoint.read_stored(tensor, "values", (rows, columns)),
            checkpoint.read_stored(tensor, "scale", (rows, groups)),
            None if width == 32 else checkpoint.read_stored(tensor, "minimum", (rows, groups)),
        )
    found = np.asarray(dequantized(box, jnp.float32))
    np.testing.assert_allclose(found, dequantize(raw, kind)[rows, 32:96], rtol=1e-6, atol=1e-6)


def test_other_tensors_have_no_stored_format(tmp_path: Path) -> None:
    with closing(one_tensor(tmp_path / "m.gguf", np.ones((48, 32), np.float32))) as checkpoint:
        assert checkpoint.stored_format("model.embed_tokens.weight") is None


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, pytest.param(4, marks=pytest.mark.wide)])
def test_smollm2_is_held_as_its_file_stores_it(devices: int, assets: Callable[[str], Path]) -> None:
    with closing(open_checkpoint(assets("smollm2"))) as checkpoint:
        config = open_source(
            str(assets("smollm2")), assets_dir=Path(), offline=True, random_weights=False, seed=0
        ).model_config()
        formats = choose_formats(config, checkpoint, "auto")
        assert formats == EVERY | {"embed": "int8"}
        packed = plain(loaded(Model(config, devices, formats), checkpoint, devices))
        expected = plain(loaded(Model(config, devices), checkpoint, devices))
    assert packed.keys() == expected.keys()
    for name, weight in expected.items():
        # The feed-forward may have more zeros at its end, to be whole groups on each device.
        found = packed[name][tuple(slice(size) for size in weight.shape)]
        np.testing.assert_allclose(found, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_plain_numbers_are_rounded_as_a_whole_whatever_the_mesh(
    format: Literal["int8", "int4"], devices: int
) -> None:
    """The largest of a group decides its scale, so a shard must not cut one."""
    checkpoint = checkpoint_for(Model(TINY))
    # Within float16, as scales are.
    checkpoint.tensors = {name: 1e-4 * values for name, values in checkpoint.tensors.items()}
    formats = choose_formats(TINY, checkpoint, format)
    assert formats == dict.fromkeys(EVERY, format) | {"embed": "int8"}
    model = Model(TINY, devices, formats)
    params = loaded(model, checkpoint, devices)
    expected = plain(loaded(Model(TINY), checkpoint))
    found = plain(params)
    for name, weight in expected.items():
        if name in formats:
            weight = np.asarray(dequantized(quantized(weight, formats[name]), jnp.float32))
        box = tuple(slice(size) for size in weight.shape)
        if name not in ("w_qkv", "w_o"):  # Where groups are copied or zeros stand between.
            np.testing.assert_array_equal(found[name][box], weight)
            assert found[name].sum() == pytest.approx(weight.sum(), rel=1e-5)
        elif devices == 1:
            np.testing.assert_array_equal(found[name], weight)


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e9, "a group's scale would be 7.87402e.06 as int8"), (np.nan, "a number that is nan")],
)
def test_what_cannot_be_rounded_is_named_with_the_remedy(value: float, message: str) -> None:
    checkpoint = checkpoint_for(Model(TINY))
    tensor = "model.layers.1.mlp.down_proj.weight"
    checkpoint.tensors = {name: 1e-4 * values for name, values in checkpoint.tensors.items()}
    checkpoint.tensors[tensor][3, 4] = value
    formats = choose_formats(TINY, checkpoint, "int8")
    start = f"checkpoint-in-memory: '{tensor}' cannot be held as int8: .*"
    with pytest.raises(CheckpointError, match=f"{start}{message}.*: give --quantization none"):
        loaded(Model(TINY, 1, formats), checkpoint)


def test_shards_of_the_feed_forward_are_whole_groups() -> None:
    config = replace(TINY, ffn=96)
    assert Model(config, 4).config.ffn == 96
    assert Model(config, 4, EVERY).config.ffn == 128
    assert Model(config, 1, EVERY).config.ffn == 96


def test_an_axis_that_is_no_whole_groups_is_refused() -> None:
    config = preset("tiny-llama")
    checkpoint = checkpoint_for(Model(config))
    with pytest.raises(
        CheckpointError, match=r"as int8: the last axis of w_o \(16\) is not a multiple"
    ):
        choose_formats(config, checkpoint, "int8")
    assert choose_formats(config, checkpoint, "auto") == {}
    assert choose_formats(config, checkpoint, "none") == {}


@pytest.mark.parametrize("format", ["int8", "int8/row", "int4"])
def test_random_weights_are_rounded_where_they_are_made(format: Format) -> None:
    """The same ones on two devices as on one, and half a step from the plain ones."""
    formats = rounded_formats(TINY, "dummy", format)
    one = plain(random_on(Model(TINY, 1, formats), 1))
    expected = plain(random_on(Model(TINY), 1))
    for name, found in one.items():
        if name in formats:
            its = spec(formats[name])
            grouped = expected[name].reshape(-1, its.group or found.shape[-1])
            most = np.abs(grouped).max(axis=-1, keepdims=True)
            step = most / 127 if its.kind == "int8" else 2 * most / 15
            error = np.abs(found - expected[name]).reshape(grouped.shape)
            assert (error <= 0.52 * step + 2e-3 * most).all()
            assert (error > 0).any()
        else:
            np.testing.assert_array_equal(found, expected[name])
    two = plain(random_on(Model(TINY, 2, formats), 2))
    for name, found in one.items():
        np.testing.assert_array_equal(two[name], found)


def test_w8a8_has_a_scale_for_each_row() -> None:
    checkpoint = checkpoint_for(Model(TINY))
    layers = ("w_qkv", "w_o", "w_gate_up", "w_down")
    expected = dict.fromkeys(layers, "int8/row") | {"embed": "int8"}
    assert choose_formats(TINY, checkpoint, "w8a8") == expected


def test_saved_weights_are_not_rounded(tmp_path: Path) -> None:
    def opened(model: str) -> Any:
        return open_source(model, assets_dir=tmp_path, offline=True, random_weights=False, seed=0)

    source = opened("dummy:tiny-llama")
    assert source.formats("auto") == source.formats("none") == {}
    with pytest.raises(
        CheckpointError, match=r"dummy:tiny-llama cannot be held as int4: .* w_o \(16\) is"
    ):
        source.formats("int4")
    model = Model(source.model_config())
    save_model(tmp_path / "saved", model, loaded(model, checkpoint_for(model)), source)
    saved = opened(str(tmp_path / "saved"))
    assert saved.formats("auto") == saved.formats("none") == {}
    with pytest.raises(CheckpointError, match=r"saved cannot be held as int8: weights are rounded"):
        saved.formats("int8")


def test_quantized_weights_are_saved_from_one_device_along_the_tensor_axis(tmp_path: Path) -> None:
    model = Model(TINY, 2, EVERY)
    checkpoint = checkpoint_for(model)
    checkpoint.tensors = {name: 1e-4 * values for name, values in checkpoint.tensors.items()}
    params = loaded(model, checkpoint, 2)
    source = open_source(
        "dummy:tiny-llama", assets_dir=tmp_path, offline=True, random_weights=False, seed=0
    )
    with pytest.raises(
        CheckpointError, match=r"saved from one device along the tensor axis, not 2"
    ):
        save_model(tmp_path / "saved", model, params, source)
    assert not (tmp_path / "saved").exists()
