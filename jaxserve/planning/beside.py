"""A plan beside what was measured, when the launch that it describes is ready."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.engine import Runner as StepRunner
from jaxserve.engine.step import StepShape
from jaxserve.models.config import ModelConfig
from jaxserve.planning.devices import DeviceFacts
from jaxserve.planning.plan import Prediction, predict_launched
from jaxserve.planning.sizes import Sizes
from jaxserve.planning.speed import decode_costs, roofline_of
from jaxserve.planning.traffic import typical
from jaxserve.runner.measure import HeldMemory, MemoryMeter, decode_seconds
from jaxserve.runner.runner import Runner
from sharding.mesh import MeshShape

MOST_STEP_MS = 100.0
"""A full step that should take longer is not timed, so that a launch stays quick: one row is. So it
is when the program of the full step follows after ready."""


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """A decode step."""

    rows: int
    """Over all data shards."""
    tokens: int
    """Of each row."""
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a launch was predicted to take, and what it takes."""

    predicted: Prediction
    held: HeldMemory
    step: TimedStep


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a launch is predicted to take, and the step that will be timed."""

    predicted: Prediction
    rows: int
    """Of each data shard, in that step."""
    tokens: int
    """Of each row."""
    step_ms: float


def expect(
    name: str,
    model: ModelConfig,
    sizes: Sizes,
    facts: DeviceFacts,
    *,
    free_bytes: int,
    runner: Runner,
) -> Expected:
    """Plans what is being launched: traces programs, which can go on beside the weights.

    Args:
        name: of the model, to be shown.
        model: its config.
        sizes: of the launch.
        facts: of one device.
        free_bytes: of each device, before anything was loaded.
        runner: has its programs.
    """
    shape = MeshShape(**runner.mesh_shape)
    traffic = typical(None, None, sizes.context_tokens)
    predicted = predict_launched(name, model, runner, free_bytes, facts, sizes, traffic)
    rows, step_ms = predicted.sequences_expected // shape.data, predicted.step_ms
    is_there = _bucket(runner.config.step, rows) in runner.loaded_shape.decode_buckets
    if not step_ms or step_ms > MOST_STEP_MS or not is_there:
        rows = 1
        costs = decode_costs(runner, rows, traffic.tokens)
        step_ms = 1e3 * roofline_of(*costs, facts, shape).total_s
    return Expected(predicted=predicted, rows=rows, tokens=traffic.tokens, step_ms=step_ms)


def _bucket(shape: StepShape, rows: int) -> int:
    """The rows that a decode step of so many computes when every program is there."""
    return next(size for size in shape.decode_buckets if size >= rows)


def compare(expected: Expected, *, meter: MemoryMeter, runner: Runner, steps: StepRunner) -> Beside:
    """Measures what has been launched. Before the first request.

    Args:
        expected: was predicted of it.
        meter: was made before anything was loaded.
        runner: is ready.
        steps: takes its steps, on every host.
    """
    cache = runner.config.cache
    measured_s = decode_seconds(
        steps,
        runner.loaded_shape,
        pages=cache.num_pages,
        page_tokens=cache.page_tokens,
        rows=expected.rows,
        tokens=expected.tokens,
    )
    return Beside(
        predicted=expected.predicted,
        held=meter.read(runner.arrays(), runner.temporary_bytes()),
        step=TimedStep(
            rows=expected.rows * runner.mesh_shape["data"],
            tokens=expected.tokens,
            predicted_ms=expected.step_ms,
            measured_ms=1e3 * measured_s,
        ),
    )
