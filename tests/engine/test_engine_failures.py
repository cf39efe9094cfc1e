"""Steps that raise, an engine thread that dies, and how health and drain tell about it."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from jaxserve.engine.engine import MAX_STEP_FAILURES, Engine
from jaxserve.engine.request import FinishReason
from jaxserve.engine.stream import ThreadWaker
from jaxserve.errors import DrainingError, EngineDeadError, RequestFailedError
from jaxserve.testing import (
    CountingRunner,
    ManualClock,
    counting_engine,
    expected_tokens,
    paced_engine,
)
from tests.engine.driving import Reader, make_request, run, submit, turn

VOCAB = 259
PROMPT = [5, 6, 7, 8, 9]


def raise_once(runner: CountingRunner, where: str, error: Exception | None = None) -> None:
    """Makes the next dispatch or wait raise."""

    def explode(*_: object) -> None:
        setattr(runner, f"on_{where}", None)
        raise error or RuntimeError("out of memory")

    setattr(runner, f"on_{where}", explode)


def answer(prompt: list[int], count: int) -> list[int]:
    return expected_tokens(prompt, count, vocab_size=VOCAB)


# -- a step that raises --------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("where", ["dispatch", "wait"])
def test_a_step_that_raises_fails_its_requests_and_the_others_are_computed_again(
    where: str, overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine, runner = counting_engine(max_rows=2, overlap=overlap)
    doomed = [submit(engine, name, PROMPT, max_tokens=30) for name in ("a", "b")]
    turn(engine, 4)
    waiting = submit(engine, "c", PROMPT, max_tokens=9)
    raise_once(runner, where)
    turn(engine)

    for reader, name in zip(doomed, ("a", "b"), strict=True):
        assert reader.finish().reason is FinishReason.ERROR
        with pytest.raises(RequestFailedError, match=f"'{name}' failed: the step it was part of"):
            raise reader.finish().error or AssertionError
        assert reader.tokens() == answer(PROMPT, len(reader.tokens()))
    assert "a step failed; its requests are ended" in caplog.text
    assert "out of memory" in caplog.text
    assert runner.resets == 1
    run(engine)
    assert waiting.tokens() == answer(PROMPT, 9)
    assert waiting.started.cached_tokens == 0, "the pool was lost with its prefixes"


def test_without_overlap_a_turn_may_fail_twice_and_the_next_request_works() -> None:
    engine, runner = counting_engine(max_rows=1, overlap=False)
    doomed = [submit(engine, name, PROMPT, max_tokens=30) for name in ("a", "b")]
    turn(engine, 2)
    raise_once(runner, "wait")
    raise_once(runner, "dispatch")
    turn(engine)
    assert [reader.finish().reason for reader in doomed] == [FinishReason.ERROR] * 2
    assert runner.resets == 2
    following = submit(engine, "c", PROMPT, max_tokens=9)
    run(engine)
    assert following.tokens() == answer(PROMPT, 9)


def test_a_step_whose_wait_raises_takes_the_one_dispatched_after_it_along() -> None:
    engine, runner = counting_engine(max_rows=2, max_chunks=1)
    first = submit(engine, "first", PROMPT, max_tokens=1)
    turn(engine)
    second = submit(engine, "second", [1, 2, 3], max_tokens=6)
    raise_once(runner, "wait")
    turn(engine)

    assert first.finish().reason is FinishReason.ERROR
    assert second.events == [], "dispatched on top of the lost pool, and thrown away with it"
    run(engine)
    assert second.tokens() == answer([1, 2, 3], 6)


def test_a_dispatch_that_raises_lets_the_step_before_it_be_read() -> None:
    engine, runner = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=1)
    turn(engine)
    submit(engine, "b", [1], max_tokens=1)
    raise_once(runner, "dispatch")
    turn(engine)

    assert reader.tokens() == answer(PROMPT, 1)
    assert reader.finish().reason is FinishReason.LENGTH
    run(engine)


def test_every_choice_of_a_failed_request_ends() -> None:
    engine, runner = counting_engine()
    reader = submit(engine, "a", PROMPT, n=3)
    raise_once(runner, "dispatch")
    turn(engine)

    assert [event.reason for event in reader.finishes()] == [FinishReason.ERROR] * 3
    run(engine)


def test_packing_that_raises_fails_the_request_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr("jaxserve.engine.engine.pack_step", lambda *_: 1 / 0)
        turn(engine)

    assert reader.finish().reason is FinishReason.ERROR
    after = submit(engine, "b", PROMPT, max_tokens=2)
    run(engine)
    assert after.tokens() == answer(PROMPT, 2)


def test_failures_that_are_not_in_a_row_are_survived() -> None:
    engine, runner = counting_engine()
    for number in range(3 * MAX_STEP_FAILURES):
        raise_once(runner, "dispatch")
        submit(engine, f"bad{number}", PROMPT)
        turn(engine)
        good = submit(engine, f"good{number}", PROMPT, max_tokens=2)
        run(engine)
        assert good.tokens() == answer(PROMPT, 2)


def test_failures_in_a_row_end_the_engine() -> None:
    engine, runner = counting_engine()
    for number in range(MAX_STEP_FAILURES - 1):
        raise_once(runner, "dispatch")
        submit(engine, str(number), PROMPT)
        turn(engine)
    raise_once(runner, "dispatch", RuntimeError("device lost"))
    submit(engine, "last", PROMPT)

    with pytest.raises(RuntimeError, match="device lost"):
        turn(engine)


# -- the thread ----------------------------------------------------------------------------------


def start(engine: Engine, **requests: dict[str, Any]) -> tuple[ThreadWaker, dict[str, Reader]]:
    waker = ThreadWaker()
    readers = {
        name: Reader(engine.submit(make_request(name, PROMPT, **values), waker))
        for name, values in requests.items()
    }
    engine.start()
    return waker, readers


def wait_for(waker: ThreadWaker, readers: dict[str, Reader]) -> None:
    # A stream asks for a wake-up when it stops being empty, so every reader empties it first.
    while not all(reader.has_ended() for reader in readers.values()):
        assert waker.wait(timeout_s=30.0), "the engine has gone quiet"


def test_the_thread_serves_until_it_is_stopped() -> None:
    engine, _ = counting_engine()
    waker, readers = start(engine, a={"max_tokens": 20}, b={"max_tokens": 10, "n": 2})
    wait_for(waker, readers)

    assert readers["a"].tokens() == answer(PROMPT, 20)
    assert readers["b"].tokens(1) == answer(PROMPT, 10)
    engine.stop()
    engine.stop()
    engine.check_integrity()
    assert engine.dead is None
    assert not [thread for thread in threading.enumerate() if thread.name == "jaxserve-engine"]


def test_requests_from_many_threads_are_all_served() -> None:
    engine, _ = counting_engine(max_rows=8)
    engine.start()
    wrong: list[str] = []

    def client(number: int) -> None:
        waker = ThreadWaker()
        for turn_number in range(10):
            prompt = [number + 1, turn_number + 1]
            request = make_request(f"{number}-{turn_number}", prompt, max_tokens=5)
            reader = Reader(engine.submit(request, waker))
            wait_for(waker, {"r": reader})
            if reader.tokens() != answer(prompt, 5):
                wrong.append(request.request_id)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop()

    assert wrong == []
    assert engine.stats().requests_finished_total["length"] == 80
    engine.check_integrity()


def test_stopping_cancels_what_still_runs() -> None:
    engine, _ = paced_engine(step_s=0.001)
    waker, readers = start(engine, a={}, b={"n": 2})
    assert waker.wait(timeout_s=30.0)
    engine.stop()

    for reader in readers.values():
        assert {event.reason for event in reader.finishes()} == {FinishReason.CANCELLED}
        assert reader.stream.finished
    assert engine.idle
    with pytest.raises(DrainingError, match="draining"):
        submit(engine, "late", PROMPT)


def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT)
    turn(engine, 2)
    engine.stop()

    assert reader.finish().reason is FinishReason.CANCELLED
    engine.check_integrity()


def test_an_idle_thread_does_not_spin() -> None:
    """Turns are counted by the clock, which a turn of a busy engine always reads."""
    reads = 0

    def clock() -> float:
        nonlocal reads
        reads += 1
        return 0.0

    engine, _ = counting_engine(clock=clock)
    waker, readers = start(engine, a={"max_tokens": 3})
    wait_for(waker, readers)
    while not engine.idle:
        pass
    before = reads
    threading.Event().wait(0.2)

    assert reads - before <= 5
    engine.stop()


@pytest.mark.parametrize("where", ["plan", "publish"])
def test_when_the_thread_dies_every_stream_ends_and_nobody_is_let_in(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = counting_engine(max_rows=2)
    owner = engine.scheduler if where == "plan" else engine._publisher

    def break_down(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(owner, where, break_down)
    with caplog.at_level(logging.CRITICAL, logger="jaxserve"):
        waker, readers = start(engine, a={}, b={"n": 3}, c={})
        wait_for(waker, readers)
        assert engine._thread is not None
        engine._thread.join()

    assert isinstance(engine.dead, KeyError)
    for reader in readers.values():
        for event in reader.finishes():
            assert event.reason is FinishReason.ERROR
            with pytest.raises(EngineDeadError, match=r"the engine has stopped .*a bug"):
                raise event.error or AssertionError
    assert len(readers["b"].finishes()) == 3
    with pytest.raises(EngineDeadError, match="a bug"):
        submit(engine, "late", PROMPT)
    health = engine.health()
    assert (health.serving, health.detail) == (False, "the engine has ended: 'a bug'")
    assert not engine.stats().healthy
    assert engine.idle
    engine.stop()


def test_a_device_that_keeps_failing_ends_the_thread() -> None:
    engine, runner = counting_engine()

    def lost(*_: object) -> None:
        raise MemoryError

    runner.on_dispatch = lost
    engine.start()
    waker = ThreadWaker()
    errors: list[Exception | None] = []
    for number in range(MAX_STEP_FAILURES):
        reader = Reader(engine.submit(make_request(str(number), PROMPT), waker))
        wait_for(waker, {"r": reader})
        errors.append(reader.finish().error)
    assert isinstance(errors[-1], EngineDeadError)
    assert all(isinstance(error, RequestFailedError) for error in errors[:-1])
    assert engine._thread is not None
    engine._thread.join()

    assert isinstance(engine.dead, MemoryError)
    assert engine.health().detail == "the engine has ended: MemoryError"


# -- health and drain ----------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_finishes_the_old_ones() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=5)
    engine.drain()

    with pytest.raises(DrainingError, match="retry on another server") as caught:
        submit(engine, "b", PROMPT)
    assert caught.value.retry_after_s == 1.0
    assert (engine.health().serving, engine.health().detail) == (False, "draining")
    assert engine.stats().draining
    run(engine)
    assert reader.tokens() == answer(PROMPT, 5)


def test_health_says_when_no_step_finishes_while_work_is_there() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, watchdog_s=10.0)
    clock.advance(1000.0)
    assert engine.health().serving, "idle is healthy, however long"
    submit(engine, "a", PROMPT)
    assert engine.health().serving, "the watchdog counts from the first work"
    turn(engine)
    clock.advance(10.0)
    assert engine.health().serving

    clock.advance(1.0)

    assert not engine.health().serving
    assert engine.health().detail == "no step has finished for 11 s while work is waiting"
    assert engine.stats().last_step_age_seconds == 11.0
    turn(engine)
    assert engine.health().serving, "a step has finished"


def test_idle_time_does_not_count_against_the_next_request() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock, watchdog_s=10.0)
    submit(engine, "a", PROMPT, max_tokens=1)
    run(engine)
    clock.advance(3600.0)
    submit(engine, "b", PROMPT, max_tokens=1)

    assert engine.health().serving
    assert engine.stats().last_step_age_seconds == 0.0
