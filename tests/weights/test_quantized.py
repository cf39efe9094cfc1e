"""Checkpoints of AWQ, GPTQ and compressed-tensors: their own numbers, read, held and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.decoder import Model
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.packed import choose_formats, held_formats, rounded_formats, why_widened
from jaxserve.weights.saved import save_model
from jaxserve.weights.source import open_source, read_model_facts
from pallas_kernels.quantized_matmul import Quantized, dequantized, quantized
from tests.weights import tool_files
from tests.weights.test_packed import loaded
from tests.weights.tool_files import TOOLS, gptq

LAYERS_WEIGHTS = ("w_qkv", "w_o", "w_gate_up", "w_down")
FORMATS = {
    "awq": "int4/128",
    "awq-64": "int4/64",
    "gptq": "int4/128",
    "gptq-v2": "int4/64",
    "gptq-act-order": "int4/64/ordered",
    "gptq-8": "int8/128",
    "gptq-8-asymmetric": None,
    "w4a16": "int4/128",
    "w4a16-asymmetric": "int4/64",
    "w8a16": "int8/128",
    "w8a8": "int8/row",
    "fp8": "fp8",
    "fp8-tensor": "fp8",
}
"""What the linear layers are held as, but for a head size of 64, which ends groups of ``w_o``. Of
w8a16 the one scale of a row is repeated: held as one, activations might be rounded, too."""


def opened(path: Path) -> Any:
    return open_source(str(path), assets_dir=path, offline=True, random_weights=False, seed=0)


def in_true_order(weight: Any) -> np.ndarray:
    """A held weight's numbers, with columns in the order of the activations."""
    stored = np.asarray(dequantized(weight, jnp.float32))
    if not isinstance(weight, Quantized) or weight.order is None:
        return stored
    order = np.asarray(weight.order)
    flat = stored.reshape(*stored.shape[: stored.ndim - order[0].squeeze().ndim], -1)
    index = np.broadcast_to(order.reshape(len(order), *(1,) * (flat.ndim - 2), -1), flat.shape)
    out = np.empty_like(flat)
    np.put_along_axis(out, index, flat, axis=-1)
    return out.reshape(stored.shape)


@pytest.mark.parametrize("tool", TOOLS)
def test_numbers_are_those_that_the_tool_defines(tool: str, tmp_path: Path) -> None:
    plain = tool_files.write(tmp_path, *TOOLS[tool])
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        for name, numbers in plain.items():
            assert checkpoint.shape(name) == numbers.shape
            np.testing.assert_allclose(checkpoint.read(name), numbers, rtol=1e-6, atol=1e-9)
            if numbers.ndim == 2:
                box = checkpoint.read(name, (slice(3, 11), slice(70, 150)))
                np.testing.assert_allclose(box, numbers[3:11, 70:150], rtol=1e-6, atol=1e-9)
        names = set(checkpoint.names())
        assert {name for name in names if not name.endswith(".bias")} == plain.keys()


@pytest.mark.parametrize("has_native", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("tool", TOOLS)
def test_weights_are_held_as_they_are_stored(
    tool: str, devices: int, has_native: bool, tmp_path: Path
) -> None:
    """The same numbers, but for float16's rounding of minima: 2**-11 of each, and of scales."""
    plain = tool_files.write(tmp_path / "q", *TOOLS[tool])
    tool_files.write_plain(tmp_path / "p", plain)
    with (
        closing(open_checkpoint(tmp_path / "q")) as checkpoint,
        closing(open_checkpoint(tmp_path / "p")) as floats,
    ):
        config = opened(tmp_path / "p").model_config()
        formats = choose_formats(config, checkpoint, "auto")
        whole = FORMATS[tool]
        at_heads = whole and whole.replace("128", "64")
        expected = dict.fromkeys(LAYERS_WEIGHTS, whole) | {"w_o": at_heads}
        assert formats == {name: format for name, format in expected.items() if format}
        held = held_formats(formats, config, has_native=has_native, tensor=devices)
        model = Model(config, devices, held)
        found = loaded(model, checkpoint, devices)
        wanted = loaded(Model(config, devices), floats, devices)
    assert isinstance(found.layers, dict)
    assert isinstance(wanted.layers, dict)
    for name, weight in wanted.layers.items():
        here = found.layers[name]
        assert isinstance(here, Quantized) == (name in held)
        if isinstance(here, Quantized) and has_native and here.kind != "fp8":
            assert here.group == 32
        numbers = in_true_order(here)[tuple(slice(size) for size in weight.shape)]
        weight = np.asarray(weight)
        inputs = (-2, -1) if name == "w_o" else -1  # A group may be of two heads.
        largest = np.abs(weight).max(axis=inputs, keepdims=True)
        assert (np.abs(numbers - weight) <= 2**-11 * largest + 2**-24).all(), name


def test_columns_in_another_order_are_not_divided_among_devices(tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS["gptq-act-order"])
    with closing(opened(tmp_path)) as source:
        config, formats = source.model_config(), source.formats("gptq")
        held = held_formats(formats, config, has_native=False, tensor=2)
        assert held == {"w_qkv": "int4/64/ordered", "w_gate_up": "int4/64/ordered"}
        why = "stored as gptq of 4 bits; its columns are in another order and divided among devices"
        assert source.why_widened(held) == {"w_o": why, "w_down": why}
        assert source.why_widened(formats) == {}
    tool_files.write(tmp_path / "awq", *TOOLS["awq"])
    with closing(opened(tmp_path / "awq")) as source:
        assert source.why_widened({"w_qkv": "int4", "w_o": "int4", "w_down": "int4"}) == {
            "w_gate_up": "stored as awq of 4 bits; the CPU has no kernels built that read it so"
        }


def test_parts_in_different_orders_are_widened(tmp_path: Path) -> None:
    config, one = gptq(64, act_order=True)

    def differing(module: str, matrix: np.ndarray) -> tool_files.Stored:
        layer = module.replace("layers.0", "layers.1") if module.endswith("v_proj") else module
        return one(layer, matrix)

    tool_files.write(tmp_path, config, differing)
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        model = opened(tmp_path).model_config()
        formats = choose_formats(model, checkpoint, "auto")
        assert formats.keys() == {"w_o", "w_gate_up", "w_down"}
        assert (
            "their columns in different orders" in why_widened(model, checkpoint, formats)["w_qkv"]
        )


def test_what_no_format_has_is_widened_and_named(tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS["gptq-8-asymmetric"])
    with closing(opened(tmp_path)) as source:
        reasons = source.why_widened(source.formats("auto"))
    why = "stored as gptq of 8 bits; no format here has its numbers"
    assert reasons == dict.fromkeys(LAYERS_WEIGHTS, why)


@pytest.mark.parametrize(("tool", "asked"), [("awq", "int4"), ("w8a16", "int8"), ("fp8", "fp8")])
def test_what_is_stored_so_already_is_not_rounded_again(
    tool: str, asked: Any, tmp_path: Path
) -> None:
    tool_files.write(tmp_path, *TOOLS[tool])
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        config = opened(tmp_path).model_config()
        kept = loaded(Model(config, 1, choose_formats(config, checkpoint, "auto")), checkpoint)
        again = loaded(Model(config, 1, choose_formats(config, checkpoint, asked)), checkpoint)
    for name in LAYERS_WEIGHTS:
        np.testing.assert_array_equal(
            in_true_order(kept.layers[name]),  # pyright: ignore[reportCallIssue, reportArgumentType]
            in_true_order(again.layers[name]),  # pyright: ignore[reportCallIssue, reportArgumentType]
        )


@pytest.mark.parametrize("devices", [1, 2])
def test_floats_are_rounded_to_fp8_by_whole_rows_on_any_mesh(devices: int, tmp_path: Path) -> None:
    path = tool_files.write_plain(tmp_path, tool_files.drawn())
    with closing(open_checkpoint(path)) as checkpoint:
        config = opened(path).model_config()
        formats = choose_formats(config, checkpoint, "fp8")
        assert formats == dict.fromkeys(LAYERS_WEIGHTS, "fp8") | {"embed": "int8"}
        held = held_formats(formats, config, has_native=True, tensor=devices)
        found = loaded(Model(config, devices, held), checkpoint, devices)
        down = checkpoint.read("model.layers.1.mlp.down_proj.weight")
    expected = np.asarray(dequantized(quantized(down, "fp8"), jnp.float32))
    here = found.layers["w_down"]  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert here.values.dtype == ml_dtypes.float8_e4m3fn
    assert here.scale.shape == (2, 256, 1)
    np.testing.assert_array_equal(np.asarray(dequantized(here, jnp.float32))[1], expected)


@pytest.mark.parametrize("tool", ["awq", "gptq-act-order", "w8a8", "fp8"])
def test_quantized_weights_are_saved_and_restored_on_any_mesh(tool: str, tmp_path: Path) -> None:
    tool_files.write(tmp_path / "q", *TOOLS[tool])
    with closing(opened(tmp_path / "q")) as source:
        config = source.model_config()
        model = Model(config, 1, source.formats("auto"))
        with closing(open_checkpoint(tmp_path / "q")) as checkpoint:
            params = loaded(model, checkpoint)
        save_model(tmp_path / "saved", model, params, source)
    saved = opened(tmp_path / "saved")
    formats = saved.formats("auto")
    assert formats == model.formats
    assert saved.why_widened(formats) == {}
    assert saved.formats(params.layers["w_qkv"].kind) == formats  # pyright: ignore
    with pytest.raises(CheckpointError, match=r"cannot be held as none: it was saved as"):
        saved.formats("none")
    devices = 1 if "order" in tool else 2
    held = held_formats(formats, config, has_native=True, tensor=devices)
    laid_out = Model(config, devices, held)
    found = restored(saved, laid_out, devices)
    for name, weight in params.layers.items():  # pyright: ignore[reportAttributeAccessIssue]
        numbers = in_true_order(found.layers[name])
        wanted = in_true_order(weight)
        np.testing.assert_array_equal(numbers[tuple(map(slice, wanted.shape))], wanted)


def restored(source: Any, model: Model, devices: int) -> Any:
    from tests.weights.test_packed import shardings_on

    return source.load(
        model,
        dtype=jnp.float32,
        shardings=shardings_on(model, devices),
        progress=lambda done, total: None,
    )


def test_a_plan_knows_formats_from_the_config_alone(tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS["awq"])
    facts = read_model_facts(str(tmp_path), "awq", assets_dir=tmp_path, offline=True)
    (tmp_path / "model.safetensors").unlink()
    alone = read_model_facts(str(tmp_path), "awq", assets_dir=tmp_path, offline=True)
    expected = dict.fromkeys(LAYERS_WEIGHTS, "int4/128") | {"w_o": "int4/64"}
    assert facts == alone == (facts[0], expected)
    random = open_source(
        str(tmp_path), assets_dir=tmp_path, offline=True, random_weights=True, seed=0
    )
    assert random.formats("auto") == expected
    assert random.why_widened(expected) == {}


def test_a_tool_that_is_insisted_on_must_have_written_the_checkpoint(tmp_path: Path) -> None:
    tool_files.write(tmp_path / "gptq", *TOOLS["gptq"])
    tool_files.write_plain(tmp_path / "plain", tool_files.drawn())
    for path, what in (("gptq", "quantized with gptq"), ("plain", "not quantized by such a tool")):
        with (
            closing(opened(tmp_path / path)) as source,
            pytest.raises(CheckpointError, match=f"is {what}, and --quantization is awq; give "),
        ):
            source.formats("awq")
    dummy = open_source(
        "dummy:tiny-llama", assets_dir=tmp_path, offline=True, random_weights=False, seed=0
    )
    with pytest.raises(CheckpointError, match="quantization is gptq; give --quantization auto"):
        dummy.formats("gptq")


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


GATE = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("tool", "tensor", "made", "message"),
    [
        ("awq", "qzeros", None, r"has no '.*gate_proj.qzeros': a matrix of awq has qweight, qzer"),
        (
            *("awq", "scales", np.ones((3, 384), np.float16)),
            r"scales' is F16\[3, 384\]; it must be F16 or BF16 or F32 \[2, 384\], with 4 bits in",
        ),
        ("awq", "scales", np.ones((2, 384), np.int32), r"scales' is I32\[2, 384\]; it must be F16"),
        ("awq", "qweight", np.ones(8, np.int32), r"qweight' has 1 axes and a matrix has 2"),
        (
            *("awq", "qweight", np.ones((96, 48), np.int32)),
            r"qweight' has 96 columns, not a multiple of the group of 128; correct group_size",
        ),
        ("gptq", "g_idx", np.ones(7, np.int32), r"g_idx' is I32\[7\]; it must be I32 \[256\]"),
        ("gptq-act-order", "g_idx", None, r"has no '.*gate_proj.g_idx': a matrix of gptq has qw"),
        ("gptq", "qzeros", np.ones((2, 4), np.int32), r"it must be I32 \[2, 48\]"),
        ("w8a8", "weight", np.ones((384, 256), np.uint8), r"is U8\[384, 256\]; it must be I8 \["),
        ("w8a16", "weight_scale", np.ones((384, 2), np.float32), r"\[384, 1\] or \[384\] or \[1\]"),
    ],
)
def test_a_matrix_whose_tensors_do_not_belong_together_is_refused(
    tool: str, tensor: str, made: Any, message: str, tmp_path: Path
) -> None:
    tool_files.write(tmp_path, *TOOLS[tool])

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{GATE}.{tensor}"]
        if made is not None:
            tensors[f"{GATE}.{tensor}"] = made

    rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tool", "tensor"), [("awq", "scales"), ("gptq", "scales"), ("w8a8", "weight_scale")]
)
def test_a_scale_that_is_not_finite_is_named(tool: str, tensor: str, tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS[tool])
    rewritten(tmp_path, lambda tensors: tensors[f"{GATE}.{tensor}"].__setitem__((0, 0), np.nan))
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        config = opened(tmp_path).model_config()
        model = Model(config, 1, choose_formats(config, checkpoint, "auto"))
        with pytest.raises(CheckpointError, match=rf"'{GATE}.{tensor}' has a scale that is nan"):
            loaded(model, checkpoint)
        with pytest.raises(CheckpointError, match="quantize it again"):
            checkpoint.read(f"{GATE}.weight")


def test_a_scale_beyond_float16_is_refused_with_the_remedy(tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS["w8a8"])

    def change(tensors: dict[str, np.ndarray]) -> None:
        scales = np.full((384, 1), 1e6, np.float32)
        tensors[f"{GATE}.weight_scale"] = scales

    rewritten(tmp_path, change)
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        index = (slice(0, 4), slice(0, 1))
        with pytest.raises(
            CheckpointError, match=r"is 1e\+06, and float16 ends at 65504; give --q"
        ):
            checkpoint.read_stored(f"{GATE}.weight", "scale", index)


@pytest.mark.parametrize("group", [1, -1, 2**31 - 1])
def test_groups_of_unequal_sizes_are_refused(group: int, tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS["gptq-act-order"])
    rewritten(tmp_path, lambda tensors: tensors[f"{GATE}.g_idx"].__setitem__(slice(0, 9), group))
    with (
        closing(open_checkpoint(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match=r"g_idx' does not give every group 64 columns"),
    ):
        checkpoint.stored_format(f"{GATE}.weight")


def test_a_bias_that_says_something_is_not_left_out(tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS["gptq"])
    name = "model.layers.0.self_attn.q_proj.bias"
    rewritten(tmp_path, lambda tensors: tensors[name].__setitem__(3, 1))
    with closing(open_checkpoint(tmp_path)) as checkpoint:
        config = opened(tmp_path).model_config()
        with pytest.raises(CheckpointError, match=rf"1 tensors have no place .*: {name}"):
            loaded(Model(config, 1, {}), checkpoint)


def test_a_config_without_its_tensors_is_refused(tmp_path: Path) -> None:
    config = tool_files.CONFIG | {"quantization_config": TOOLS["awq"][0]}
    tool_files.write_plain(tmp_path, tool_files.drawn())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is awq by its config.json and has no tensor that"):
        open_checkpoint(tmp_path)


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a key, whose dots lead into dicts."""

    def change(config: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            config = config[key]
        config[last] = value

    return change


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("tool", "path", "value", "message"),
    [
        (
            "awq",
            "quant_method",
            "eetq",
            "quant_method is 'eetq'; supported: AWQ with 4 bits (versi",
        ),
        ("awq", "bits", 8, "AWQ's bits are 8"),
        ("awq", "version", "gemv", "AWQ's version is 'gemv'"),
        ("awq", "zero_point", False, "AWQ's zero_point is false"),
        ("awq", "group_size", 48, "group_size is 48; supported: -1 and multiples of 32"),
        (
            "gptq",
            "bits",
            3,
            "GPTQ's bits are 3; supported: AWQ with 4 bits (version gemm), GPTQ wi",
        ),
        ("gptq", "bits", None, "GPTQ's bits are None"),
        ("gptq", "checkpoint_format", "marlin", "GPTQ's checkpoint_format is 'marlin'"),
        ("gptq", "dynamic", {"+:.*down.*": {"bits": 8}}, "dynamic has '+:.*down.*'; supported: mo"),
        ("gptq", "dynamic", 5, "GPTQ's dynamic is 5; supported: modules that are quantized alike"),
        ("w8a8", "config_groups", [1], "config_groups are 0; supported: modules that"),
        ("w8a8", "config_groups", {"g": None}, "config_groups do not say how weights are quantiz"),
        ("w8a8", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config is set"),
        ("w8a8", "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is set"),
        ("w8a8", "config_groups", {}, "config_groups are 0; supported: modules that are quantized"),
        (
            *("w4a16", f"{WEIGHTS}.num_bits", 2),
            "pack-quantized has int2 weights by group; supported: AWQ",
        ),
        ("w8a8", "format", "nvfp4-pack-quantized", "nvfp4-pack-quantized has int8 weights"),
        ("w8a8", f"{WEIGHTS}.strategy", "block", "int8 weights by block"),
        ("w4a16", f"{WEIGHTS}.actorder", "group", "by group with actorder 'group'"),
        ("w8a16", f"{WEIGHTS}.symmetric", False, "by channel that are not symmetric"),
    ],
)
def test_what_is_not_read_is_refused_with_what_is(
    tool: str, path: str, value: Any, message: str, tmp_path: Path
) -> None:
    tool_files.write(tmp_path, *TOOLS[tool])
    config = json.loads((tmp_path / "config.json").read_text())
    set_in(path, value)(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=re.escape(message)) as caught:
        open_checkpoint(tmp_path)
    assert f"{tmp_path} is quantized in a way that is not implemented" in str(caught.value)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        read_model_facts(str(tmp_path), "auto", assets_dir=tmp_path, offline=True)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        open_source(str(tmp_path), assets_dir=tmp_path, offline=True, random_weights=True, seed=0)


def test_groups_shrink_to_what_an_axis_has_whole(tmp_path: Path) -> None:
    path = tool_files.write_plain(tmp_path, tool_files.drawn())
    config = opened(path).model_config()
    formats = rounded_formats(config, "tiny", "int4/128")
    assert formats["w_down"] == "int4/128"
    assert formats["w_o"] == "int4/64"
    narrow = replace(config, head_dim=16)
    with pytest.raises(
        CheckpointError, match=r"the last axis of w_o \(16\) is not a multiple of 32"
    ):
        rounded_formats(narrow, "tiny", "int4/128")
