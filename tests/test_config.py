"""Flags that cannot work are refused, all together, with the value, the limit and the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import config as type_checks

from jaxserve.config import GroupConfig, ServeConfig, decode_buckets, prefill_buckets, score_buckets
from jaxserve.errors import ConfigError, MeshError
from jaxserve.launch import build
from jaxserve.models.presets import preset
from jaxserve.resolve import (
    configure_jax,
    is_ready_with_first,
    overlaps_steps,
    resolve,
    resolve_quantization,
    resolve_sizes,
)
from pallas_kernels import native
from pallas_kernels.quantized_matmul import Format

TINY = preset("tiny-llama")


def config(**changes: object) -> ServeConfig:
    settings: dict[str, object] = {
        "model": "dummy:tiny-llama",
        "assets_dir": Path("assets"),
        "cache_dir": Path("cache"),
        **changes,
    }
    return ServeConfig(**settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model is empty; give a path"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, float32"),
        ({"quantization": "int2"}, "quantization is 'int2'; choose one of auto, none, int8, int4"),
        (
            {"kv_dtype": "int3"},
            "kv_dtype is 'int3'; choose one of auto, float32, bfloat16, float16, int8, fp8, int4",
        ),
        ({"load_format": "pickle"}, "load_format is 'pickle'; choose one of auto, dummy"),
        ({"step_overlap": "yes"}, "step_overlap is 'yes'; choose one of auto, on, off"),
        ({"ready_with": "some"}, "ready_with is 'some'; choose one of auto, first, all"),
        (
            {"ready_with": "first", "executables": Path("programs")},
            "ready_with is 'first' and executables is given, whose programs must all be there",
        ),
        ({"context_tokens": 1}, "context_tokens is 1; at least 2"),
        ({"max_rows": 0}, "max_rows is 0; choose 1 to 4096"),
        ({"step_tokens": 8}, "step_tokens is 8; choose 16 to 65536"),
        ({"page_tokens": 20}, "page_tokens is 20; choose one of 8, 16"),
        ({"kv_memory_fraction": 1.5}, "kv_memory_fraction is 1.5; choose above 0"),
        ({"kv_memory_bytes": 0}, "kv_memory_bytes is 0; give a number of bytes"),
        ({"max_waiting_requests": 0}, "max_waiting_requests is 0"),
        ({"max_waiting_tokens": 0}, "max_waiting_tokens is 0"),
        ({"watchdog_s": 0.0}, "watchdog_s is 0; give seconds"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_all_problems_are_listed_together() -> None:
    with pytest.raises(ConfigError, match=r"max_rows is 0.*page_tokens is 3"):
        config(max_rows=0, page_tokens=3)


def test_buckets_cover_what_was_asked_for() -> None:
    for rows in (1, 2, 7, 16, 64, 100):
        buckets = decode_buckets(rows, 1)
        assert buckets[-1] == rows
        assert list(buckets) == sorted(set(buckets))
    assert decode_buckets(64, 16) == (16, 24, 32, 48, 64)
    assert decode_buckets(8, 16) == (8,)
    assert prefill_buckets(16) == ((16, 16),)
    assert max(tokens for _, tokens in prefill_buckets(512)) == 512
    assert score_buckets(prefill_buckets(16)) == ((1, 16),)


@pytest.mark.parametrize("device", ["tpu", "cuda:2", "cpu:x", "cpu:0"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="choose auto, cpu, cpu:N"):
        configure_jax(config(device=device))


def test_a_cache_that_cannot_be_made_is_refused_with_the_flag(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError) as caught:
        configure_jax(config(cache_dir=file))
    assert str(caught.value) == (
        f"--cache-dir {file}: cannot make {file}/xla: Not a directory; give a directory that can "
        "be written"
    )


def test_a_device_that_is_not_there_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"device 'cuda' is not available.*try --device cpu"):
        resolve(config(device="cuda"), TINY)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("1x64", r"needs 64 devices, \d+ are visible"),
        ("4", "a mesh is written DATAxTENSOR"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: str, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        resolve(config(mesh=mesh), TINY)


def test_a_context_beyond_the_models_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model's window is 512; lower --context-tokens"):
        resolve(config(context_tokens=100_000), TINY)


def test_a_cpu_cuts_prompts_sooner_than_a_gpu() -> None:
    places = {
        platform: resolve_sizes(config(), TINY, platform, data_shards=1).step.call_places
        for platform in ("cpu", "cuda")
    }
    assert places == {"cpu": 24, "cuda": 256}


def test_a_step_takes_fewer_prompt_tokens_on_a_cpu_unless_told_otherwise() -> None:
    def longest(platform: str, **fields: int) -> int:
        sizes = resolve_sizes(config(**fields), TINY, platform, data_shards=1)
        return max(tokens for _, tokens in sizes.step.prefill_buckets)

    assert (longest("cpu"), longest("cuda"), longest("cpu", step_tokens=128)) == (256, 512, 128)


@pytest.mark.parametrize(("asked", "overlaps"), [("auto", False), ("on", True), ("off", False)])
def test_steps_of_a_cpu_overlap_only_where_it_is_asked_for(asked: str, overlaps: bool) -> None:
    given = config(step_overlap=asked, max_rows=4)
    assert overlaps_steps(given, resolve(given, TINY)) is overlaps


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ({}, True),
        ({"ready_with": "first"}, True),
        ({"ready_with": "all"}, False),
        ({"executables": Path("programs")}, False),
    ],
    ids=str,
)
def test_a_cpu_is_ready_with_first_unless_every_program_must_be_there(
    asked: dict[str, object], first: bool
) -> None:
    given = config(device="cpu", max_rows=4, **asked)
    assert is_ready_with_first(given, resolve(given, TINY)) is first


def test_other_devices_and_several_hosts_are_ready_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = config(max_rows=4)
    plan = resolve(given, TINY)
    assert not is_ready_with_first(given, replace(plan, platform="cuda"))
    with pytest.raises(ConfigError, match="ready_with is 'first' and the device cuda"):
        is_ready_with_first(config(ready_with="first"), replace(plan, platform="cuda"))
    # Equal meshes are one object, which may know the answer from another test.
    monkeypatch.setitem(vars(plan.mesh), "is_multi_process", True)
    assert not is_ready_with_first(given, plan)


def test_several_hosts_cannot_be_ready_with_first() -> None:
    hosts = GroupConfig(hosts=2, coordinator="127.0.0.1:1")
    with pytest.raises(ConfigError, match="--ready-with first is for one host and --hosts is 2"):
        build(config(ready_with="first"), hosts=hosts)


def test_a_plan_leaves_nothing_open() -> None:
    plan = resolve(config(mesh="1x2", max_rows=4), TINY)
    assert plan.mesh.shape == {"data": 1, "tensor": 2}
    assert plan.context_tokens == plan.model.context_tokens
    assert plan.step.table_width * plan.page_tokens >= plan.context_tokens
    assert plan.step.decode_buckets == (1, 4)
    assert (plan.kv_bytes, plan.kv_fraction) == (None, 0.9)
    assert plan.most_kv_bytes is not None
    assert resolve(config(device="cpu", kv_memory_fraction=0.5), TINY).most_kv_bytes is None


@pytest.mark.parametrize(
    ("asked", "machine", "got"),
    [
        ({}, (False, False), ("float32", "float32", "float32")),
        ({}, (True, False), ("bfloat16", "bfloat16", "bfloat16")),
        ({}, (False, True), ("bfloat16", "bfloat16", "float32")),
        ({}, (True, True), ("bfloat16", "bfloat16", "bfloat16")),
        ({"dtype": "float32"}, (True, True), ("float32", "float32", "float32")),
        ({"dtype": "float16"}, (False, False), ("float16", "float16", "float16")),
        ({"kv_dtype": "bfloat16"}, (False, False), ("float32", "bfloat16", "float32")),
        (
            {"dtype": "float32", "kv_dtype": "bfloat16"},
            (False, True),
            ("float32", "bfloat16", "float32"),
        ),
        ({"kv_dtype": "int8"}, (True, True), ("bfloat16", "int8", "bfloat16")),
        ({"kv_dtype": "fp8"}, (True, True), ("bfloat16", "fp8", "bfloat16")),
        ({"kv_dtype": "int4"}, (True, True), ("bfloat16", "int4", "bfloat16")),
        ({"kv_dtype": "bf16"}, (False, False), ("float32", "bfloat16", "float32")),
        ({"kv_dtype": "fp16"}, (False, False), ("float32", "float16", "float32")),
        (
            {"dtype": "bfloat16", "kv_dtype": "fp32"},
            (True, True),
            ("bfloat16", "float32", "bfloat16"),
        ),
    ],
)
def test_the_cache_has_the_precision_of_the_weights_unless_another_is_named(
    asked: dict[str, str],
    machine: tuple[bool, bool],
    got: tuple[str, str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``machine``: whether it has AMX, and native kernels."""
    has_amx, has_native = machine
    monkeypatch.setattr(native, "has_amx", lambda: has_amx)
    monkeypatch.setattr(native, "is_built", lambda: has_native)
    plan = resolve(config(device="cpu", **asked), TINY)
    if dict(asked).get("dtype") == "float32" and has_native:
        assert plan.unrolled_rows == 0
    assert (plan.dtype.name, plan.kv_name, plan.activations.name) == got


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernels", None, "kernels is None; give a string"),
        ("kv_memory_fraction", "0.5", "kv_memory_fraction is '0.5'; give a number or None"),
        ("kv_memory_fraction", True, "kv_memory_fraction is True; give a number or None"),
        ("max_rows", 2.5, "max_rows is 2.5; give a whole number"),
        ("prefix_cache", 1, "prefix_cache is 1; give True or False"),
        ("cache_dir", "here", "cache_dir is 'here'; give a Path"),
        ("dtype", ["float32"], "dtype is ['float32']; give a string"),
    ],
)
def test_a_value_of_another_type_is_refused(
    field: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests are told of a wrong type before the program is.
    monkeypatch.setattr(type_checks, "jaxtyping_disable", True)
    with pytest.raises(ConfigError) as caught:
        config(**{field: value})
    assert str(caught.value) == message


def test_a_whole_number_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_checks, "jaxtyping_disable", True)
    assert config(watchdog_s=3).watchdog_s == 3


def test_a_short_name_of_the_caches_precision_becomes_the_long_one() -> None:
    assert config(kv_dtype="bf16") == config(kv_dtype="bfloat16")


@pytest.mark.parametrize(
    ("platform", "kind", "format", "dtype", "is_repacked"),
    [
        ("gpu", "NVIDIA H200", "int4", "auto", True),
        ("gpu", "NVIDIA H100 80GB HBM3", "int8/row", "float16", True),
        ("gpu", "NVIDIA H200", "int4", "float32", False),  # Activations that the kernel declines.
        ("gpu", "NVIDIA H200", "", "auto", False),
        ("gpu", "NVIDIA A100-SXM4-80GB", "int4", "auto", False),
        ("gpu", "NVIDIA B200", "int4", "auto", False),
        ("cpu", "cpu", "int4", "auto", False),
    ],
)
def test_quantized_weights_are_repacked_for_hopper_gpus(
    platform: str, kind: str, format: Format, dtype: str, is_repacked: bool
) -> None:
    formats = {"w_down": format} if format else {}
    asked = config(dtype=dtype)
    sizes = resolve_sizes(asked, TINY, platform, kind=kind, data_shards=1, formats=formats)
    assert sizes.repacked == is_repacked
    if platform == "gpu":
        assert sizes.formats == formats


@pytest.mark.parametrize(
    ("kernels", "held"),
    [("auto", "int8"), ("feed_forward=parts", "int8"), ("quantized_matmul=xla", "int8/row")],
)
def test_a_cpu_holds_groups_of_32_for_its_own_kernels_alone(
    kernels: str, held: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_built", lambda: True)
    asked = config(kernels=kernels)
    formats: dict[str, Format] = {"w_down": "int8/row"}
    sizes = resolve_sizes(asked, TINY, "cpu", data_shards=1, formats=formats)
    assert sizes.formats == {"w_down": held}


def test_auto_leaves_weights_quantized_but_on_a_cpu_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "is_built", lambda: True)
    assert resolve_quantization(config(), "cpu") == "auto"
    assert resolve_quantization(config(), "gpu") == "auto"
    monkeypatch.setattr(native, "is_built", lambda: False)
    assert resolve_quantization(config(), "cpu") == "none"
    assert resolve_quantization(config(), "gpu") == "auto"
    assert resolve_quantization(config(quantization="int8"), "gpu") == "int8"
    asked: list[str] = []

    def formats(quantization: str) -> dict[str, Format]:
        asked.append(quantization)
        return {"w_o": "int4", "embed": "int8", "w_down": "int4"}

    plan = resolve(config(device="cpu", quantization="int4"), TINY, formats)
    assert (asked, plan.quantization) == (["int4"], "int4+int8")
    assert resolve(config(device="cpu", quantization="int4"), TINY).quantization == ""
