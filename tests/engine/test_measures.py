"""Counts and sums of small scenes, worked out by hand on a clock that moves when told to."""

from __future__ import annotations

import threading

import pytest

from jaxserve.engine.measures import (
    FIRST_TOKEN_S,
    OUR_REQUEST_S,
    OUR_TOKEN_S,
    PHASES,
    REQUEST_S,
    TOKEN_S,
    Histogram,
    one_two_five,
)
from jaxserve.engine.page_states import CACHED
from jaxserve.errors import (
    DrainingError,
    DuplicateRequestError,
    PromptTooLongError,
    QueueFullError,
)
from jaxserve.testing import ManualClock, counting_engine
from tests.engine.driving import run, submit, turn


def test_a_bound_is_part_of_its_bucket_and_the_last_bucket_has_none() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.5, 4.0, 5.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    seen = histogram.snapshot()

    assert seen.counts == (2, 4, 1, 1)
    assert (seen.count, seen.sum) == (8, 18.0)
    assert seen.cumulative() == [(1.0, 2), (2.0, 6), (4.0, 7)]
    assert seen.cumulative((2.0,)) == [(2.0, 6)]


def test_a_difference_of_snapshots_is_what_came_between_them() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(0.5)
    before = histogram.snapshot()
    histogram.observe(1.5, times=2)
    between = histogram.snapshot().since(before)

    assert (between.counts, between.sum) == ((0, 2, 0), 3.0)
    assert before.counts == (1, 0, 0)


def test_quantiles_lie_between_the_bounds_of_their_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    assert histogram.snapshot().quantile(0.5) is None
    histogram.observe(1.5, times=10)
    assert histogram.snapshot().quantile(0.5) == 1.5
    assert histogram.snapshot().quantile(1.0) == 2.0
    histogram.observe(100.0, times=90)

    assert histogram.snapshot().quantile(0.05) == 1.5
    assert histogram.snapshot().quantile(0.99) == 4.0


def test_bounds_ascend_and_hold_those_of_other_servers() -> None:
    for bounds in (FIRST_TOKEN_S, OUR_TOKEN_S, OUR_REQUEST_S):
        assert list(bounds) == sorted({*bounds})
    assert {*TOKEN_S} < {*OUR_TOKEN_S}
    assert {*REQUEST_S} < {*OUR_REQUEST_S}
    assert one_two_five(40) == (1, 2, 5, 10, 20)
    assert one_two_five(1) == (1,)


def test_a_request_is_timed_from_its_acceptance_to_its_last_token() -> None:
    """Accepted at 0, planned at 2, its tokens come at 3, 3.5, 4.5 and 5.5."""
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, overlap=False)
    submit(engine, "a", [1, 2, 3], max_tokens=4)
    clock.advance(2.0)
    turn(engine)
    for wait_s in (1.0, 0.5, 1.0, 1.0):
        clock.advance(wait_s)
        turn(engine)
    assert engine.idle
    seen = engine.measures()

    sums = {
        name: getattr(seen, name).sum
        for name in ("time_to_first_token", "queue", "prefill", "end_to_end", "decode", "inference")
    }
    assert sums == {
        "time_to_first_token": 3.0,
        "queue": 2.0,
        "prefill": 1.0,
        "end_to_end": 5.5,
        "decode": 2.5,
        "inference": 3.5,
    }
    assert (seen.inter_token_latency.count, seen.inter_token_latency.sum) == (3, 2.5)
    assert seen.time_per_output_token.sum == pytest.approx(2.5 / 3)
    for name in sums:
        assert getattr(seen, name).count == 1
    assert (seen.prompt_tokens.sum, seen.output_tokens.sum, seen.max_tokens.sum) == (3, 4, 4)
    assert (seen.choices.count, seen.choices.sum) == (1, 1)


def test_every_token_is_counted_once_whatever_happens_to_its_request() -> None:
    """More rows than places, choices and preemptions: gaps = tokens - choices with a token."""
    engine, _ = counting_engine(max_rows=4, num_pages=13, context_tokens=40)
    readers = [submit(engine, str(n), [n + 1] * 6, max_tokens=14, n=1 + n % 2) for n in range(6)]
    run(engine)
    stats, seen = engine.stats(), engine.measures()

    assert stats.preemptions_total > 0
    assert seen.inter_token_latency.count == stats.output_tokens_total - 9
    assert seen.time_per_output_token.count == 9
    assert seen.end_to_end.count == seen.time_to_first_token.count == len(readers) == 6
    assert seen.output_tokens.sum == stats.output_tokens_total == 9 * 14
    assert seen.prompt_tokens.sum == 6 * 6
    assert seen.choices.sum == 9


def test_steps_are_counted_by_what_they_computed() -> None:
    engine, _ = counting_engine(overlap=False)
    submit(engine, "a", [1, 2, 3], max_tokens=3)
    turn(engine, 2)  # The prompt, then a decode step in flight.
    submit(engine, "b", [4, 5], max_tokens=1)
    run(engine)
    seen, stats = engine.measures(), engine.stats()

    assert {kind: each.count for kind, each in seen.step_seconds.items()} == {
        "prefill": 1,
        "decode": 1,
        "mixed": 1,
    }
    assert seen.step_tokens.count == stats.steps_total == 3
    assert seen.step_tokens.sum == 3 + 1 + 3
    assert {*seen.phase_seconds} == {*PHASES}
    assert seen.phase_seconds["publish"].count == 3
    assert stats.phase_seconds_total["wait"] == seen.phase_seconds["wait"].sum > 0


def test_what_was_not_answered_has_a_first_token_and_no_end() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", [1, 2, 3], max_tokens=40)
    turn(engine, 5)
    reader.stream.close()
    run(engine)
    seen = engine.measures()

    assert seen.time_to_first_token.count == 1
    assert seen.inter_token_latency.count > 0
    assert seen.end_to_end.count == seen.output_tokens.count == seen.choices.count == 0


def test_a_request_stopped_before_its_first_token_is_not_timed() -> None:
    engine, _ = counting_engine()
    submit(engine, "a", [1, 2, 3]).stream.stop(0)
    run(engine)

    assert engine.stats().requests_finished_total["stop"] == 1
    assert engine.measures().end_to_end.count == 0


def test_resumed_tokens_are_output_that_took_no_time() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, overlap=False)
    submit(engine, "a", [1, 2], resume=(3, 4, 5), max_tokens=5)
    turn(engine)
    turn(engine)
    clock.advance(2.0)
    run(engine)
    seen = engine.measures()

    assert seen.output_tokens.sum == 5
    assert (seen.time_per_output_token.count, seen.time_per_output_token.sum) == (1, 2.0)
    assert seen.max_tokens.sum == 5


def test_refusals_are_counted_by_their_reason() -> None:
    engine, _ = counting_engine(context_tokens=8, max_waiting_requests=1)
    submit(engine, "a", [1])
    for error, name, prompt in (
        (DuplicateRequestError, "a", [1]),
        (QueueFullError, "b", [1]),
        (QueueFullError, "c", [1]),
        (PromptTooLongError, "d", [1] * 9),
    ):
        with pytest.raises(error):
            submit(engine, name, prompt)
    engine.drain()
    with pytest.raises(DrainingError):
        submit(engine, "e", [1])

    assert engine.measures().refused == {
        "DUPLICATE_REQUEST_ID": 1,
        "QUEUE_FULL": 2,
        "PROMPT_TOO_LONG": 1,
        "DRAINING": 1,
    }
    assert engine.stats().requests_rejected_total == 2


def test_measures_can_be_read_while_the_engine_runs() -> None:
    """Sums and counts of one histogram belong together: every step here has one token a row."""
    engine, _ = counting_engine(max_rows=8)
    engine.start()
    done = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                seen = engine.measures().choices
                assert seen.sum == 2 * seen.count
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        submit(engine, str(number), [number % 7 + 1], max_tokens=3, n=2)
    while not engine.idle:
        done.wait(0.01)
    done.set()
    reader.join()
    engine.stop()

    assert failures == []
    assert engine.measures().choices.count == 100


def test_a_picture_of_the_pool_shows_holders_and_what_is_kept() -> None:
    """Two choices share the full pages of their prompt; afterwards these are cached."""
    engine, _ = counting_engine(num_pages=11, context_tokens=40)
    submit(engine, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=8, n=2)
    turn(engine, 4)
    stats, asked = engine.stats(), engine.pages()
    assert not asked.done()
    engine.run_once()
    (states,) = asked.result(timeout=0)

    assert states.shape == (10,)
    assert (states == 2).sum() == 2
    assert (states == 1).sum() == stats.pages_used - 2
    run(engine)
    asked = engine.pages()
    engine.run_once()
    (states,) = asked.result(timeout=0)

    stats = engine.stats()
    assert (states == CACHED).sum() == stats.pages_cached > 0
    assert (states == 0).sum() == stats.pages_free


def test_an_idle_engine_answers_for_its_pages_and_heeds_no_reader_that_has_left() -> None:
    engine, _ = counting_engine(data_shards=2, num_pages=5, context_tokens=16)
    engine.start()
    pictures = engine.pages().result(timeout=20)
    left = engine.pages()
    left.cancel()
    engine.pages().result(timeout=20)
    engine.stop()

    assert [picture.tolist() for picture in pictures] == [[0] * 4] * 2
