"""A plan beside what was measured, when the launch that it describes is ready."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.engine import Runner as StepRunner
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
"""A full step that should take longer is not timed, so that a launch stays quick: one row is."""


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


def compare(
    name: str,
    model: ModelConfig,
    sizes: Sizes,
    facts: DeviceFacts,
    *,
    free_bytes: int,
    meter: MemoryMeter,
    runner: Runner,
    steps: StepRunner,
) -> Beside:
    """Plans what has been launched, and measures it. Before the first request.

    Args:
        name: of the model, to be shown.
        model: its config.
        sizes: of the launch.
        facts: of one device.
        free_bytes: of each device, before anything was loaded.
        meter: was made at that time.
        runner: is ready.
        steps: takes its steps, on every host.
    """
    shape = MeshShape(**runner.mesh_shape)
    traffic = typical(None, None, sizes.context_tokens)
    predicted = predict_launched(name, model, runner, free_bytes, facts, sizes, traffic)
    rows = predicted.sequences_expected // shape.data
    if not predicted.step_ms or predicted.step_ms > MOST_STEP_MS:
        rows = 1
    roofline = roofline_of(*decode_costs(runner, rows, traffic.tokens), facts, shape)
    cache = runner.config.cache
    measured_s = decode_seconds(
        steps,
        runner.config.step,
        pages=cache.num_pages,
        page_tokens=cache.page_tokens,
        rows=rows,
        tokens=traffic.tokens,
    )
    return Beside(
        predicted=predicted,
        held=meter.read(runner.arrays(), runner.temporary_bytes()),
        step=TimedStep(
            rows=rows * shape.data,
            tokens=traffic.tokens,
            predicted_ms=1e3 * roofline.total_s,
            measured_ms=1e3 * measured_s,
        ),
    )
