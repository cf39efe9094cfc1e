"""Who is let in, and what the others are told."""

from __future__ import annotations

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    PromptTooLongError,
    QueueFullError,
)
from jaxserve.testing import ManualClock, counting_engine
from tests.engine.driving import lose_the_pool, run, submit, turn


def waiting(engine: Engine) -> tuple[int, int]:
    stats = engine.stats()
    return stats.requests_waiting, stats.tokens_waiting


def test_the_queue_is_bounded_in_requests() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, max_rows=1, max_waiting_requests=2)
    submit(engine, "a", [1], max_tokens=30)
    turn(engine)
    submit(engine, "b", [1, 2])
    submit(engine, "c", [1, 2, 3])
    assert waiting(engine) == (2, 5)
    clock.advance(8.0)

    with pytest.raises(QueueFullError, match=r"full \(2 requests, limit 2\)") as caught:
        submit(engine, "d", [1])

    error = caught.value
    assert (error.what, error.value, error.limit, error.retry_after_s) == ("requests", 2, 2, 4.0)
    assert "raise --max-waiting-requests" in str(error)
    assert engine.stats().requests_rejected_total == 1


def test_the_queue_is_bounded_in_prompt_tokens() -> None:
    engine, _ = counting_engine(max_rows=1, max_waiting_tokens=10)
    submit(engine, "a", [1] * 6)
    submit(engine, "b", [1] * 4)

    with pytest.raises(QueueFullError, match=r"11 tokens, limit 10") as caught:
        submit(engine, "c", [1])

    error = caught.value
    assert (error.what, error.value, error.limit, error.retry_after_s) == ("tokens", 11, 10, 0.1)


def test_one_request_alone_is_let_in_however_long_its_prompt() -> None:
    engine, _ = counting_engine(max_waiting_tokens=10)
    reader = submit(engine, "a", [1] * 30, max_tokens=1)
    run(engine)

    assert reader.stream.finished


def test_a_full_queue_takes_requests_again_when_one_is_scheduled_or_gives_up() -> None:
    engine, _ = counting_engine(max_rows=1, max_waiting_requests=1)
    submit(engine, "a", [1], max_tokens=4)
    with pytest.raises(QueueFullError):
        submit(engine, "b", [1])

    turn(engine)
    patient = submit(engine, "b", [1], max_tokens=4)
    with pytest.raises(QueueFullError):
        submit(engine, "c", [1])
    patient.stream.close()
    turn(engine)
    submit(engine, "c", [1], max_tokens=4)

    run(engine)
    assert waiting(engine) == (0, 0)
    assert engine.stats().requests_rejected_total == 2


def test_requests_that_were_preempted_do_not_fill_the_queue_for_new_ones() -> None:
    engine, _ = counting_engine(max_rows=2, max_waiting_requests=1)
    submit(engine, "a", [1], max_tokens=30)
    turn(engine)
    submit(engine, "b", [1], max_tokens=30)
    turn(engine)
    lose_the_pool(engine)
    assert engine.stats().requests_waiting == 2

    submit(engine, "c", [1], max_tokens=1)
    run(engine)


def test_waiting_is_advised_for_half_the_age_of_the_oldest_within_limits() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, max_waiting_requests=1)
    submit(engine, "a", [1])
    advice: list[float] = []
    for seconds in (0.0, 10.0, 1000.0):
        clock.advance(seconds)
        with pytest.raises(QueueFullError) as caught:
            submit(engine, "b", [1])
        advice.append(caught.value.retry_after_s)

    assert advice == [0.1, 5.0, 30.0]


def test_an_id_is_taken_only_while_its_request_lives() -> None:
    engine, _ = counting_engine()
    submit(engine, "a", [1], max_tokens=1)
    with pytest.raises(DuplicateRequestError, match="request_id 'a' is in use") as caught:
        submit(engine, "a", [2])
    assert (caught.value.field, caught.value.request_id) == ("request_id", "a")

    run(engine)
    submit(engine, "a", [2], max_tokens=1)
    run(engine)
    assert engine.stats().requests_accepted_total == 2


def test_a_deadline_in_the_past_is_refused_at_the_door() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock)
    with pytest.raises(DeadlineExceededError, match="passed after 0 output tokens"):
        submit(engine, "a", [1], deadline_s=clock.now)

    assert engine.idle


def test_a_request_that_breaks_the_models_limits_is_refused_at_the_door() -> None:
    engine, _ = counting_engine(context_tokens=16)
    with pytest.raises(PromptTooLongError, match="prompt has 16 tokens and the context window"):
        submit(engine, "a", [1] * 16)

    assert engine.idle
    assert engine.stats().requests_accepted_total == 0


def test_the_ledger_of_the_door_notices_what_does_not_add_up() -> None:
    engine, _ = counting_engine()
    submit(engine, "a", [1, 2])
    admission = engine._admission
    engine.check_integrity()

    admission.waiting_tokens += 1
    with pytest.raises(AssertionError, match="2 tokens wait, not 3"):
        engine.check_integrity()
    admission.waiting_tokens -= 1
    live = admission._live.pop("a")
    with pytest.raises(AssertionError, match=r"\['a'\] wait and are not live"):
        engine.check_integrity()
    admission._live["a"] = live
    live.scheduled_s = 1.0
    with pytest.raises(AssertionError, match="a was scheduled and counts as waiting"):
        engine.check_integrity()


def test_an_idle_engine_that_still_holds_something_is_found_out() -> None:
    engine, _ = counting_engine()
    engine.check_integrity()
    engine.scheduler.shards[0].pool.allocate(1)

    with pytest.raises(AssertionError, match="page 1 has 1 and 0"):
        engine.check_integrity()
