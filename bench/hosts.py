"""Measures what a second host costs a step: the engine alone, and with a follower over loopback.

    python -m bench.hosts [--rows 64] [--steps 500] [--runs 3] [--out FILE]

Runners answer at once, so that what is left is the host's work: making and sending the plan, the
threads that a lost host must not block, and the digests that come back. The follower is a process
of its own. The two are measured in turn; the goal is 0.2 ms a step for the plan.
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
from jaxserve.runner.group import Group, HostFacts, join, lead

GOAL_MS = 0.2
TOKEN = 7


def follower(rows: int, coordinator: str) -> None:
    """The other process."""
    config = GroupConfig(hosts=2, host_id=1, coordinator=coordinator)
    group = join(config, HostFacts.of_this_host({}), print)
    shape = host.instant_shape(rows, VOCAB_SIZE)
    runner = InstantRunner(shape, token=TOKEN)
    follow_steps(runner, group, shape, on_ready=lambda: group.ready(""))


def step_ms(seconds: dict[str, list[float]]) -> float:
    """Median milliseconds of a step, all phases together."""
    steps = zip(*(seconds[phase] for phase in PHASES), strict=True)
    return statistics.median(sum(step) for step in steps) * 1e3


def with_follower(rows: int, steps: int) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a step that a second process executes too, and of its phases."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "bench.hosts", "--rows", str(rows), "--follow", coordinator]
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
        seconds = host.measure(rows, steps, output_tokens=longest, wrap=wrap)
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
    arguments = parser.parse_args(words)
    if arguments.follow:
        follower(arguments.rows, arguments.follow)
        return
    alone: list[float] = []
    together: list[float] = []
    phases: dict[str, float] = {}
    for _ in range(arguments.runs):
        longest = CONTEXT_TOKENS - PROMPT_TOKENS
        alone.append(step_ms(host.measure(arguments.rows, arguments.steps, output_tokens=longest)))
        found, phases = with_follower(arguments.rows, arguments.steps)
        together.append(found)
    extra = statistics.median(together) - statistics.median(alone)
    line = {
        "bench": "hosts",
        "rows": arguments.rows,
        "steps": arguments.steps,
        "alone_ms": [round(value, 4) for value in alone],
        "together_ms": [round(value, 4) for value in together],
        "extra_ms": round(extra, 4),
        "phases_ms": {name: round(value, 4) for name, value in phases.items()},
        "commit": common.commit(),
        "versions": common.versions(),
    }
    common.write(line, arguments.out)
    verdict = "met" if extra < GOAL_MS else "MISSED"
    common.say(f"a second host costs {extra:.3f} ms a step; goal < {GOAL_MS:g}: {verdict}")


if __name__ == "__main__":
    main()
