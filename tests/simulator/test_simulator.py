"""The engine under seeded faults; see ``simulate.py``. The long run is in processes of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.engine import data_shard, engine, pages, prefix, publish, scheduler, step, stream
from tests.simulator.planted import BUGS, Bug
from tests.simulator.simulate import Simulation, simulate

ROOT = Path(__file__).parents[2]
STEPS = 5000
PLANTED_SEEDS, PLANTED_STEPS = 20, 600


@pytest.mark.parametrize("seed", range(6))
def test_every_accepted_request_ends_once_with_the_right_tokens(seed: int) -> None:
    simulation = simulate(seed, 300)

    assert simulation.accepted == simulation.ended > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(20, id="a hundred thousand"),
        pytest.param(200, id="a million", marks=pytest.mark.prove),
    ],
)
def test_that_many_steps_under_faults_keep_every_invariant(seeds: int) -> None:
    """Seeds over two processes, without the run-time type checks of this one."""
    half = seeds // 2
    command = [sys.executable, "-m", "tests.simulator.simulate", "--steps", str(STEPS)]
    runs = [
        subprocess.Popen(
            [*command, "--seed", str(first), "--seeds", str(half)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for first in (0, half)
    ]
    steps = 0
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, errors
        print(output)
        found = re.search(r"steps=(\d+)", output)
        assert found is not None, output
        steps += int(found[1])
    assert steps >= seeds * STEPS


def test_a_seed_replays_exactly() -> None:
    def digests(seed: int) -> list[str]:
        simulation = Simulation(seed)
        found = []
        for _ in range(10):
            simulation.advance(40)
            found.append(simulation.digest())
        return found

    first = digests(3)

    assert digests(3) == first
    assert len(set(first)) == 10
    assert digests(4)[-1] != first[-1]


def test_a_failing_seed_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bug = next(bug for bug in BUGS if bug.name == "a page is freed twice")
    bug.plant(monkeypatch)

    failures = [failure_of(0, 300) for _ in range(2)]

    assert failures[0] is not None
    assert "python -m tests.simulator.simulate --seed 0 --steps 300" in failures[0]
    assert failures[0] == failures[1], "the same seed fails in the same turn, with the same words"


def test_the_simulator_runs_the_classes_that_the_server_runs() -> None:
    launch = pytest.importorskip("jaxserve.launch", reason="needs the composition root")
    simulated = Simulation(0).engine

    assert type(simulated) is launch.Engine is engine.Engine
    assert type(simulated.scheduler) is engine.Scheduler is scheduler.Scheduler
    assert type(simulated.scheduler.shards[0].pool) is data_shard.PagePool is pages.PagePool
    assert (
        type(simulated.scheduler.shards[0].prefix) is data_shard.PrefixCache is prefix.PrefixCache
    )
    assert engine.Publisher is publish.Publisher
    assert engine.TokenStream is stream.TokenStream
    assert engine.pack_step is step.pack_step


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of a few seeds, which are tried from the one on that is known to notice it."""
    bug.plant(monkeypatch)

    seeds = sorted(range(PLANTED_SEEDS), key=lambda seed: seed != bug.seed)
    caught = next(filter(None, (failure_of(seed, PLANTED_STEPS) for seed in seeds)), None)

    assert caught is not None, f"{PLANTED_SEEDS} seeds did not notice that {bug.name}"


def failure_of(seed: int, steps: int) -> str | None:
    """Returns how a seed fails, or None."""
    try:
        simulate(seed, steps)
    except Exception as error:
        return "\n".join([f"{type(error).__name__}: {error}", *error.__notes__])
    return None
