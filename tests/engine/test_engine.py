"""The engine turned by hand over a runner whose answers are sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.engine.request import FinishReason, StartedEvent
from jaxserve.engine.step import NO_TOKEN_LEFT
from jaxserve.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    RequestCancelledError,
    RequestFailedError,
    RequestNotFoundError,
)
from jaxserve.testing import CountingRunner, ManualClock, counting_engine, expected_tokens
from tests.engine.driving import Reader, Recorder, lose_the_pool, make_request, run, submit, turn

VOCAB = 259
PROMPT = [5, 6, 7, 8, 9]


def answer(prompt: list[int], count: int, **values: Any) -> list[int]:
    return expected_tokens(prompt, count, vocab_size=VOCAB, **values)


def test_an_answer_is_the_one_worked_out_by_hand() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", [1, 2, 3], max_tokens=2)
    run(engine)

    # 1 + 1*1 + 2*2 + 3*3 = 15; then 4*15 more is 75.
    assert reader.tokens() == [15, 75] == answer([1, 2, 3], 2)
    assert [event.index for event in reader.token_events()] == [0, 1]


def test_a_stream_starts_once_and_ends_with_the_facts() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock)
    reader = submit(engine, "a", PROMPT, max_tokens=3, seed=7)
    while not engine.idle:
        clock.advance(1.0)
        engine.run_once()

    first, *_, last = reader.events
    assert first == StartedEvent("a", 7, 0)
    assert last is reader.finish()
    finish = reader.finish()
    assert (finish.reason, finish.error, finish.stop_token_id) == (FinishReason.LENGTH, None, None)
    assert (finish.prompt_tokens, finish.output_tokens, finish.cached_tokens) == (5, 3, 0)
    # Planned one second after it came; the step is published a turn later, and two more follow.
    timing = finish.timing
    assert (timing.queue_s, timing.first_token_s, timing.total_s) == (1.0, 2.0, 4.0)
    assert reader.stream.finished


def test_an_unset_seed_is_chosen_and_reported() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=4, temperature=1.0)
    run(engine)

    assert reader.tokens() == answer(PROMPT, 4, seed=reader.started.seed)


def test_without_max_tokens_the_context_window_ends_the_answer() -> None:
    engine, _ = counting_engine(context_tokens=16)
    reader = submit(engine, "a", PROMPT)
    run(engine)

    assert reader.tokens() == answer(PROMPT, 11)
    assert reader.finish().reason is FinishReason.LENGTH


def test_many_requests_at_once_get_the_answers_they_would_get_alone() -> None:
    engine, _ = counting_engine(num_pages=17, max_rows=4)
    prompts = [[number % 7 + 1] * (number % 9 + 1) for number in range(20)]
    readers = [
        submit(
            engine, str(number), prompt, max_tokens=20, seed=number, temperature=number % 2 + 0.0
        )
        for number, prompt in enumerate(prompts)
    ]
    run(engine)

    assert engine.stats().preemptions_total > 0, "the pool was to be too small"
    for number, (reader, prompt) in enumerate(zip(readers, prompts, strict=True)):
        assert reader.tokens() == answer(prompt, 20, seed=number if number % 2 else None)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_answers_are_the_same_with_the_prefix_cache_on_and_off(prefix_cache: bool) -> None:
    engine, _ = counting_engine(prefix_cache=prefix_cache)
    long = list(range(1, 14))
    cached: list[int] = []
    for name in "abc":
        reader = submit(engine, name, long, max_tokens=5)
        run(engine)
        assert reader.tokens() == answer(long, 5)
        assert reader.started.cached_tokens == reader.finish().cached_tokens
        cached.append(reader.finish().cached_tokens)

    assert cached == ([0, 12, 12] if prefix_cache else [0, 0, 0])
    assert engine.stats().prefix_hit_rate == pytest.approx(24 / 39 if prefix_cache else 0.0)


def test_salts_keep_tenants_apart() -> None:
    engine, _ = counting_engine()
    cached: list[int] = []
    for name, salt in (("a", "red"), ("b", "blue"), ("c", "red")):
        reader = submit(engine, name, PROMPT, max_tokens=1, cache_salt=salt)
        run(engine)
        cached.append(reader.started.cached_tokens)

    assert cached == [0, 0, 4]


# -- other buckets -------------------------------------------------------------------------------


def buckets_of(runner: CountingRunner) -> set[tuple[int, int]]:
    """Buckets of the steps to come, as they come."""
    seen = set[tuple[int, int]]()
    runner.on_dispatch = lambda inputs: seen.update(call.bucket for call in inputs.calls)
    return seen


@pytest.mark.parametrize("overlap", [True, False])
def test_steps_are_packed_into_other_buckets_while_requests_run(overlap: bool) -> None:
    engine, runner = counting_engine(overlap=overlap)
    whole = runner.shape
    few = replace(whole, decode_buckets=(4,), prefill_buckets=whole.prefill_buckets[1:])
    seen = buckets_of(runner)
    engine.use_shape(few)
    first = submit(engine, "a", PROMPT, max_tokens=20)
    turn(engine, 6)
    assert seen == {(4, 1), (4, 16)}

    seen.clear()
    engine.use_shape(whole)
    second = submit(engine, "b", [1, 2], max_tokens=20)
    run(engine)
    assert seen == {(1, 1), (2, 1), (4, 8)}
    assert first.tokens() == answer(PROMPT, 20)
    assert second.tokens() == answer([1, 2], 20)


def test_an_idle_engine_takes_other_buckets_up_before_the_next_request() -> None:
    engine, runner = counting_engine()
    seen = buckets_of(runner)
    engine.use_shape(replace(runner.shape, decode_buckets=(4,)))
    engine.run_once()
    submit(engine, "a", PROMPT, max_tokens=3)
    run(engine)
    assert (4, 1) in seen
    assert (1, 1) not in seen


def test_buckets_that_something_does_not_fit_are_refused() -> None:
    engine, runner = counting_engine()
    with pytest.raises(ValueError, match="no decode bucket has max_rows = 4 rows"):
        engine.use_shape(replace(runner.shape, decode_buckets=(1, 2)))
    with pytest.raises(ValueError, match="longest score bucket has 0"):
        engine.use_shape(replace(runner.shape, score_buckets=()))
    submit(engine, "a", PROMPT, max_tokens=3)
    run(engine)


# -- endings -------------------------------------------------------------------------------------


def test_an_end_token_stops_the_answer_and_is_delivered() -> None:
    end = answer(PROMPT, 3)[2]
    engine, _ = counting_engine(end_ids=(end,))
    reader = submit(engine, "a", PROMPT, max_tokens=9)
    run(engine)

    assert reader.tokens() == answer(PROMPT, 3)
    assert reader.finish().reason is FinishReason.STOP
    assert reader.finish().stop_token_id == end


def test_ignore_eos_goes_on_past_the_end_token_but_not_past_a_stop_token() -> None:
    tokens = answer(PROMPT, 5)
    engine, _ = counting_engine(end_ids=(tokens[1],))
    reader = submit(engine, "a", PROMPT, max_tokens=9, ignore_eos=True, stop_token_ids=(tokens[3],))
    run(engine)

    assert reader.tokens() == tokens[:4]
    assert reader.finish().stop_token_id == tokens[3]


def test_min_tokens_keeps_stop_tokens_from_being_chosen() -> None:
    stop = answer(PROMPT, 1)[0]
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=4, min_tokens=2, stop_token_ids=(stop,))
    run(engine)

    first_two = answer(PROMPT, 2, banned=(stop,))
    assert reader.tokens()[:2] == first_two
    assert stop not in first_two


def test_a_stop_token_ends_the_answer_right_after_min_tokens() -> None:
    tokens = answer(PROMPT, 3)
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=9, min_tokens=2, stop_token_ids=(tokens[2],))
    run(engine)

    assert reader.tokens() == tokens
    assert reader.finish().reason is FinishReason.STOP


def test_a_stop_string_found_by_the_reader_ends_one_choice() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=40, n=2, temperature=1.0, seed=1)
    while len(reader.tokens(1)) < 5:
        turn(engine)
    reader.stream.stop(1)
    turn(engine)

    assert reader.finish(1).reason is FinishReason.STOP
    assert reader.finish(1).stop_token_id is None
    run(engine)
    assert reader.tokens(0) == answer(PROMPT, 40, seed=1)
    assert reader.finish(0).reason is FinishReason.LENGTH


def test_a_row_without_finite_logits_fails_alone_and_its_pages_are_not_shared() -> None:
    engine, runner = counting_engine()
    runner.poison_token = 250
    sick = submit(engine, "sick", [1, 2, 3, 4, 250], max_tokens=4)
    well = submit(engine, "well", [1, 2, 3, 4, 5], max_tokens=4)
    run(engine)

    assert sick.tokens() == []
    assert sick.finish().reason is FinishReason.ERROR
    with pytest.raises(RequestFailedError, match="'sick' failed: the model's logits are not fin"):
        raise sick.finish().error or AssertionError
    assert well.tokens() == answer([1, 2, 3, 4, 5], 4)
    again = submit(engine, "again", [1, 2, 3, 4, 250, 6], max_tokens=1)
    run(engine)
    assert again.started.cached_tokens <= 4


def test_rules_that_leave_no_token_are_refused() -> None:
    engine, _ = counting_engine()
    rules: dict[str, Any] = {"max_tokens": 4, "allowed_token_ids": (3,), "stop_token_ids": (3,)}
    with pytest.raises(InvalidRequestError, match="every allowed token ends the answer") as caught:
        submit(engine, "a", PROMPT, min_tokens=1, **rules)
    assert caught.value.field == "min_tokens"
    submit(engine, "a", PROMPT, min_tokens=0, **rules)


def test_a_row_without_a_token_left_fails_its_request() -> None:
    engine, runner = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=4)
    runner.poison_token = PROMPT[-1]
    runner.poison = NO_TOKEN_LEFT
    run(engine)

    assert reader.finish().reason is FinishReason.ERROR
    with pytest.raises(InvalidRequestError, match="leave no token to choose") as caught:
        raise reader.finish().error or AssertionError
    assert caught.value.field == "grammar"


def test_banned_tokens_and_penalties_reach_the_device() -> None:
    engine, _ = counting_engine()
    first = answer(PROMPT, 1)[0]
    banned = submit(engine, "a", PROMPT, max_tokens=5, banned_token_ids=(first,))
    penalised = submit(engine, "b", PROMPT, max_tokens=5, presence_penalty=1.0)
    run(engine)

    assert banned.tokens() == answer(PROMPT, 5, banned=(first,))
    assert penalised.tokens() == answer(PROMPT, 5, penalised=True)


# -- several choices -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_share_the_pages_of_their_prompt(prefix_cache: bool) -> None:
    engine, _ = counting_engine(prefix_cache=prefix_cache)
    reader = submit(engine, "a", [*PROMPT, *PROMPT], max_tokens=12, n=3, temperature=1.0, seed=5)
    most = 0
    while not engine.idle:
        turn(engine)
        running = engine.scheduler.running
        shared = [page for s in running for page in s.pages]
        most = max(most, len(shared) - len(set(shared)))

    for choice in range(3):
        assert reader.tokens(choice) == answer([*PROMPT, *PROMPT], 12, seed=5, choice=choice)
    assert most == 4, "two full pages, held by two more choices"
    assert engine.stats().pages_used == 0
    assert sorted(event.choice for event in reader.finishes()) == [0, 1, 2]


def test_choices_start_even_when_the_first_ends_with_its_first_token() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=1, n=3, temperature=1.0, seed=5)
    run(engine)

    tokens = [reader.tokens(choice) for choice in range(3)]
    assert tokens == [answer(PROMPT, 1, seed=5, choice=choice) for choice in range(3)]


def test_choices_start_even_when_the_first_is_stopped_while_it_waits() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=2, n=2, temperature=1.0, seed=5)
    reader.stream.stop(0)
    run(engine)

    assert reader.tokens(0) == []
    assert reader.tokens(1) == answer(PROMPT, 2, seed=5, choice=1)


def test_cancelling_ends_choices_that_were_not_made_yet() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, n=4)
    reader.stream.close()
    run(engine)

    assert [event.reason for event in reader.finishes()] == [FinishReason.CANCELLED] * 4


# -- resuming and scores -------------------------------------------------------------------------


def test_a_resumed_answer_goes_on_where_it_broke_off() -> None:
    engine, _ = counting_engine()
    whole = answer(PROMPT, 10, seed=3)
    reader = submit(engine, "a", PROMPT, resume=whole[:4], max_tokens=10, seed=3, temperature=1.0)
    run(engine)

    assert reader.tokens() == whole[4:]
    assert reader.token_events()[0].index == 4
    assert reader.finish().output_tokens == 10


def test_a_resumed_answer_counts_penalties_from_the_beginning() -> None:
    engine, _ = counting_engine()
    whole = answer(PROMPT, 8, penalised=True)
    reader = submit(engine, "a", PROMPT, resume=whole[:3], max_tokens=8, frequency_penalty=0.5)
    run(engine)

    assert reader.tokens() == whole[3:]


@pytest.mark.parametrize("length", [1, 2, 5, 20])
def test_the_start_carries_a_score_for_every_prompt_token_but_the_first(length: int) -> None:
    engine, _ = counting_engine(step_tokens=6)
    prompt = list(range(3, 3 + length))
    reader = submit(engine, "a", prompt, max_tokens=3, prompt_logprobs=2)
    run(engine)

    scores = reader.started.prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert [score.logprob for score in scores[1:] if score] == [
        -1.0 - token % 8 for token in prompt[1:]
    ]
    assert [score.top_ids for score in scores[1:] if score] == [(t, t + 1) for t in prompt[1:]]
    assert reader.tokens() == answer(prompt, 3)


def test_scores_are_whole_after_a_preemption_in_the_prompt() -> None:
    engine, _ = counting_engine(step_tokens=6)
    prompt = list(range(3, 23))
    reader = submit(engine, "a", prompt, max_tokens=3, prompt_logprobs=0)
    turn(engine, 3)
    assert engine.scheduler.running[0].computed < len(prompt)
    lose_the_pool(engine)
    run(engine)

    scores = reader.started.prompt_logprobs
    assert scores is not None
    assert [score.logprob for score in scores[1:] if score] == [-1.0 - t % 8 for t in prompt[1:]]
    assert reader.tokens() == answer(prompt, 3)


def test_log_probabilities_of_the_answer_are_read_from_the_result() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT, max_tokens=3, logprobs=2)
    silent = submit(engine, "b", PROMPT, max_tokens=3)
    run(engine)

    for event in reader.token_events():
        assert event.logprobs is not None
        token = event.token_id
        assert event.logprobs.logprob == -1.0 - token % 8
        assert event.logprobs.rank == 1 + token % 3
        assert event.logprobs.top_ids == (token, token + 1)
        assert event.logprobs.top_logprobs == (-1.0, -2.0)
    assert [event.logprobs for event in silent.token_events()] == [None] * 3


# -- cancellation and deadlines, in every phase --------------------------------------------------


def in_phase(engine: Engine, phase: str, **values: Any) -> Reader:
    """Returns a request that waits, is in its prompt, decodes, or was preempted."""
    if phase == "queued":
        for number in range(4):
            submit(engine, f"other{number}", [1])
        turn(engine, 2)
    reader = submit(engine, "a", list(range(1, 41)), max_tokens=20, **values)
    turn(engine, {"queued": 1, "prompt": 2, "decode": 6, "preempted": 6}[phase])
    if phase == "preempted":
        lose_the_pool(engine)
    sequence = engine._admission.find("a").sequences[0]
    assert (sequence.row >= 0) == (phase in ("prompt", "decode"))
    assert (sequence.output_tokens > 0) == (phase in ("decode", "preempted"))
    return reader


PHASES = ["queued", "prompt", "decode", "preempted"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", ["abort", "close"])
def test_a_cancelled_request_gives_its_pages_back_by_the_next_step(phase: str, way: str) -> None:
    engine, _ = counting_engine()
    reader = in_phase(engine, phase)
    if way == "abort":
        engine.abort("a")
    else:
        reader.stream.close()

    turn(engine)

    assert reader.stream.finished
    assert reader.finish().reason is FinishReason.CANCELLED
    with pytest.raises(RequestCancelledError, match="request 'a' was cancelled"):
        raise reader.finish().error or AssertionError
    names = [sequence.live.request.request_id for sequence in engine.scheduler.running]
    assert "a" not in names
    with pytest.raises(RequestNotFoundError, match="no live request has the id 'a'"):
        engine.abort("a")
    for number in range(4 if phase == "queued" else 0):
        engine.abort(f"other{number}")
    run(engine)
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("phase", PHASES)
def test_a_deadline_ends_a_request_wherever_it_is(phase: str) -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock)
    reader = in_phase(engine, phase, deadline_s=clock.now + 5)
    clock.advance(4.9)
    turn(engine)
    assert not reader.stream.finished
    known = len(reader.tokens())
    clock.advance(0.1)

    turn(engine)

    assert reader.finish().reason is FinishReason.DEADLINE
    with pytest.raises(DeadlineExceededError, match=f"passed after {known} output tokens"):
        raise reader.finish().error or AssertionError


def test_entries_of_requests_that_ended_in_time_do_not_pile_up() -> None:
    clock = ManualClock()
    engine, _ = counting_engine(clock=clock)
    for number in range(300):
        submit(engine, str(number), [1], max_tokens=1, deadline_s=clock.now + 3600)
        run(engine)

    assert len(engine._deadlines) < 100


def test_closing_an_old_stream_does_not_touch_a_new_request_with_the_same_id() -> None:
    engine, _ = counting_engine()
    old = submit(engine, "a", PROMPT, max_tokens=1)
    stream = old.stream
    run(engine)
    new = submit(engine, "a", PROMPT, max_tokens=5)

    engine._close_stream(0, "a")  # What the old stream's close would send, had it raced the end.
    engine._stop_stream(0, "a", 0)
    stream.close()
    run(engine)

    assert new.tokens() == answer(PROMPT, 5)
    assert new.finish().reason is FinishReason.LENGTH


def test_a_cancellation_that_overtakes_its_request_still_ends_it() -> None:
    engine, _ = counting_engine()
    reader = submit(engine, "a", PROMPT)
    engine.abort("a")
    engine._inbox.rotate(1)  # As when another thread aborts between admission and the inbox.

    turn(engine)

    assert reader.finish().reason is FinishReason.CANCELLED
    run(engine)
    assert engine.scheduler.waiting == 0


# -- waking --------------------------------------------------------------------------------------


def test_each_waker_is_called_once_per_step_with_the_streams_that_were_empty() -> None:
    engine, _ = counting_engine()
    one, other = Recorder(), Recorder()
    streams = [
        engine.submit(make_request(name, PROMPT, max_tokens=8), waker)
        for name, waker in (("a", one), ("b", one), ("c", other))
    ]
    turn(engine, 2)

    assert one.calls == [["a", "b"]]
    assert other.calls == [["c"]]
    streams[0].take()
    turn(engine)

    assert one.calls == [["a", "b"], ["a"]], "b still has something to read"
    assert other.calls == [["c"]]


def test_a_waker_that_raises_does_not_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def wake(self, streams: object) -> None:
            raise RuntimeError("the front end has gone")

    engine, _ = counting_engine()
    stream = engine.submit(make_request("a", PROMPT, max_tokens=2), Broken())
    run(engine)

    assert stream.finished
    assert "waking the readers of 1 streams failed" in caplog.text


def test_a_reader_that_takes_nothing_costs_at_most_its_own_events() -> None:
    engine, _ = counting_engine()
    slow = submit(engine, "slow", PROMPT, max_tokens=30)
    fast = submit(engine, "fast", PROMPT, max_tokens=30)
    run(engine)

    assert slow.stream.pending == 1 + 30 + 1
    assert fast.tokens() == slow.tokens()
