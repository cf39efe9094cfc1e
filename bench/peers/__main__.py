"""Measures jaxserve and other engines on the same token ids, taking turns.

    python -m bench.peers --out FILE [--runs 3] [--only W1,W2] [--systems jaxserve-q4,llama.cpp]

In each round every system is started, loaded, warmed up, measured on its workloads and ended
before the next one starts, because idle threads of some spin. All systems get the same ids in a
round, and other ids in the next. A peer far behind the best one in the first round is not asked
again, since no ratio is made with it. The file is renewed after every run. Exit code 1 says that a
system failed.
``docs/benchmarks.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.common import say
from bench.gpu.report import write
from bench.machine import NOISE_CORES
from bench.peers import report
from bench.peers.process import ROOT, Child, ChildError, Memory, log_path, log_tail, running
from bench.peers.protocol import Question
from bench.peers.systems import SYSTEMS, WORKLOADS, Places, System
from bench.workloads import NUMBERED, PRESETS, WARM_UP
from jaxserve.assets import ASSETS
from jaxserve.cli.environment import Environment

VOCAB_SIZE = 49_152
"""Of SmolLM2."""
FIRST = Question(list(range(1000, 1016)), 1)
WARM_UP_REQUESTS = {"W2": 8, "W3": 32, "W4": 8}
WARM_UP_TOKENS = 16
WARM_START_S = 60.0
"""What a start takes at most when nothing has to be compiled."""
REFERENCE_LIMIT_S = 240.0
QUALITY_TOKENS = 32
NEAR_BEST = 0.7
"""A peer with at least this share of the best peer's speed is asked again."""
QUICK_S = 20.0
"""The best of its class is asked again if it is this quick, however far behind the best of all."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs what the arguments select; returns the exit code."""
    arguments = _parse(words)
    environment = Environment.read(os.environ)
    places = Places(
        root=(arguments.peers_dir or environment.cache_dir / "peers").resolve(),
        gguf=environment.assets_dir / ASSETS["smollm2"].path,
    )
    places.root.mkdir(parents=True, exist_ok=True)
    with _ending_cleanly(), _only_one(places.root / ".lock"):
        bench = Bench(arguments, places)
        bench.run()
    print(report.table(bench.document))
    return int(any(_has_failed(one) for one in bench.document["systems"].values()))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description="jaxserve beside other engines, taking turns."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file")
    parser.add_argument("--runs", type=int, default=3, metavar="K", help="rounds (default 3)")
    parser.add_argument(
        "--only",
        type=_names(WORKLOADS),
        default=WORKLOADS,
        metavar="NAMES",
        help=f"workloads with commas; of {', '.join(sorted(WORKLOADS))}",
    )
    known = tuple(system.name for system in SYSTEMS)
    parser.add_argument(
        "--systems",
        type=_names(known),
        default=known,
        metavar="NAMES",
        help=f"with commas; of {', '.join(known)}",
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        default=1500.0,
        metavar="S",
        help="after the first round, no turn begins that would not end by then (default 1500)",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=150.0,
        metavar="S",
        help="of one run of one workload (default 150)",
    )
    parser.add_argument(
        "--turn-s",
        type=float,
        default=300.0,
        metavar="S",
        help="of a peer's turn; what it has not reached by then is left out (default 300)",
    )
    parser.add_argument(
        "--start-limit-s",
        type=float,
        default=300.0,
        metavar="S",
        help="of a start (default 300)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=6,
        metavar="K",
        help="disturbed runs to throw away, in all (default 6)",
    )
    parser.add_argument(
        "--peers-dir", type=Path, metavar="FOLDER", help="where `make peers` has put them"
    )
    arguments = parser.parse_args(words)
    if arguments.runs < 1:
        parser.error("--runs is at least 1")
    return arguments


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = set(text.split(","))
        if unknown := names - set(known):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}")
        return tuple(name for name in known if name in names)

    return read


def questions(workload: str, variant: int) -> list[Question]:
    """Returns the requests of a workload; those to warm up with are fewer and shorter."""
    asks = PRESETS[NUMBERED[workload]].asks(variant, VOCAB_SIZE)
    found = [Question(ask.prompt, ask.output_tokens) for ask in asks]
    if variant != WARM_UP:
        return found
    return [
        Question(one.prompt, min(one.output_tokens, WARM_UP_TOKENS))
        for one in found[: WARM_UP_REQUESTS.get(workload, len(found))]
    ]


def is_worth_repeating(document: Mapping[str, Any], name: str, workload: str) -> bool:
    """Whether a further round of a peer can change a ratio, going by what it has shown so far."""
    system = document["systems"][name]
    if system["reason"] or workload in system["failures"]:
        return False
    if system["is_ours"]:
        return True
    metric = report.METRICS[workload][0]

    def middle(one: str) -> float:
        found = report.values(document["systems"][one], workload, metric.key)
        spread = report.Spread.of([*found.values()])
        return 0.0 if spread is None else spread.middle

    best = report.best_peer(document, workload, metric, None)
    if best is None or not middle(name):
        return False
    if metric.times_better(middle(name), middle(best)) >= NEAR_BEST:
        return True
    walls = report.values(system, workload, "wall_s").values()
    is_best = report.best_peer(document, workload, metric, system["class"]) == name
    return is_best and max(walls, default=0.0) <= QUICK_S


class Bench:
    """One call of the command: whose turn it is, and what was found."""

    def __init__(self, arguments: argparse.Namespace, places: Places) -> None:
        self._arguments, self._places = arguments, places
        self._systems = [one for one in SYSTEMS if one.name in arguments.systems]
        self._start_s = time.monotonic()
        self._retries = arguments.retries
        self._spare_variant = arguments.runs
        self._took_s: dict[tuple[str, str], float] = {}
        """A workload of a system the last time, with its warm-up."""
        self._answers: dict[str, list[list[int]]] = {}
        self._prompts: list[list[int]] = (
            json.loads(places.prompts.read_text()) if places.prompts.exists() else []
        )
        say("measuring the machine")
        self.document: dict[str, Any] = {
            "bench": report.BENCH,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": common.commit(),
            "machine": machine.measured(),
            "versions": common.versions(),
            "model": self._places.gguf.name,
            "rounds": arguments.runs,
            "seconds": 0.0,
            "systems": {one.name: self._entry(one) for one in self._systems},
            "quality": {"tokens": QUALITY_TOKENS, "prompts": 0, "reason": "", "systems": {}},
            "notes": [],
        }

    def _entry(self, system: System) -> dict[str, Any]:
        missing = system.missing(self._places)
        return {
            "is_ours": system.is_ours,
            "precision": system.precision,
            "class": system.precision_class,
            "door": system.door,
            "version": "",
            "reason": "" if missing is None else f"not installed (no {missing.name}): make peers",
            "starts_s": [],
            "peak_bytes": [],
            "failures": {},
            "runs": {},
        }

    def run(self) -> None:
        """Runs every round, then the reference."""
        for number in range(self._arguments.runs):
            shift = number % len(self._systems)
            for system in [*self._systems[shift:], *self._systems[:shift]]:
                wanted = self._wanted(system, number)
                if wanted and self._has_time(system, number, wanted):
                    self._take_turn(system, number, wanted)
        self._compare_answers()
        self._save()

    def _wanted(self, system: System, number: int) -> list[str]:
        asked = [one for one in self._arguments.only if one in system.workloads]
        if self.document["systems"][system.name]["reason"]:
            return []
        if number == 0:
            return asked
        return [one for one in asked if is_worth_repeating(self.document, system.name, one)]

    def _has_time(self, system: System, number: int, wanted: Sequence[str]) -> bool:
        """Whether a turn ends within the budget, going by the last one; the first is never cut."""
        left_s = self._arguments.budget_s - (time.monotonic() - self._start_s)
        # The first start may have compiled, which is kept.
        starts_s = self.document["systems"][system.name]["starts_s"]
        needed_s = min([WARM_START_S, *starts_s])
        needed_s += sum(self._took_s.get((system.name, one), 0.0) for one in wanted)
        if number == 0 or needed_s <= left_s:
            return True
        self._note(f"{system.name} has no run {number}: the time was up (--budget-s)")
        return False

    def _take_turn(self, system: System, number: int, wanted: Sequence[str]) -> None:
        """One system: a workload that fails costs a start and nothing else."""
        entry, todo = self.document["systems"][system.name], list(wanted)
        ends_s = math.inf if system.is_ours else time.monotonic() + self._arguments.turn_s
        while todo:
            if time.monotonic() > ends_s:
                reason = f"left out, after {self._arguments.turn_s:.0f} s for the others"
                entry["failures"] |= dict.fromkeys(todo, reason)
                break
            has_started = False
            try:
                with running(system, self._places) as child:
                    self._start(system, child)
                    has_started = True
                    self._run_workloads(system, child, number, todo, ends_s)
            except ChildError as error:
                say(f"{system.name} failed: {error}\n{log_tail(log_path(system, self._places))}")
                if not has_started:
                    entry["reason"] = str(error)
                    break
                entry["failures"][todo.pop(0)] = str(error)
            self._save()

    def _start(self, system: System, child: Child) -> None:
        """Waits for the first token; the first time, asks what the reference will be asked."""
        entry, limit_s = self.document["systems"][system.name], self._arguments.limit_s
        child.wait_until_ready(self._arguments.start_limit_s)
        child.ask([FIRST], None, limit_s=limit_s)
        start_s = time.perf_counter() - child.started_s
        entry["version"] = child.version
        entry["starts_s"].append(round(start_s, 2))
        say(f"{system.name} {child.version}: first token {start_s:.1f} s after its start")
        if self._prompts and system.name not in self._answers:
            asked = [Question(prompt, QUALITY_TOKENS) for prompt in self._prompts]
            replies = child.ask(asked, None, limit_s=limit_s)
            self._answers[system.name] = [reply.ids for reply in replies]

    def _run_workloads(
        self, system: System, child: Child, number: int, todo: list[str], ends_s: float
    ) -> None:
        """Takes workloads out of ``todo`` as it finishes them, until it is time to end."""
        while todo and (start_s := time.monotonic()) <= ends_s:
            workload, limit_s = todo[0], self._arguments.limit_s
            child.ask(questions(workload, WARM_UP), _clients(workload), limit_s=limit_s)
            self._run(system, child, number, workload)
            self._took_s[system.name, workload] = time.monotonic() - start_s
            todo.pop(0)
            self._save()

    def _run(self, system: System, child: Child, number: int, workload: str) -> None:
        """Measures a workload, and again on ids of its own while others disturb and tries last."""
        entry, variant = self.document["systems"][system.name], number
        while True:
            asked = questions(workload, variant)
            other, memory = machine.OtherLoad(), Memory(child.process_id)
            # Looking costs a little, so only where memory is asked for.
            with memory if workload == "W2" else contextlib.nullcontext():
                replies = child.ask(asked, _clients(workload), limit_s=self._arguments.limit_s)
            cores = other.cores()
            found = report.measure(asked, replies)
            say(f"  {system.name} {workload} run {number}: {_in_short(found)}, others {cores}")
            if cores is None or cores <= NOISE_CORES or not self._retries:
                break
            self._retries -= 1
            variant, self._spare_variant = self._spare_variant, self._spare_variant + 1
        runs = entry["runs"].setdefault(workload, {})
        runs[str(number)] = {**found, "variant": variant, "other_cores": cores}
        if workload == "W2":
            entry["peak_bytes"].append(memory.peak_bytes)

    def _compare_answers(self) -> None:
        """Asks the reference, which is not installed everywhere, about everybody's answers."""
        quality = self.document["quality"]
        answers: dict[str, list[list[int]]] = {}
        for name, found in self._answers.items():
            if all(len(ids) == QUALITY_TOKENS for ids in found):
                answers[name] = found
            else:
                self._note(f"{name} is not compared with the reference: its answers are short")
        python = self._places.python("transformers")
        if not answers or not python.exists():
            quality["reason"] = "not compared: needs the peer transformers as reference"
            return
        try:
            said = self._ask_reference(python, answers)
        except (subprocess.SubprocessError, OSError) as error:
            quality["reason"] = f"not compared: the reference failed ({type(error).__name__})"
            return
        quality["prompts"] = len(self._prompts)
        tokens = len(self._prompts) * QUALITY_TOKENS
        for name, found in [("float32 reference", said["reference"]), *answers.items()]:
            loss = said["losses"][name if name in answers else "reference"]
            quality["systems"][name] = {
                "equal_share": round(report.equal_share(found, said["reference"]), 4),
                "identical": sum(a == b for a, b in zip(found, said["reference"], strict=True)),
                "loss": round(loss / tokens, 4),
            }

    def _ask_reference(
        self, python: Path, answers: Mapping[str, list[list[int]]]
    ) -> dict[str, Any]:
        told = {
            "gguf": str(self._places.gguf),
            "prompts": self._prompts,
            "count": QUALITY_TOKENS,
            "answers": answers,
        }
        said = self._places.root / "logs" / "reference.json"
        with (self._places.root / "logs" / "reference.log").open("w") as log:
            subprocess.run(
                [str(python), "-m", "bench.peers.drivers.reference", str(said)],
                input=json.dumps(told),
                text=True,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                timeout=REFERENCE_LIMIT_S,
                check=True,
            )
        return json.loads(said.read_text())

    def _note(self, text: str) -> None:
        say(text)
        self.document["notes"].append(text)

    def _save(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self._start_s, 1)
        write(self.document, self._arguments.out)


def _clients(workload: str) -> int | None:
    return PRESETS[NUMBERED[workload]].load.clients


def _in_short(found: Mapping[str, Any]) -> str:
    if "short" in found:
        return f"SHORT, {found['short']}"
    return (
        f"{found['wall_s']:.2f} s, {found['tokens_per_s']:.1f} tokens/s, "
        f"first {found['first_ms']:.0f} ms, gaps {found['gap_ms']:.1f}/{found['gap_p99_ms']:.0f} ms"
    )


def _has_failed(system: Mapping[str, Any]) -> bool:
    is_short = any("short" in run for runs in system["runs"].values() for run in runs.values())
    return bool(system["reason"] or system["failures"] or is_short)


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Lets SIGTERM run what stands in ``finally``, or a child would go on without its parent."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Waits for another one on this machine: two would measure each other."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another bench.peers is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
