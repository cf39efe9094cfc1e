"""A launch measures itself beside its plan, and serves afterwards as if it had not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cli.launch import describe_plan
from jaxserve.cli.plan_table import describe, describe_beside
from jaxserve.engine.publish import StepHandle
from jaxserve.engine.request import SamplingParams
from jaxserve.engine.step import COLUMNS, Column, StepInputs, StepShape
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.launch import Service, build
from jaxserve.models.presets import PRESETS
from jaxserve.planning.beside import Beside
from jaxserve.planning.devices import device_facts
from jaxserve.planning.memory import estimate_temporaries
from jaxserve.planning.plan import predict
from jaxserve.planning.sizes import Sizes
from jaxserve.planning.traffic import typical
from jaxserve.resolve import resolve_sizes
from jaxserve.runner.measure import TIMED_STEPS, MemoryMeter, covered, decode_seconds
from jaxserve.weights.source import read_model_facts
from sharding.mesh import MeshShape
from tests.agreement.ways import ask_together, requests, service_config

SETTINGS: dict[str, Any] = {"max_rows": 8, "step_tokens": 32, "context_tokens": 256}
"""Those of ``tests/runner/test_mesh.py``, whose programs are found compiled."""


def answers(service: Service) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    return ask_together(service.engine, requests(service.info.vocab_size, sampling)[:8])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("tiny-llama", "1x1"),
        ("tiny-gemma3", "1x4"),
        pytest.param("tiny-llama", "2x4", marks=pytest.mark.wide),
    ],
)
def test_a_launch_holds_what_was_predicted(model: str, mesh: str, cache_dir: Path) -> None:
    """Weights, pages, row state and temporaries of a device, within 5 %."""
    settings = {"strict_compile": False, "mesh": mesh, **SETTINGS}
    config = service_config(f"dummy:{model}", cache_dir, cache_dir, **settings)
    with build(config, measure=True) as service:
        beside, plan, runner = service.beside, service.plan, service.runner
        assert beside is not None
        sizes = Sizes(**{name: getattr(plan, name) for name in Sizes.__dataclass_fields__})
        facts = replace(device_facts("cpu"), memory_bytes=10**10)
        traffic = typical(None, None, sizes.context_tokens)
        shape = MeshShape(**plan.mesh.shape)
        # What `jaxserve plan` says without a launch, apart from what is free.
        planned = predict(plan.name, plan.model, shape, facts, sizes, traffic, compile_on=plan.mesh)
        budget = planned.details.memory.budget
        assert planned.fits
        found, expected = beside.predicted.as_json(), planned.as_json()
        # A plan compiles two programs, a launch all: another may need a little more.
        temporaries = "temp_bytes_per_device"
        assert found.pop(temporaries) == pytest.approx(expected.pop(temporaries), rel=0.05)
        assert found == {**expected, "nearest_fit": mesh}
        held = beside.held
        pages = planned.pages_per_data_shard * budget.page_bytes
        assert held.parts["weights"] == pytest.approx(budget.weight_bytes, rel=0.05)
        assert held.parts["pages"] == pages
        assert held.parts["row state"] == pytest.approx(budget.row_state_bytes, rel=0.05)
        fixed = budget.weight_bytes + budget.row_state_bytes + pages
        total = fixed + planned.temp_bytes_per_device
        assert held.total_bytes == pytest.approx(total, rel=0.05)
        assert held.temporary_bytes == runner.temporary_bytes()
        assert held.peak_bytes > 0
        usable = shape.data * (planned.pages_per_data_shard - 1)
        assert usable == service.info.pages_total
        # The estimate, where nothing can be compiled, is a bound and not far away.
        compiled = planned.temp_bytes_per_device
        assert compiled <= estimate_temporaries(runner, facts) <= 2 * compiled
        assert beside.step.rows == planned.sequences_expected == 8 * shape.data
        assert beside.step.tokens == 256, "a prompt of half the context, and what may follow"
        assert beside.step.predicted_ms == pytest.approx(planned.step_ms)
        assert 0 < beside.step.measured_ms < 10_000
        check_table(beside)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_launch_with_quantized_weights_holds_what_was_predicted(
    mesh: str, tmp_path: Path, cache_dir: Path
) -> None:
    """Random weights are rounded, too. Heads of 32 are whole groups."""
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny-llama"] | {"head_dim": 32}))
    config = service_config(
        str(tmp_path), cache_dir, cache_dir, strict_compile=False, mesh=mesh, load_format="dummy",
        quantization="int4", **SETTINGS,
    )  # fmt: skip
    with build(config, measure=True) as service:
        assert service.info.quantization == "int4+int8"
        beside = service.beside
        assert beside is not None
        assert beside.predicted.quantization == "int4+int8"
        assert beside.held.parts["weights"] == beside.predicted.weight_bytes_per_device
        where = {"assets_dir": cache_dir, "offline": True}
        model, formats = read_model_facts(str(tmp_path), "int4", **where)
        shape = MeshShape(**service.plan.mesh.shape)
        facts = device_facts("cpu")
        sizes = resolve_sizes(
            config, model, facts.platform, formats=formats, data_shards=shape.data
        )
        planned = predict("", model, shape, facts, sizes, typical(None, None, 256))
        assert planned.weight_bytes_per_device == beside.predicted.weight_bytes_per_device
        assert planned.flops_per_step == beside.predicted.flops_per_step
        assert describe(planned).count("int4+int8, the rest float32") == 1
        assert "quantized weights: int4 w_down, w_gate_up, w_o, w_qkv; int8 embed" in describe_plan(
            service, ServerConfig()
        )
        assert all(answers(service))


@pytest.mark.slow
def test_what_was_measured_leaves_no_trace(cache_dir: Path) -> None:
    settings = {"strict_compile": False, **SETTINGS}
    config = service_config("dummy:tiny-llama", cache_dir, cache_dir, **settings)
    with build(config) as service:
        assert service.beside is None
        expected = answers(service)
    with build(config, measure=True) as service:
        assert answers(service) == expected
        assert service.engine.stats().compiles_after_ready == 0


@pytest.mark.slow
@pytest.mark.parametrize(("ready_with", "timed"), [("all", 2), ("first", 1)])
def test_one_row_is_timed_where_the_program_of_a_full_step_follows(
    ready_with: str, timed: int, cache_dir: Path
) -> None:
    """Pages for two sequences of 256 tokens: their step is the bucket of four, which follows."""
    settings = {"strict_compile": False, "ready_with": ready_with, **SETTINGS}
    settings |= {"kv_memory_bytes": 48 * 8192}
    config = service_config("dummy:tiny-llama", cache_dir, cache_dir, **settings)
    with build(config, measure=True) as service:
        beside = service.beside
        assert beside is not None
        assert (service.plan.page_tokens, service.info.pages_total) == (16, 47)
        assert beside.predicted.sequences_expected == 2
        assert (beside.step.rows, service.late is None) == (timed, ready_with == "all")
        full_ms = beside.predicted.step_ms
        assert full_ms is not None
        assert (
            beside.step.predicted_ms == full_ms
            if timed == 2
            else beside.step.predicted_ms < full_ms
        )


def check_table(beside: Beside) -> None:
    table = describe_beside(beside).splitlines()
    assert table[0].split() == ["predicted", "measured"]
    rows = {line[:24].strip(): line[24:].split() for line in table[1:]}
    weights = f"{beside.predicted.weight_bytes_per_device / 1e6:,.1f}"
    assert rows["weights"] == [weights, "MB", weights, "MB"]
    assert rows["decode step"][1::2][0] == "ms"
    assert rows["peak memory"][:2] == [f"{beside.held.peak_bytes / 1e6:,.1f}", "MB"]
    assert rows["sequences guaranteed"][0] == f"{beside.predicted.sequences_guaranteed}"


class Recorder:
    """A runner that keeps what it is given."""

    compiles_after_ready = 0

    def __init__(self) -> None:
        self.given: list[StepInputs] = []
        self.waited = 0

    def dispatch(self, inputs: StepInputs) -> StepHandle:
        self.given.append(inputs)
        return self

    def wait(self) -> Any:
        self.waited += 1

    def reset(self) -> None:
        raise AssertionError("nothing fails here")


def test_a_timed_step_reads_the_tokens_that_it_says() -> None:
    """Three rows of 20 tokens take two pages of 16 each; a pool of five has four to deal out."""
    shape = StepShape(
        max_rows=4,
        table_width=3,
        vocab_size=64,
        decode_buckets=(1, 4),
        prefill_buckets=((1, 16),),
        data_shards=2,
    )
    runner = Recorder()
    assert decode_seconds(runner, shape, pages=5, page_tokens=16, rows=3, tokens=20) >= 0
    assert len(runner.given) == runner.waited == TIMED_STEPS
    (call,) = runner.given[0].calls
    assert (call.kind, call.bucket, call.buffer.shape) == ("decode", (4, 1), (8, COLUMNS + 3))
    for lines in call.buffer.reshape(2, 4, -1):
        assert lines[:, Column.ROW].tolist() == [0, 1, 2, 4], "the last is padding"
        assert lines[:, Column.START].tolist() == [19, 19, 19, 0]
        assert lines[:, Column.LENGTH].tolist() == lines[:, Column.SAMPLES].tolist() == [1, 1, 1, 0]
        assert lines[:, COLUMNS:].tolist() == [[1, 2, 0], [3, 4, 0], [1, 2, 0], [0, 0, 0]]
    assert runner.given[0].tokens == 6


def test_bytes_that_are_held_twice_count_once() -> None:
    assert covered(set()) == 0
    assert covered({(10, 20), (40, 45)}) == 15
    assert covered({(10, 20), (10, 20), (15, 30), (16, 18)}) == 20


def test_what_was_held_before_a_launch_is_not_its_own() -> None:
    before = jnp.arange(1000, dtype=jnp.int32)
    meter = MemoryMeter()
    mine = jnp.asarray(np.arange(500, dtype=np.int32)) + 1
    other = jnp.asarray(np.arange(250, dtype=np.int32)) + 1
    held = meter.read({"mine": [mine], "none": []}, temporary_bytes=7)
    assert before.nbytes + mine.nbytes + other.nbytes == 7000
    assert held.parts == {"mine": 2000, "none": 0}
    assert held.arrays_bytes == 3000
    assert held.total_bytes == 3007
