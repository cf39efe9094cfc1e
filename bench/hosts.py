"""Measures what a second host costs a step: the engine alone, and with a follower over loopback.

    python -m bench.hosts [--rows 64] [--steps 500] [--runs 3] [--out FILE]

Runners compute nothing. Once they answer at once, so that everything shows: making and sending the
plan, the threads that a lost host must not block, the digests that come back. Once a step takes
5 ms, as on a device, which is when most of that is hidden: the goal is 0.2 ms a step then. The
follower is a process of its own; with and without it are measured in turn.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import common, host
from bench.host import CONTEXT_TOKENS, PHASES, PROMPT_TOKENS, VOCAB_SIZE, InstantRunner
from jaxserve.config import GroupConfig
from jaxserve.engine.engine import Runner
from jaxserve.runner.followers import LeaderRunner, follow_steps
from jaxserve.runner.group import Group
from jaxserve.runner.preflight import HostFacts, join, lead

GOAL_MS = 0.2
DEVICE_STEP_S = 0.005
TOKEN = 7


def follower(rows: int, coordinator: str, step_s: float) -> None:
    """The other process."""
    config = GroupConfig(hosts=2, host_id=1, coordinator=coordinator)
    group = join(config, HostFacts.of_this_host({}), print)
    shape = host.instant_shape(rows, VOCAB_SIZE)
    runner = InstantRunner(shape, token=TOKEN, step_s=step_s)
    follow_steps(runner, group, shape, on_ready=lambda: group.ready(""))


def step_ms(seconds: dict[str, list[float]]) -> float:
    """Median milliseconds of a step, all phases together."""
    steps = zip(*(seconds[phase] for phase in PHASES), strict=True)
    return statistics.median(sum(step) for step in steps) * 1e3


def with_follower(rows: int, steps: int, step_s: float) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a step that a second process executes too, and of its phases."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "bench.hosts", "--rows", str(rows)]
    command += ["--follow", coordinator, "--step-s", str(step_s)]
    process = subprocess.Popen(command)
    group: Group | None = None
    try:
        config = GroupConfig(hosts=2, coordinator=coordinator)
        group = lead(config, HostFacts.of_this_host({}), print)
        group.ready("")
        shared = group

        def wrap(runner: Runner) -> Runner:
            return LeaderRunner(runner, shared, host.instant_shape(rows, VOCAB_SIZE))

        longest = CONTEXT_TOKENS - PROMPT_TOKENS
        seconds = host.measure(rows, steps, output_tokens=longest, step_s=step_s, wrap=wrap)
        phases = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        return step_ms(seconds), phases
    finally:
        if group is not None:
            group.close()
        process.wait(30)


def main(words: Sequence[str] | None = None) -> None:
    """Measures both in turn."""
    parser = argparse.ArgumentParser(prog="python -m bench.hosts", description="A second host.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the line to this file")
    parser.add_argument("--follow", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--step-s", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.follow:
        follower(arguments.rows, arguments.follow, arguments.step_s)
        return
    longest = CONTEXT_TOKENS - PROMPT_TOKENS
    for step_s in (0.0, DEVICE_STEP_S):
        alone: list[float] = []
        together: list[float] = []
        phases: dict[str, float] = {}
        for _ in range(arguments.runs):
            rows, steps = arguments.rows, arguments.steps
            seconds = host.measure(rows, steps, output_tokens=longest, step_s=step_s)
            alone.append(step_ms(seconds))
            found, phases = with_follower(rows, steps, step_s)
            together.append(found)
        extra = statistics.median(together) - statistics.median(alone)
        line = {
            "bench": "hosts",
            "rows": arguments.rows,
            "steps": arguments.steps,
            "device_ms": 1e3 * step_s,
            "alone_ms": [round(value, 4) for value in alone],
            "together_ms": [round(value, 4) for value in together],
            "extra_ms": round(extra, 4),
            "phases_ms": {name: round(value, 4) for name, value in phases.items()},
            "commit": common.commit(),
            "versions": common.versions(),
        }
        common.write(line, arguments.out)
        common.say(f"steps of {1e3 * step_s:g} ms: a second host costs {extra:.3f} ms each")
        if step_s:
            verdict = "met" if extra < GOAL_MS else "MISSED"
            common.say(f"goal < {GOAL_MS:g} ms: {verdict}")


if __name__ == "__main__":
    main()
