"""What a step costs the host at 64 rows, apart from the device.

A shared machine is easily several times slower for a moment, so the best of many short stretches
counts, and it is compared with plain Python work that is timed beside it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.stream import ThreadWaker
from jaxserve.testing import paced_engine

ROWS = 64
engine, _ = paced_engine(
    max_rows=ROWS, page_tokens=16, num_pages=ROWS * 40, context_tokens=4096,
    vocab_size=49152, step_tokens=512, max_chunks=16,
)
waker = ThreadWaker()
streams = [
    engine.submit(
        Request(request_id=str(i), prompt=[i] * 100, sampling=SamplingParams(max_tokens=500)), waker
    )
    for i in range(ROWS)
]
for _ in range(40):
    engine.run_once()
assert len(engine.scheduler.running) == ROWS

def stretch():
    before = engine.stats().phase_seconds_total
    for _ in range(10):
        engine.run_once()
        for stream in streams:
            stream.take()
    after = engine.stats().phase_seconds_total
    return {phase: (after[phase] - before[phase]) / 10 for phase in after}

def yardstick():
    start = time.perf_counter()
    for _ in range(10):
        sum(i * i for i in range(1000))
    return (time.perf_counter() - start) / 10

costs, units = [], []
for _ in range(30):
    units.append(yardstick())
    costs.append(stretch())
best = {phase: min(cost[phase] for cost in costs) * 1e6 for phase in costs[0]}
print(best["plan"], sum(best.values()), min(units) * 1e6)
"""


@pytest.mark.slow
def test_host_work_at_64_rows_is_far_below_a_step() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    plan_us, total_us, yardstick_us = map(float, run.stdout.split())
    print(f"plan {plan_us:.0f} us, all phases {total_us:.0f} us, yardstick {yardstick_us:.0f} us")

    assert plan_us < 300
    assert total_us < 1500
    # A thousand multiplications took 58 us on the machine these goals were set on, and all phases
    # together 111 us. Four times that ratio is left for other machines and moments.
    assert total_us < 8 * yardstick_us
