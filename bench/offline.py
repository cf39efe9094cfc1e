"""Measures the engine in this process, without a socket, against the project's goals.

    python -m bench.offline --preset all --model smollm2 [--dtype bfloat16] [--out FILE]

Requests go in where a notebook's do (``TextEngine``), so detokenising is counted. One JSON line a
run; how the result stands to the goals, scaled to this machine, is said on stderr.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import common, machine, workloads
from bench.asking import Asking
from bench.common import Door, Run
from jaxserve.cli.environment import Environment
from jaxserve.cli.flags import (
    MACHINE_FLAGS,
    MEMORY_FLAGS,
    add_fields,
    add_model_flags,
    field_values,
)
from jaxserve.config import ServeConfig
from jaxserve.launch import Service, build
from jaxserve.progress import show_to_person

GOAL_READ_GB_PER_S = 25.0
GOAL_TFLOP_PER_S = 2.6
"""The machine that the goals are stated for: its read bandwidth and bfloat16 matrix rate."""
_MS = {"ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Goal:
    """A bar for one number of one workload."""

    what: str
    value: float
    unit: str
    measured: Callable[[Run], float]
    higher_is_better: bool
    gflop: float
    """Work of matrix products in one unit of it: in one token of a rate, in the whole of a time."""

    def scaled(self, facts: dict[str, Any]) -> tuple[float, str]:
        """Returns the goal for a machine, and the formula.

        The part of the goal's time that the products take at the stated rate scales with the
        matrix rate, the rest with the read bandwidth.
        """
        # Whichever precision is faster there, as a server on that machine would choose.
        rate = max(facts["f32_tflop_per_s"], facts["bf16_tflop_per_s"])
        read = facts["read_gb_per_s"]
        whole_ms = 1e3 / self.value if self.higher_is_better else self.value * _MS[self.unit]
        rest_ms = whole_ms - self.gflop / GOAL_TFLOP_PER_S
        here_ms = rest_ms * GOAL_READ_GB_PER_S / read + self.gflop / rate
        goal = 1e3 / here_ms if self.higher_is_better else here_ms / _MS[self.unit]
        return goal, (
            f"{rest_ms:.4g} ms x {GOAL_READ_GB_PER_S:g}/{read:g} GB/s "
            f"+ {self.gflop:g} GFLOP / {rate:g} TFLOP/s"
        )

    def verdict(self, run: Run, facts: dict[str, Any]) -> str:
        """Says in one line how a run stands to the goal."""
        value = self.measured(run)
        goal, formula = self.scaled(facts)
        better = value / goal if self.higher_is_better else goal / value
        sign = ">=" if self.higher_is_better else "<="
        return (
            f"{self.what} {value:.1f} {self.unit}; goal {sign} {self.value:g} on the stated "
            f"machine, here {sign} {goal:.1f} ({formula}): "
            f"{'met' if better >= 1 else 'MISSED'}, {better:.2f} of what is asked"
        )


def _rate(run: Run) -> float:
    return run.line["output_tokens_per_s"]


def _first_token_ms(run: Run) -> float:
    return run.line["ttft_ms"]["p50"]


GOALS: dict[str, tuple[Goal, ...]] = {
    "together": (Goal("output", 120.0, "tokens/s", _rate, True, 0.742),),
    "one-stream": (
        Goal("output", 25.0, "tokens/s", _rate, True, 0.28),
        Goal("first token", 150.0, "ms", _first_token_ms, False, 27.8),
    ),
    "long-prompt": (Goal("first token", 4000.0, "ms", _first_token_ms, False, 1450.0),),
    "shared-prefix": (Goal("in all", 15.0, "s", lambda run: run.wall_s, False, 1240.0),),
}
"""By preset. The products of SmolLM2-135M: 0.212 GFLOP for each token that enters, 0.057 for each
that is sampled, and 69,120 for each pair of a token and one that it attends to."""
GOALS |= {number: GOALS[name] for number, name in workloads.NUMBERED.items() if name in GOALS}


def main(words: Sequence[str] | None = None) -> None:
    """Runs the workloads that the arguments select."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline", description="Measures the engine in this process."
    )
    workloads.add_flags(parser)
    common.add_run_flags(parser)
    add_engine_flags(parser)
    arguments = parser.parse_args(words)
    chosen = workloads.chosen(arguments, parser.error, needs_load=False)

    facts = machine.measured()
    values = field_values(arguments, ServeConfig)
    values["seed"] = 0  # Of random weights; --seed is the workload's.
    values["ready_with"] = "all"  # Nothing is compiled beside what is measured.
    with show_to_person(None) as report:
        service = build(ServeConfig(**values), report)
    with service:
        common.say(f"ready in {service.ready_seconds:.1f} s")
        door = make_door(service)
        for workload in chosen:
            found = common.runs(
                door, workload, facts, count=arguments.runs, retries=arguments.retries
            )
            for run in found:
                common.write(run.line, arguments.out)
                for goal in GOALS.get(workload.name, ()):
                    common.say(f"{workload.name}: {goal.verdict(run, facts)}")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``jaxserve launch`` that change the speed."""
    environment = Environment.read(os.environ)
    add_model_flags(
        parser,
        {
            "assets_dir": environment.assets_dir,
            "cache_dir": environment.cache_dir,
            "offline": environment.offline,
        },
    )
    add_fields(parser, "loading", ServeConfig, ("load_format",))
    add_fields(parser, "machine", ServeConfig, MACHINE_FLAGS)
    add_fields(parser, "memory", ServeConfig, MEMORY_FLAGS)


def make_door(service: Service) -> Door:
    """Returns the way into a service of this process."""
    return Door(
        name="offline",
        ask=lambda workload, asks, salt: Asking(
            service.text,
            asks,
            salt,
            arrivals_s=workload.load.arrivals_s(len(asks), workload.seed),
            clients=workload.load.clients,
        ).run(),
        stats=service.engine.stats,
        model=service.info.name,
        precision=service.info.precision,
        vocab_size=service.info.vocab_size,
    )


if __name__ == "__main__":
    main()
