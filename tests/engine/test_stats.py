from __future__ import annotations

import threading

import pytest

from jaxserve.engine.stats import RateMeter
from jaxserve.testing import ManualClock, counting_engine
from tests.engine.driving import run, submit, turn


def test_the_numbers_of_a_small_scene() -> None:
    clock = ManualClock()
    engine, runner = counting_engine(clock=clock, max_rows=2, num_pages=11, context_tokens=40)
    submit(engine, "a", [1, 2, 3, 4, 5], max_tokens=9)
    submit(engine, "b", [6, 7], max_tokens=9)
    submit(engine, "c", [8, 9, 10], max_tokens=9)
    clock.advance(3.0)
    turn(engine)  # Dispatches both prompts.
    turn(engine)  # Dispatches a decode step, publishes the prompts.

    stats = engine.stats()

    assert (stats.rows_running, stats.rows_max) == (2, 2)
    assert (stats.requests_waiting, stats.tokens_waiting) == (1, 3)
    assert stats.queue_age_seconds == 3.0
    assert (stats.pages_total, stats.pages_used, stats.pages_cached, stats.pages_free) == (
        10,
        3,
        0,
        7,
    )
    assert stats.page_tokens == 4
    assert (stats.prompt_tokens_total, stats.output_tokens_total) == (7, 2)
    assert (stats.requests_accepted_total, stats.requests_rejected_total) == (3, 0)
    assert stats.steps_total == 1
    # 5 and 2 tokens in a bucket of 8, then two rows in a bucket of 2.
    assert stats.padding_waste == pytest.approx(1 - 9 / 10)
    assert stats.compiles_after_ready == runner.compiles_after_ready == 0
    assert set(stats.phase_seconds_total) == {"plan", "pack", "dispatch", "wait", "publish"}
    assert all(seconds > 0 for seconds in stats.phase_seconds_total.values())
    assert stats.healthy
    assert not stats.draining

    run(engine)
    stats = engine.stats()

    assert (stats.rows_running, stats.requests_waiting, stats.queue_age_seconds) == (0, 0, 0.0)
    assert stats.requests_finished_total == {
        "stop": 0,
        "length": 3,
        "cancelled": 0,
        "deadline": 0,
        "error": 0,
    }
    assert stats.output_tokens_total == 27
    assert stats.output_tokens_per_second == 27.0
    assert stats.pages_used == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_a_new_engine_has_done_nothing() -> None:
    engine, _ = counting_engine()
    stats = engine.stats()

    assert (stats.pages_free, stats.pages_total) == (32, 32)
    assert stats.padding_waste == stats.prefix_hit_rate == stats.output_tokens_per_second == 0.0


def test_the_rate_is_a_mean_over_the_last_ten_seconds() -> None:
    meter = RateMeter()
    for second in range(100, 120):
        meter.add(second + 0.5, 30)

    assert meter.rate(119.99) == pytest.approx(30.0, rel=0.02)
    assert meter.rate(124.0) == pytest.approx(15.0, rel=0.2)
    assert meter.rate(140.0) == 0.0


def test_the_rate_of_a_short_burst_is_not_diluted_by_the_time_before_it() -> None:
    meter = RateMeter()
    meter.add(100.0, 50)
    assert meter.rate(100.5) == 50.0
    meter.add(101.0, 50)

    assert meter.rate(102.0) == 50.0


def test_numbers_can_be_read_while_the_engine_runs() -> None:
    """Reads as fast as it can beside a running engine; pages always add up."""
    engine, _ = counting_engine(max_rows=8)
    engine.start()
    done = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                stats = engine.stats()
                assert stats.pages_free + stats.pages_used + stats.pages_cached == stats.pages_total
                assert min(stats.pages_free, stats.pages_used, stats.pages_cached) >= 0
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(150):
        submit(engine, str(number), [number % 7 + 1] * (number % 13 + 1), max_tokens=6)
    while not engine.idle:
        done.wait(0.01)
    done.set()
    reader.join()
    engine.stop()

    assert failures == []
