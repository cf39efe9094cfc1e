"""Measures the host's work in a step: the engine over a runner that answers at once.

    python -m bench.host [--rows 64] [--steps 500] [--out FILE]

Two kinds of traffic: ``decode`` (every row makes tokens, nothing comes or goes) and ``churn``
(answers of 32 tokens, so that a few rows end and a few prompts begin in every step). The goals are
for ``decode``: plan + pack + dispatch + publish under 1.5 ms, plan alone under 0.3 ms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import common, machine
from bench.common import PHASES, quantile
from jaxserve.engine.engine import Engine, EngineLimits, Runner
from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.publish import StepResult
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.step import RESULT_COLUMNS, StepInputs, StepShape
from jaxserve.engine.stream import TokenStream

CONTEXT_TOKENS = 2048
PAGE_TOKENS = 32
PROMPT_TOKENS = 64
CHURN_OUTPUT_TOKENS = 32
VOCAB_SIZE = 32_000
HOST_PHASES = ("plan", "pack", "dispatch", "publish")
HOST_GOAL_MS = 1.5
PLAN_GOAL_MS = 0.3


class InstantRunner:
    """Answers every row with the same token at once, or at a pace; computes nothing.

    ``CountingRunner`` checks every page it is given, which costs more than what is measured here.
    """

    compiles_after_ready = 0

    def __init__(self, shape: StepShape, *, token: int, step_s: float = 0.0) -> None:
        """Makes it; ``step_s`` are the seconds that a step takes."""
        rows = np.zeros((shape.all_rows, RESULT_COLUMNS), np.int32)
        rows[:, 0] = token
        self._rows = rows
        self._step_s = step_s
        self._busy_until_s = 0.0

    def dispatch(self, inputs: StepInputs) -> _InstantHandle:
        """Starts a step behind those that have not ended."""
        result = StepResult(self._rows, [None] * len(inputs.calls))
        if not self._step_s:
            return _InstantHandle(result, 0.0)
        self._busy_until_s = max(time.perf_counter(), self._busy_until_s) + self._step_s
        return _InstantHandle(result, self._busy_until_s)

    def reset(self) -> None:
        """Has nothing to lose."""


class _InstantHandle:
    def __init__(self, result: StepResult, done_s: float) -> None:
        self._result = result
        self._done_s = done_s

    def wait(self) -> StepResult:
        """Sleeps until the step's time has come, as a device would make the host wait."""
        if self._done_s:
            time.sleep(max(0.0, self._done_s - time.perf_counter()))
        return self._result


class NoWaker:
    """For readers that look by themselves."""

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Does nothing."""


def instant_shape(max_rows: int, vocab_size: int) -> StepShape:
    """Returns the shapes of ``instant_engine``."""
    return StepShape(
        max_rows=max_rows,
        table_width=CONTEXT_TOKENS // PAGE_TOKENS,
        vocab_size=vocab_size,
        decode_buckets=(max_rows,),
        prefill_buckets=((16, 512),),
        score_buckets=((1, 512),),
    )


def instant_engine(
    *,
    max_rows: int,
    vocab_size: int,
    token: int,
    step_s: float = 0.0,
    wrap: Callable[[Runner], Runner] = lambda runner: runner,
) -> Engine:
    """Returns the real engine, not started, over an ``InstantRunner`` that ``wrap`` may wrap."""
    shape = instant_shape(max_rows, vocab_size)
    num_pages = max_rows * shape.table_width + 1
    return Engine(
        wrap(InstantRunner(shape, token=token, step_s=step_s)),
        scheduler=SchedulerConfig(
            max_rows=max_rows,
            step_tokens=512,
            max_chunks=16,
            page_tokens=PAGE_TOKENS,
            num_pages=num_pages,
        ),
        shape=shape,
        limits=EngineLimits(context_tokens=CONTEXT_TOKENS, vocab_size=vocab_size),
        end_ids=(),
    )


def measure(
    rows: int,
    steps: int,
    *,
    output_tokens: int,
    step_s: float = 0.0,
    wrap: Callable[[Runner], Runner] = lambda runner: runner,
) -> dict[str, list[float]]:
    """Returns the seconds of every step by phase; full rows, a new request for each that ends."""
    engine = instant_engine(max_rows=rows, vocab_size=VOCAB_SIZE, token=7, step_s=step_s, wrap=wrap)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0)
    streams: list[TokenStream] = []
    sent = 0

    def fill() -> None:
        nonlocal sent
        streams[:] = [stream for stream in streams if not stream.finished]
        while len(streams) < rows:
            prompt = rng.integers(3, VOCAB_SIZE, PROMPT_TOKENS).tolist()
            request = Request(request_id=f"r{sent}", prompt=prompt, sampling=sampling)
            streams.append(engine.submit(request, NoWaker()))
            sent += 1

    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for step in range(steps + _settling_steps(rows)):
        fill()
        before = engine.stats().phase_seconds_total
        engine.run_once()
        after = engine.stats().phase_seconds_total
        for stream in streams:
            stream.take()
        if step >= _settling_steps(rows):
            for phase in PHASES:
                seconds[phase].append(after[phase] - before[phase])
    assert len(engine.scheduler.running) >= rows - 8, "the rows were not full"
    engine.stop()
    engine.check_integrity()
    return seconds


def _settling_steps(rows: int) -> int:
    """Steps until all rows are past their prompts, twice over."""
    return 2 * max(8, rows * PROMPT_TOKENS // 448)


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns mean and median milliseconds by phase, and of the phases that are the host's."""
    host = [sum(step) for step in zip(*(seconds[phase] for phase in HOST_PHASES), strict=True)]
    named = {**{phase: seconds[phase] for phase in HOST_PHASES}, "host": host}
    return {
        name: {
            "mean": round(sum(values) / len(values) * 1e3, 4),
            "p50": round(quantile(values, 0.5) * 1e3, 4),
        }
        for name, values in named.items()
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measures both kinds of traffic."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description="Host work a step.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines to this file")
    arguments = parser.parse_args(words)
    longest = CONTEXT_TOKENS - PROMPT_TOKENS
    if arguments.steps + _settling_steps(arguments.rows) >= longest:
        parser.error(f"--steps is {arguments.steps}; answers end after {longest} tokens, ask fewer")

    for traffic, output_tokens in (("decode", longest), ("churn", CHURN_OUTPUT_TOKENS)):
        other = machine.OtherLoad()
        found = summary(measure(arguments.rows, arguments.steps, output_tokens=output_tokens))
        line = {
            "bench": "host",
            "traffic": traffic,
            "rows": arguments.rows,
            "steps": arguments.steps,
            "step_ms": found,
            "commit": common.commit(),
            "versions": common.versions(),
            "other_cores": other.cores(),
        }
        common.write(line, arguments.out)
        for name, goal in (("host", HOST_GOAL_MS), ("plan", PLAN_GOAL_MS)):
            value = found[name]["mean"]
            verdict = "met" if value < goal else "MISSED"
            common.say(f"{traffic}: {name} {value:.3f} ms a step; goal < {goal:g}: {verdict}")


if __name__ == "__main__":
    main()
