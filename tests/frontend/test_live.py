"""What a watcher is told, of engines whose numbers can be worked out by hand."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.page_states import CACHED, page_states
from jaxserve.frontend.live import MAX_CELLS, WINDOW_S, LiveView, pool_map
from jaxserve.testing import ManualClock, counting_engine
from tests.engine.driving import run, submit, turn


def cells_of(pool: dict[str, Any]) -> list[list[int]]:
    raw = base64.b64decode(pool["map"]["cells"])
    return np.frombuffer(raw, np.uint8).reshape(-1, 3).tolist()


def test_a_small_pool_has_one_cell_for_each_page() -> None:
    pool = pool_map([np.array([0, 1, 2, 254, CACHED], np.uint8), np.array([1], np.uint8)])

    assert pool["map"]["pages_per_cell"] == 1
    assert cells_of(pool) == [
        [0, 0, 0],
        [255, 0, 0],
        [0, 255, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 0, 0],
    ]
    assert (pool["free"], pool["used"], pool["shared"], pool["cached"]) == (1, 4, 2, 1)


def test_a_large_pool_is_drawn_in_shares() -> None:
    """Cells of four pages; the last one has only one."""
    states = np.zeros(4 * (MAX_CELLS - 1) + 1, np.uint8)
    states[:8] = [1, 1, 0, 0, 1, 2, CACHED, 0]
    states[-1] = CACHED
    pool = pool_map([states])
    cells = cells_of(pool)

    assert pool["map"]["pages_per_cell"] == 4
    assert len(cells) == MAX_CELLS
    assert cells[0] == [127, 0, 0]
    assert cells[1] == [63, 63, 63]
    assert cells[2] == [0, 0, 0]
    assert cells[-1] == [0, 0, 255]
    assert pool["free"] == len(states) - 6


def answer(engine: Engine, clock: ManualClock, name: str, wait_s: float) -> None:
    """Answers one request of two tokens, ``wait_s`` apart, after as long a queue."""
    submit(engine, name, [1, 2, 3], max_tokens=2)
    for _ in range(3):
        clock.advance(wait_s)
        turn(engine)
    run(engine)


def test_an_event_tells_what_the_engine_does_now() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, overlap=False, max_rows=2)
    for name in "abc":
        submit(engine, name, [1, 2, 3, 4, 5], max_tokens=9)
    turn(engine, 2)
    clock.advance(2.0)
    states = [page_states(shard.pool) for shard in engine.scheduler.shards]
    event = LiveView(engine, clock).event(states)

    assert event["health"] == {"serving": True, "detail": "serving"}
    assert event["rows"] == {"running": 2, "max": 2}
    assert event["queue"] == {"requests": 1, "tokens": 5, "age_seconds": 2.0}
    assert event["prefix"] == {"lookup_tokens": 10, "hit_tokens": 0, "rate": 0.0}
    assert event["tokens"]["output_total"] == 2
    assert event["counts"]["steps"] == 1
    pages = event["pages"]
    assert (pages["total"], pages["used"], pages["free"]) == (32, 4, 28)
    assert event["phases"]["wait"] > 0


def test_percentiles_are_of_the_last_minute() -> None:
    """A slow answer, and a quick one after the window of the slow one has passed."""
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, overlap=False)
    view = LiveView(engine, clock)
    assert view.event(None)["latency"]["end_to_end"]["seconds"] == [None] * 3
    answer(engine, clock, "slow", 10.0)
    slow = view.event(None)["latency"]["end_to_end"]
    assert slow["recent"]
    assert slow["seconds"][0] > 15
    clock.advance(6.0)
    view.event(None)
    clock.advance(WINDOW_S)
    idle = view.event(None)["latency"]["end_to_end"]
    assert not idle["recent"]
    assert (idle["count"], idle["seconds"]) == (1, slow["seconds"])
    answer(engine, clock, "quick", 0.01)
    quick = view.event(None)["latency"]["end_to_end"]

    assert quick["recent"]
    assert (quick["count"], quick["total"]) == (1, 2)
    assert quick["seconds"][2] < 0.2
    assert quick["least"] == 0.001


def test_the_window_keeps_a_bounded_number_of_snapshots() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock)
    view = LiveView(engine, clock)
    for _ in range(1000):
        view.event(None)
        clock.advance(0.5)

    assert len(view._earlier) <= 14
    view.clear()
    assert not view._earlier


def test_without_a_picture_the_pool_is_told_in_numbers() -> None:
    engine, _ = counting_engine()
    submit(engine, "a", [1] * 10, max_tokens=9)
    turn(engine, 2)
    pages = LiveView(engine).event(None)["pages"]

    assert (pages["free"], pages["used"], pages["cached"]) == (29, 3, 0)
    assert pages["map"] is None
    assert pages["shared"] is None
