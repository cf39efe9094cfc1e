"""Measures the engine in this process, without a socket, against the project's goals.

    python -m bench.offline --preset all --model smollm2 [--dtype bfloat16] [--out FILE]

Requests go in where a notebook's do (``TextEngine``), so detokenising is counted. One JSON line a
run; how the result stands to the goals, scaled to this machine, is said on stderr.
"""

from __future__ import annotations

import argparse
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import common, machine, workloads
from bench.common import Answer, Door, Run
from bench.workloads import Ask, Workload
from jaxserve.cli.environment import Environment
from jaxserve.cli.flags import (
    MACHINE_FLAGS,
    MEMORY_FLAGS,
    add_fields,
    add_model_flags,
    field_values,
)
from jaxserve.config import ServeConfig
from jaxserve.engine.request import SamplingParams
from jaxserve.engine.stream import TokenStream
from jaxserve.frontend.generation import (
    Delta,
    Finished,
    GenerationCall,
    Output,
    TextEngine,
    TextStream,
)
from jaxserve.launch import Service, build
from jaxserve.progress import show_to_person

GOAL_READ_GB_PER_S = 25.0
GOAL_TFLOP_PER_S = 2.6
"""The machine that the goals are stated for: its read bandwidth and bfloat16 matrix rate."""
POLL_S = 1.0
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
GOALS |= {
    "W1": GOALS["one-stream"],
    "W2": GOALS["together"],
    "W4": GOALS["shared-prefix"],
    "W5": GOALS["long-prompt"],
}


def main(words: Sequence[str] | None = None) -> None:
    """Runs the workloads that the arguments select."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline", description="Measures the engine in this process."
    )
    workloads.add_flags(parser)
    common.add_run_flags(parser)
    _add_engine_flags(parser)
    arguments = parser.parse_args(words)
    chosen = workloads.chosen(arguments, parser.error, needs_load=False)

    facts = machine.measured()
    values = field_values(arguments, ServeConfig)
    values["seed"] = 0  # Of random weights; --seed is the workload's.
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


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
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
        ask=lambda workload, asks, salt: _Asking(service.text, workload, asks, salt).run(),
        stats=service.engine.stats,
        model=service.info.name,
        precision=service.info.precision,
        vocab_size=service.info.vocab_size,
    )


class _Asking:
    """Sends requests and takes their answers, on the calling thread."""

    def __init__(
        self, text: TextEngine, workload: Workload, asks: Sequence[Ask], salt: str
    ) -> None:
        self._text = text
        self._salt = salt
        self._most = workload.load.clients or len(asks)
        arrivals = workload.load.arrivals_s(len(asks), workload.seed)
        self._waiting = deque(enumerate(zip(asks, arrivals, strict=True)))
        self._live: dict[TokenStream, tuple[TextStream, Answer]] = {}
        self._answers: dict[int, Answer] = {}
        self._woken: queue.SimpleQueue[Sequence[TokenStream]] = queue.SimpleQueue()
        self._start_s = time.perf_counter()

    def run(self) -> list[Answer]:
        """Returns the answers in the order of the requests."""
        while self._waiting or self._live:
            wait_s = self._send()
            try:
                streams = self._woken.get(timeout=wait_s)
            except queue.Empty:
                if self._text.engine.health().serving:
                    continue
                raise RuntimeError(self._text.engine.health().detail) from None
            for stream in streams:
                self._read(stream)
        return [self._answers[number] for number in sorted(self._answers)]

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Called by the engine, after a step."""
        self._woken.put(streams)

    def _send(self) -> float:
        """Sends what is due; returns the seconds until the next is."""
        while self._waiting and len(self._live) < self._most:
            number, (ask, arrival_s) = self._waiting[0]
            now = time.perf_counter()
            if (early_s := self._start_s + arrival_s - now) > 0:
                return early_s
            self._waiting.popleft()
            call = GenerationCall(
                token_ids=ask.prompt,
                sampling=SamplingParams(
                    max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=True
                ),
                cache_salt=self._salt,
            )
            answer = self._answers[number] = Answer(now)
            stream = self._text.submit(call, self)
            self._live[stream.stream] = (stream, answer)
        return POLL_S

    def _read(self, stream: TokenStream) -> None:
        if stream not in self._live:
            return
        text_stream, answer = self._live[stream]
        for output in text_stream.feed(stream.take()):
            _note(output, answer)
        if text_stream.finished:
            answer.end_s = time.perf_counter()
            del self._live[stream]


def _note(output: Output, answer: Answer) -> None:
    if isinstance(output, Delta) and output.token_ids:
        answer.tokens += len(output.token_ids)
        answer.arrivals_s.append(time.perf_counter())
    elif isinstance(output, Finished) and output.error is not None:
        raise output.error


if __name__ == "__main__":
    main()
