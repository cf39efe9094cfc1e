"""Quantized weights repacked for Hopper GPUs: the same numbers, on their devices, in the kernel."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, PartitionSpec

from jaxserve import LLM, launch
from jaxserve.engine.step import StepShape
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import preset
from jaxserve.planning import aot
from jaxserve.planning.devices import device_facts
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.repacking import repack, repacked_specs, unpacked
from jaxserve.runner.runner import Runner
from jaxserve.weights.load import random_params
from jaxserve.weights.packed import rounded_formats
from jaxserve.weights.saved import save_model
from jaxserve.weights.source import open_source
from pallas_kernels.quantized_matmul import Format, OnGpu, Quantized
from sharding.mesh import AXES, MeshShape, make_mesh, parse_mesh
from sharding.specs import named_shardings

TINY = replace(preset("tiny-llama"), embed=128, ffn=256, head_dim=64)
"""Of which the kernel takes every matrix, whole or divided in two."""
FORMATS: tuple[Format, ...] = ("int4/64", "int8", "fp8")
KEY = ProgramKey(4, "decode", 4, 1)
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def model_of(format: Format, tensor: int, config: ModelConfig = TINY) -> Model:
    return Model(config, tensor, rounded_formats(config, "tiny", format))


def runner_of(model: Model, mesh: Mesh | AbstractMesh, **changes: Any) -> Runner:
    step = StepShape(
        max_rows=4,
        table_width=4,
        vocab_size=model.config.vocab_size,
        decode_buckets=(4,),
        prefill_buckets=((1, 16),),
        score_buckets=((1, 16),),
    )
    cache = CacheShape(num_pages=17, page_tokens=64, max_rows=4, dtype=BFLOAT16)
    settings: dict[str, Any] = {"dtype": BFLOAT16, "activations": BFLOAT16, "repacked": True}
    config = RunnerConfig(step=step, cache=cache, **{**settings, **changes})
    return Runner(model, config, mesh)


def h200s(tensor: int) -> AbstractMesh:
    """Without its compiler: for tracing."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    return AbstractMesh((1, tensor), AXES, abstract_device=device)


def weights_on(model: Model, tensor: int) -> tuple[Runner, Params]:
    """Random ones, as they are loaded, and a runner of theirs."""
    mesh = make_mesh(MeshShape(tensor=tensor), jax.devices("cpu"))
    runner = runner_of(model, mesh)
    places = runner.param_shardings
    return runner, random_params(model, seed=3, dtype=BFLOAT16, stacked=True, shardings=places)


def repacked_on(runner: Runner, loaded: Params) -> Params:
    assert isinstance(runner.mesh, Mesh)
    places = jax.tree.map(lambda array: array.sharding.spec, loaded)
    specs = repacked_specs(runner.model, runner.abstract_params, places)
    return repack(runner.model, loaded, named_shardings(specs, runner.mesh))


@pytest.mark.parametrize("tensor", [1, 2])
def test_scales_have_the_outputs_last_and_are_divided_as_their_weights(tensor: int) -> None:
    weights, specs = runner_of(model_of("int4", tensor), h200s(tensor))._weights(KEY)
    layers, where = weights.layers, specs.layers
    assert isinstance(layers, dict)
    expected = {
        # Layers, what is summed over, outputs.
        "w_qkv": ((2, 4, 2, 4, 64), (None, None, "tensor", None, None)),
        "w_o": ((2, 4, 2, 128), (None, "tensor", None, None)),
        "w_gate_up": ((2, 4, 2, 256), (None, None, None, "tensor")),
        "w_down": ((2, 8, 128), (None, "tensor", None)),
    }
    for name, (shape, spec) in expected.items():
        for array in ("scale", "minimum"):
            assert getattr(layers[name], array).shape == shape, name
            assert getattr(where[name], array) == PartitionSpec(*spec), name
        assert isinstance(layers[name], OnGpu)
    assert layers["w_gate_up"].values.shape == (2, 2, 256, 64)
    assert where["w_gate_up"].values == PartitionSpec(None, None, "tensor", None)
    embed, place = weights.ends["embed"], specs.ends["embed"]
    assert (embed.values.shape, embed.scale.shape) == ((512, 128), (4, 512))
    assert (place.values, place.scale) == (
        PartitionSpec("tensor", None),
        PartitionSpec(None, "tensor"),
    )


def test_looked_up_rows_and_experts_stay_as_they_were_loaded() -> None:
    config = replace(preset("tiny-mixtral"), head_dim=32, tie_embeddings=False)
    weights, _ = runner_of(model_of("int8", 1, config), h200s(1))._weights(KEY)
    assert isinstance(weights.layers, dict)
    kinds = {
        name: type(weight)
        for name, weight in (weights.ends | weights.layers).items()
        if isinstance(weight, Quantized)
    }
    loaded = dict.fromkeys(("embed", "w_gate_up", "w_down"), Quantized)
    assert kinds == loaded | dict.fromkeys(("head", "w_qkv", "w_o"), OnGpu)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_the_way_back_gives_what_was_loaded(format: Format, tensor: int) -> None:
    runner, loaded = weights_on(model_of(format, tensor), tensor)
    expected = jax.tree.map(np.asarray, loaded)
    repacked = repacked_on(runner, loaded)
    abstract, specs = runner._weights(KEY)
    found = jax.tree.map(lambda array: (array.shape, array.sharding.spec), repacked)
    wanted = jax.tree.map(lambda leaf, spec: (leaf.shape, spec), abstract, specs)
    assert found == wanted
    assert isinstance(loaded.layers, dict)
    assert loaded.layers["w_o"].scale.is_deleted(), "it would take memory twice"
    jax.tree.map(np.testing.assert_array_equal, unpacked(runner.model, repacked), expected)


def test_repacked_weights_are_saved_as_others_are(tmp_path: Path) -> None:
    def opened(name: str) -> Any:
        return open_source(name, assets_dir=tmp_path, offline=True, random_weights=False, seed=0)

    config = preset("tiny-qwen3")
    runner, loaded = weights_on(model_of("int4", 1, config), 1)
    expected = jax.tree.map(np.asarray, loaded)
    params = unpacked(runner.model, repacked_on(runner, loaded))
    save_model(tmp_path / "saved", runner.model, params, opened("dummy:tiny-qwen3"))
    found = opened(str(tmp_path / "saved")).load(
        runner.model,
        dtype=BFLOAT16,
        shardings=runner.param_shardings,
        progress=lambda done, total: None,
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("format", ["int4", pytest.param("int8", marks=pytest.mark.wide)])
def test_products_are_those_of_weights_as_they_were_loaded(
    format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From launch to answers on two devices, by the definition of products."""
    resolve, prompts = launch.resolve, ["Hello", "The sky is blue"]
    settings: dict[str, Any] = {
        "device": "cpu",
        "mesh": "1x2",
        "dtype": "float32",
        "quantization": format,
        "kernels": "quantized_matmul=reference,feed_forward=reference",
        "context_tokens": 64,
        "max_rows": 2,
        "step_tokens": 16,
        "prompt_logprobs": True,
        "kv_memory_bytes": 2**20,
        "progress": False,
        "cache_dir": Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
    }

    def answers(repacked: bool) -> tuple[list[Any], np.ndarray]:
        monkeypatch.setattr(
            launch,
            "resolve",
            lambda *given: replace(resolve(*given), repacked=repacked, unrolled_rows=0),
        )
        with LLM("dummy:tiny-qwen3", **settings) as llm:
            params = llm._service.runner.params
            assert params is not None
            assert isinstance(params.layers, dict)
            assert isinstance(params.layers["w_down"], OnGpu) == repacked
            asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
            asked |= {"logprobs": 1, "prompt_logprobs": 1}
            given = [llm.generate(prompt, **asked) for prompt in prompts]
            return given, llm.logits(range(3, 20))

    given, logits = answers(repacked=True)
    expected, expected_logits = answers(repacked=False)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(given, expected, strict=True):
        for one, other in zip(ours.choices[0].logprobs, theirs.choices[0].logprobs, strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_programs_for_an_h200_are_made_of_the_kernel(format: Format, tensor: int) -> None:
    runner = runner_of(model_of(format, tensor), h200s(tensor))
    for key in runner.program_keys():
        runner.trace(key)
    assert runner.kernels()["quantized_matmul"] == ["mosaic"]


def test_what_the_kernel_declines_is_multiplied_by_xla() -> None:
    odd = replace(TINY, ffn=96)  # 64 columns at a time.
    runner = runner_of(model_of("int4", 1, odd), h200s(1))
    runner.trace(KEY)
    assert sorted(runner.kernels()["quantized_matmul"]) == ["mosaic", "xla"]


def test_unrolled_programs_of_repacked_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unrolled_rows is 4 and repacked .* it must be 0"):
        runner_of(model_of("int4", 1), h200s(1), unrolled_rows=4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_decode_step_compiles_for_an_h200_and_widens_no_weight(mesh: str) -> None:
    facts, shape = device_facts("h200"), parse_mesh(mesh)
    if (reason := aot.why_not(facts, shape)) is not None:
        pytest.skip(f"{reason}; `make prove-aot` installs it")
    # The largest array of a step but its weights would be one of them in 16 bits.
    config = replace(TINY, embed=1024, ffn=8192, vocab_size=1024)
    runner = runner_of(model_of("int4", shape.tensor, config), aot.absent_mesh(facts, shape))
    compiled = runner.trace(KEY).lower().compile(runner.compiler_options)
    assert runner.kernels()["quantized_matmul"] == ["mosaic"]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{temporary / 1e6:.1f} MB of temporaries")
    assert temporary < 2 * 2 * config.ffn * config.embed / shape.tensor / 4
