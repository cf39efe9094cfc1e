"""The scheduler alone: plans are published by hand, with tokens chosen by the test."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.plan import SchedulerConfig, StepPlan
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.scheduler import PRIORITY_SECONDS, Scheduler
from jaxserve.engine.sequence import LiveRequest, LiveSequence
from jaxserve.engine.stream import ThreadWaker, TokenStream

NUMBERS = itertools.count()


def make(**values: Any) -> Scheduler:
    """Returns a scheduler with three rows and five pages of four tokens, unless told otherwise."""
    sizes = {"max_rows": 3, "step_tokens": 16, "max_chunks": 4, "page_tokens": 4, "num_pages": 6}
    return Scheduler(SchedulerConfig(**{**sizes, **values}))


def sequence(
    prompt: Sequence[int],
    *,
    now: float = 0.0,
    priority: int = 0,
    salt: str = "",
    resume: Sequence[int] = (),
    max_tokens: int = 100,
    n: int = 1,
    prompt_logprobs: int | None = None,
) -> LiveSequence:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, prompt_logprobs=prompt_logprobs)
    request = Request(request_id="r", prompt=prompt, sampling=sampling, resume=resume)
    stream = TokenStream("r", n, ThreadWaker(), on_close=print, on_stop=print)
    live = LiveRequest(
        number=next(NUMBERS),
        request=request,
        stream=stream,
        seed=0,
        accepted_s=float(now),
        salt=salt,
        stop_ids=frozenset(),
        open_choices=n,
    )
    live.make_choices(float(now) + priority * PRIORITY_SECONDS, 1000)
    return live.sequences[0]


def enqueue(scheduler: Scheduler, *sequences: LiveSequence) -> None:
    for each in sequences:
        scheduler.enqueue(each)


def publish(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> None:
    """Does what the publisher does: commits, then appends the sampled tokens."""
    for chunk in plan.chunks:
        if chunk.sequence.row == chunk.row:
            scheduler.commit(chunk.sequence, chunk.start + chunk.count)
        if chunk.last:
            chunk.sequence.tokens.append(token)
    for each, row, position in zip(
        plan.decode, plan.decode_rows, plan.decode_positions, strict=True
    ):
        if each.row == row:
            scheduler.commit(each, position + 1)
        each.tokens.append(token)


def advance(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    """Plans a step and publishes it at once."""
    plan = scheduler.plan(now)
    publish(scheduler, plan)
    scheduler.check_integrity()
    return plan


def chunks(plan: StepPlan) -> list[tuple[LiveSequence, int, int, bool]]:
    return [(chunk.sequence, chunk.start, chunk.count, chunk.last) for chunk in plan.chunks]


# -- values: three requests, five pages ----------------------------------------------------------


def test_three_requests_share_five_pages() -> None:
    scheduler = make()
    first, second, third = (sequence([number] * 5, now=number) for number in range(3))
    enqueue(scheduler, first, second, third)

    plan = advance(scheduler)

    # Two pages each, and one held back for each that runs already: the third has to wait.
    assert chunks(plan) == [(first, 0, 5, True), (second, 0, 5, True)]
    assert (first.pages, second.pages) == ([1, 2], [3, 4])
    assert (first.row, second.row, third.row) == (0, 1, -1)
    assert (scheduler.shards[0].pool.free, scheduler.shards[0].pool.used, scheduler.waiting) == (
        1,
        4,
        1,
    )

    plan = advance(scheduler)

    assert plan.decode == [first, second]
    assert (plan.decode_rows, plan.decode_positions) == ([0, 1], [5, 5])
    assert chunks(plan) == []

    scheduler.finish(first)
    plan = advance(scheduler)

    assert chunks(plan) == [(third, 0, 5, True)]
    assert third.row == 0
    assert third.pages == [2, 5]  # Page 1 is full and stays readable.
    assert scheduler.shards[0].pool.cached == 1


def test_an_empty_queue_plans_nothing() -> None:
    plan = make().plan(0.0)

    assert plan.empty
    assert plan.sequences() == []


# -- the budget ----------------------------------------------------------------------------------


def test_decode_rows_come_first_and_prompts_get_what_is_left_of_the_budget() -> None:
    scheduler = make(step_tokens=6, num_pages=30)
    one, two = sequence([1, 2]), sequence([3, 4])
    enqueue(scheduler, one, two)
    advance(scheduler)
    long = sequence(list(range(20)), now=1)
    enqueue(scheduler, long)

    steps = [advance(scheduler) for _ in range(5)]

    assert all(plan.decode[:2] == [one, two] for plan in steps)
    assert [chunks(plan) for plan in steps] == [
        [(long, 0, 4, False)],
        [(long, 4, 4, False)],
        [(long, 8, 4, False)],
        [(long, 12, 4, False)],
        [(long, 16, 4, True)],
    ]
    assert advance(scheduler).decode == [one, two, long]


def test_a_chunk_is_no_longer_than_the_longest_bucket() -> None:
    scheduler = make(step_tokens=12, chunk_tokens=5, num_pages=30)
    long, short = sequence(list(range(11)), now=0), sequence([1, 2, 3], now=1)
    enqueue(scheduler, long, short)

    assert chunks(advance(scheduler)) == [(long, 0, 5, False), (short, 0, 3, True)]


def test_a_step_has_a_limited_number_of_chunks() -> None:
    scheduler = make(max_chunks=2, num_pages=30)
    several = [sequence([number], now=number) for number in range(3)]
    enqueue(scheduler, *several)

    assert [chunk.sequence for chunk in advance(scheduler).chunks] == several[:2]
    assert [chunk.sequence for chunk in advance(scheduler).chunks] == several[2:]


def test_running_prompts_go_on_before_new_ones_come_in() -> None:
    scheduler = make(step_tokens=4, num_pages=30)
    long, late = sequence([1] * 6, now=0), sequence([2] * 4, now=1)
    enqueue(scheduler, long, late)

    advance(scheduler)

    assert chunks(advance(scheduler)) == [(long, 4, 2, True), (late, 0, 2, False)]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"max_chunks": 0}, "max_chunks must be at least 1, got 0"),
        ({"page_tokens": 0}, "page_tokens must be at least 1, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"step_tokens": 3}, "step_tokens is 3 and max_rows 3: .* raise step_tokens above"),
    ],
)
def test_a_configuration_that_could_never_plan_a_prompt_is_refused(
    values: dict[str, int], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        make(**values)


# -- order ---------------------------------------------------------------------------------------


def order_of_admission(scheduler: Scheduler, sequences: Sequence[LiveSequence]) -> list[int]:
    """Lets one sequence run at a time, to its end."""
    found: list[int] = []
    while scheduler.waiting:
        plan = advance(scheduler)
        (admitted,) = plan.admitted
        found.append(sequences.index(admitted))
        scheduler.finish(admitted)
    return found


def test_requests_are_served_in_the_order_of_arrival() -> None:
    scheduler = make(max_rows=1)
    several = [sequence([1], now=5.0) for _ in range(5)]
    enqueue(scheduler, *reversed(several))

    assert order_of_admission(scheduler, several) == [0, 1, 2, 3, 4]


def test_a_better_priority_overtakes_those_that_have_not_waited_long() -> None:
    scheduler = make(max_rows=1)
    several = [
        sequence([1], now=0.0),
        sequence([1], now=11.0),
        sequence([1], now=20.5, priority=-1),
        sequence([1], now=20.5, priority=2),
    ]
    enqueue(scheduler, *several)

    # One step of priority is worth ten seconds: the third passes the second, not the first.
    assert order_of_admission(scheduler, several) == [0, 2, 1, 3]


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(-2, 2)), min_size=1, max_size=12, unique=True
    )
)
def test_nobody_is_overtaken_by_a_request_that_came_more_than_its_head_start_later(
    arrivals: list[tuple[int, int]],
) -> None:
    scheduler = make(max_rows=1)
    several = [sequence([1], now=float(now), priority=step) for now, step in arrivals]
    enqueue(scheduler, *several)

    order = order_of_admission(scheduler, several)

    for place, later in enumerate(order):
        for earlier in order[:place]:
            (now, step), (first, better) = arrivals[later], arrivals[earlier]
            assert first - now <= PRIORITY_SECONDS * (step - better)


def test_the_head_of_the_queue_is_not_passed_over_by_a_smaller_request() -> None:
    scheduler = make()
    running, large, small = sequence([1] * 8), sequence([2] * 12, now=1), sequence([3], now=2)
    enqueue(scheduler, running)
    advance(scheduler)
    enqueue(scheduler, large, small)

    # Three pages are left and one is held back, so the large one does not fit.
    assert advance(scheduler).admitted == []
    scheduler.finish(running)
    assert advance(scheduler).admitted == [large, small]


# -- pages ---------------------------------------------------------------------------------------


def test_a_prompt_as_large_as_the_pool_runs_alone() -> None:
    scheduler = make(num_pages=6, step_tokens=32)
    large = sequence(list(range(20)), max_tokens=1)
    enqueue(scheduler, large)

    assert advance(scheduler).admitted == [large]
    assert scheduler.shards[0].pool.available == 0


def test_admission_holds_back_a_page_for_every_running_sequence() -> None:
    scheduler = make(max_rows=4, num_pages=8)
    several = [sequence([number] * 5, now=number) for number in range(4)]
    enqueue(scheduler, *several)

    # Pages 7: the first takes 2, the second 2 of 5 with 1 held back, the third would need 2 + 2.
    assert advance(scheduler).admitted == several[:2]


def test_a_growing_sequence_takes_a_page_when_its_last_one_is_full() -> None:
    scheduler = make()
    one = sequence([1] * 3)
    enqueue(scheduler, one)
    advance(scheduler)
    assert one.pages == [1]

    assert advance(scheduler).grown == []  # The fourth position is in the first page still.
    assert advance(scheduler).grown == [(0, 1, 2)]
    assert one.pages == [1, 2]


def test_the_worst_running_sequence_is_preempted_when_pages_run_out() -> None:
    scheduler = make(num_pages=6)
    best, middle, worst = (sequence([number] * 3, now=number) for number in (1, 2, 3))
    enqueue(scheduler, middle, worst, best)
    advance(scheduler)  # One page each, two are free.
    advance(scheduler)

    plan = scheduler.plan(0.0)

    # All three need a second page; the two that are left go to the best two.
    assert plan.decode == [best, middle]
    assert len(plan.grown) == 2
    assert worst.row == -1
    assert scheduler.preemptions == 1
    assert scheduler.waiting_sequences() == [worst]
    assert plan.admitted == [], "nobody comes in while somebody is put out"
    scheduler.check_integrity()


def test_a_sequence_that_is_itself_the_worst_is_preempted() -> None:
    scheduler = make(num_pages=3)
    one = sequence([1] * 4)
    enqueue(scheduler, one)
    advance(scheduler)
    elsewhere = scheduler.shards[0].pool.allocate(1)
    assert elsewhere is not None

    plan = scheduler.plan(0.0)

    assert plan.empty
    assert (one.row, scheduler.waiting, scheduler.preemptions) == (-1, 1, 1)
    scheduler.shards[0].pool.release(elsewhere)
    assert advance(scheduler).admitted == [one]


def test_a_preempted_sequence_is_computed_again_with_its_tokens() -> None:
    scheduler = make(num_pages=6, prefix_cache=False)
    best, worst = sequence([1] * 7, now=1), sequence([2] * 7, now=2)
    enqueue(scheduler, best, worst)
    advance(scheduler)
    for _ in range(20):
        if scheduler.preemptions:
            break
        advance(scheduler)
    known = list(worst.tokens)
    assert known[:7] == [2] * 7
    scheduler.finish(best)

    plan = advance(scheduler)

    assert chunks(plan) == [(worst, 0, len(known), True)]
    assert worst.tokens == [*known, 7]
    assert worst.sampled == worst.output_tokens


def test_a_sequence_that_was_preempted_with_a_token_in_flight_keeps_it() -> None:
    scheduler = make(num_pages=6)
    best, worst = sequence([1] * 4, now=1), sequence([2] * 4, now=2)
    enqueue(scheduler, best, worst)
    in_flight = scheduler.plan(0.0)
    while True:  # One step is always in flight, as in the engine.
        plan = scheduler.plan(0.0)
        if scheduler.preemptions:
            break
        publish(scheduler, in_flight)
        in_flight = plan
    known = len(worst.tokens)
    assert (worst.row, worst.sampled - worst.output_tokens) == (-1, 1)
    assert worst in in_flight.decode
    assert worst not in plan.decode

    publish(scheduler, in_flight)
    publish(scheduler, plan)
    scheduler.finish(best)
    plan = advance(scheduler)

    assert (len(worst.tokens), worst.output_tokens) == (known + 2, worst.sampled)
    assert [(chunk.start + chunk.count, chunk.last) for chunk in plan.chunks] == [(known + 1, True)]


def test_losing_the_pool_sends_everyone_back_to_the_queue() -> None:
    scheduler = make(num_pages=20)
    several = [sequence([number] * 6, now=number) for number in range(3)]
    enqueue(scheduler, *several)
    advance(scheduler)
    scheduler.finish(several[0])

    scheduler.preempt_all()

    assert scheduler.running == []
    assert scheduler.waiting == 2
    assert scheduler.shards[0].pool.free == scheduler.shards[0].pool.total
    assert scheduler.shards[0].prefix.pages == 0
    plan = advance(scheduler)
    assert [start for _, start, _, _ in chunks(plan)] == [0, 0]


# -- shared prefixes -----------------------------------------------------------------------------


def test_a_finished_prompt_is_found_again_page_by_page() -> None:
    scheduler = make(num_pages=10)
    first = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    enqueue(scheduler, first)
    advance(scheduler)
    held = list(first.pages)
    scheduler.finish(first)
    second = sequence([1, 2, 3, 4, 5, 6, 7, 8, 10], now=1)
    enqueue(scheduler, second)

    plan = advance(scheduler)

    assert chunks(plan) == [(second, 8, 1, True)]
    assert second.pages[:2] == held[:2]
    assert second.live.cached_tokens == 8
    assert (scheduler.shards[0].prefix.hit_tokens, scheduler.shards[0].prefix.lookup_tokens) == (
        8,
        18,
    )


def test_at_least_one_token_is_computed_however_much_is_cached() -> None:
    scheduler = make(num_pages=10)
    starts: list[int] = []
    for _ in range(2):
        one = sequence([1, 2, 3, 4, 5, 6, 7, 8])
        enqueue(scheduler, one)
        starts += [chunk.start for chunk in advance(scheduler).chunks]
        scheduler.finish(one)

    assert starts == [0, 4]


def test_another_salt_finds_nothing() -> None:
    scheduler = make(num_pages=10)
    for salt, cached in (("red", 0), ("blue", 0), ("red", 4)):
        one = sequence([1, 2, 3, 4, 5], salt=salt)
        enqueue(scheduler, one)
        advance(scheduler)
        assert one.live.cached_tokens == cached
        scheduler.finish(one)


def test_a_prompt_in_the_pool_is_shared_while_its_first_reader_still_runs() -> None:
    scheduler = make(num_pages=10)
    first, second = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 6], now=1)
    enqueue(scheduler, first)
    advance(scheduler)
    enqueue(scheduler, second)
    advance(scheduler)

    assert first.pages[0] == second.pages[0]
    assert scheduler.shards[0].pool.references(first.pages[0]) == 2
    assert first.pages[1] != second.pages[1]


def test_a_prompt_cannot_be_found_before_its_step_was_published() -> None:
    scheduler = make(num_pages=12)
    first, second = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 6], now=1)
    enqueue(scheduler, first)
    scheduler.plan(0.0)
    enqueue(scheduler, second)

    assert chunks(scheduler.plan(0.0)) == [(second, 0, 5, True)]


def test_answers_can_be_found_too() -> None:
    scheduler = make(num_pages=10)
    first = sequence([1, 2, 3])
    enqueue(scheduler, first)
    for _ in range(6):
        advance(scheduler)
    assert first.tokens == [1, 2, 3, 7, 7, 7, 7, 7, 7]
    scheduler.finish(first)
    again = sequence([1, 2, 3], resume=[7, 7, 7, 7, 7, 7], now=1)
    enqueue(scheduler, again)

    assert chunks(advance(scheduler)) == [(again, 8, 1, True)]
    assert again.live.cached_tokens == 3, "what was resumed is not prompt"


def test_a_scored_prompt_takes_nothing_from_the_cache_but_leaves_it_to_others() -> None:
    scheduler = make(num_pages=10)
    for scored, cached in ((1, 0), (1, 0), (None, 4)):
        one = sequence([1, 2, 3, 4, 5], prompt_logprobs=scored)
        enqueue(scheduler, one)
        advance(scheduler)
        assert one.live.cached_tokens == cached
        scheduler.finish(one)


def test_scores_start_afresh_when_a_prompt_is_computed_again() -> None:
    scheduler = make(num_pages=10)
    scored = sequence([1, 2, 3, 4, 5], prompt_logprobs=1)
    enqueue(scheduler, scored)
    advance(scheduler)
    assert scored.prompt_logprobs == [None]
    collected = scored.prompt_logprobs = [None, None, None]

    scheduler.preempt_all()
    assert scored.prompt_logprobs is collected, "what is in flight still belongs to these"
    advance(scheduler)

    assert scored.prompt_logprobs == [None]


def test_the_prefix_that_was_used_least_recently_is_evicted_first() -> None:
    scheduler = make(num_pages=6)
    for prompt in ([1, 1, 1, 1, 0], [2, 2, 2, 2, 0], [1, 1, 1, 1, 5]):
        one = sequence(prompt)
        enqueue(scheduler, one)
        advance(scheduler)
        scheduler.finish(one)
    assert scheduler.shards[0].pool.cached == 2
    large = sequence([3] * 16, max_tokens=1)  # Four pages: three are free, one has to go.
    enqueue(scheduler, large)
    advance(scheduler)
    scheduler.finish(large)

    one, two = sequence([1, 1, 1, 1, 9]), sequence([2, 2, 2, 2, 9], now=1)
    for each, cached in ((one, 4), (two, 0)):
        enqueue(scheduler, each)
        advance(scheduler)
        assert each.live.cached_tokens == cached
        scheduler.finish(each)


def test_without_the_cache_pages_are_shared_only_while_they_are_held() -> None:
    scheduler = make(num_pages=20, prefix_cache=False)
    first, twin = sequence([1, 2, 3, 4, 5], salt="a"), sequence([1, 2, 3, 4, 5], salt="a", now=1)
    enqueue(scheduler, first)
    advance(scheduler)
    enqueue(scheduler, twin)
    advance(scheduler)
    assert twin.pages[0] == first.pages[0]
    scheduler.finish(first)
    scheduler.finish(twin)
    assert scheduler.shards[0].pool.free == scheduler.shards[0].pool.total

    late = sequence([1, 2, 3, 4, 5], salt="a", now=2)
    enqueue(scheduler, late)
    assert chunks(advance(scheduler)) == [(late, 0, 5, True)]


def test_pages_of_a_sequence_with_bad_numbers_are_forgotten() -> None:
    scheduler = make(num_pages=20)
    bad = sequence([1, 2, 3, 4, 5])
    enqueue(scheduler, bad)
    advance(scheduler)

    scheduler.distrust(bad)
    scheduler.finish(bad)

    assert scheduler.shards[0].prefix.pages == scheduler.shards[0].pool.cached == 0


# -- endings -------------------------------------------------------------------------------------


def test_a_sequence_can_end_while_it_waits_in_its_prompt_and_while_it_decodes() -> None:
    scheduler = make(step_tokens=4, num_pages=30, max_rows=3)
    decoding, prompting, waiting = (sequence([number] * 6, now=number) for number in range(3))
    enqueue(scheduler, decoding)
    advance(scheduler)
    advance(scheduler)
    enqueue(scheduler, prompting)
    advance(scheduler)
    enqueue(scheduler, waiting)
    assert prompting.computed < prompting.target

    for each in (decoding, prompting, waiting):
        scheduler.finish(each)
        scheduler.check_integrity()

    assert (scheduler.waiting, scheduler.running, scheduler.shards[0].pool.used) == (0, [], 0)
    assert advance(scheduler).empty


def test_a_sequence_ends_once() -> None:
    scheduler = make()
    one = sequence([1])
    enqueue(scheduler, one)
    scheduler.finish(one)

    with pytest.raises(AssertionError, match="ended twice"):
        scheduler.finish(one)


def test_a_choice_that_was_never_queued_can_end() -> None:
    scheduler = make()
    scheduler.finish(sequence([1]))

    assert scheduler.waiting == 0


def test_entries_of_ended_sequences_do_not_pile_up_in_the_queue() -> None:
    scheduler = make()
    several = [sequence([1], now=number) for number in range(1000)]
    enqueue(scheduler, *several)
    for each in several[5:]:
        scheduler.finish(each)

    assert scheduler.waiting == 5
    assert len(scheduler._queue) <= 65
    assert sorted(each.rank for each in scheduler.waiting_sequences()) == [
        each.rank for each in several[:5]
    ]


def test_no_token_is_planned_beyond_the_limit() -> None:
    scheduler = make()
    one = sequence([1, 2], max_tokens=3)
    enqueue(scheduler, one)
    steps = [advance(scheduler) for _ in range(5)]

    assert [plan.empty for plan in steps] == [False, False, False, True, True]
    assert one.tokens == [1, 2, 7, 7, 7]


# -- data shards ---------------------------------------------------------------------------------


def test_each_request_goes_to_the_shard_with_the_fewest_rows() -> None:
    scheduler = make(data_shards=2, num_pages=12, step_tokens=99)
    waiting = [sequence([number] * 4, now=number) for number in range(6)]
    enqueue(scheduler, *waiting)
    plan = advance(scheduler)

    assert [each.shard for each in waiting] == [0, 1, 0, 1, 0, 1]
    assert [each.row for each in waiting] == [0, 4, 1, 5, 2, 6], "rows 3 and 7 are null rows"
    assert [each.pages for each in waiting] == [[1], [1], [2], [2], [3], [3]]
    assert len(plan.chunks) == 6
    plan = advance(scheduler)
    assert plan.decode_rows == [0, 1, 2, 4, 5, 6], "shard after shard"


def test_each_shard_has_a_budget_of_its_own() -> None:
    scheduler = make(data_shards=2, num_pages=30)
    long = [sequence([number] * 20, now=number) for number in range(2)]
    enqueue(scheduler, *long)

    assert chunks(advance(scheduler)) == [(long[0], 0, 16, False), (long[1], 0, 16, False)]


def test_a_known_prompt_goes_to_the_shard_that_knows_it() -> None:
    scheduler = make(data_shards=2, max_rows=8, max_chunks=8, step_tokens=99, num_pages=60)
    enqueue(scheduler, first := sequence([1] * 9), second := sequence([2] * 9))
    advance(scheduler)
    assert (first.shard, second.shard) == (0, 1)

    again = [sequence([2] * 9 + [3], now=1 + number) for number in range(6)]
    enqueue(scheduler, *again)
    advance(scheduler)

    assert [each.shard for each in again] == [1] * 6
    assert [each.live.cached_tokens for each in again] == [8] * 6


def test_a_shard_that_is_much_busier_is_passed_over_even_by_prompts_it_knows() -> None:
    scheduler = make(data_shards=2, max_rows=16, max_chunks=16, step_tokens=99, num_pages=60)
    enqueue(scheduler, sequence([1] * 9))
    advance(scheduler)
    again = [sequence([1] * 9 + [2], now=1 + number) for number in range(8)]
    enqueue(scheduler, *again)
    advance(scheduler)

    # Shard 0 may have 4 rows more than twice those of shard 1: 4, then 6.
    assert [each.shard for each in again] == [0, 0, 0, 0, 1, 0, 0, 1]
    assert [each.live.cached_tokens for each in again] == [8, 8, 8, 8, 0, 8, 8, 0]


def test_a_full_shard_preempts_its_own_and_what_it_preempts_may_go_elsewhere() -> None:
    scheduler = make(data_shards=2, max_rows=2, prefix_cache=False)
    bound = [sequence([number] * 7, now=number) for number in range(4)]
    enqueue(scheduler, *bound)
    advance(scheduler)
    assert [each.shard for each in bound] == [0, 1, 0, 1]
    scheduler.finish(bound[1])
    scheduler.finish(bound[3])
    while not scheduler.preemptions:
        advance(scheduler)
    assert bound[2].row == -1
    advance(scheduler)

    assert [each.shard for each in scheduler.running] == [0, 1]
    assert bound[2].shard == 1


def test_a_request_too_large_for_what_is_left_of_any_shard_waits_for_one() -> None:
    scheduler = make(data_shards=2)
    enqueue(scheduler, *(sequence([number] * 12, now=number) for number in range(2)))
    advance(scheduler)
    enqueue(scheduler, large := sequence([8] * 12, now=3), small := sequence([9], now=4))

    assert advance(scheduler).admitted == [], "the head of the queue is not passed over"
    assert (large.row, small.row) == (-1, -1)


def test_the_ledger_of_the_scheduler_notices_what_does_not_add_up() -> None:
    scheduler = make(num_pages=10, max_chunks=1)
    one, two = sequence([1] * 6), sequence([2] * 6, now=1)
    enqueue(scheduler, one, two, waiting := sequence([3], now=2))
    scheduler.plan(0.0)
    scheduler.plan(0.0)
    scheduler.check_integrity()

    scheduler.shards[0]._rows.append(0)
    with pytest.raises(AssertionError, match="rows do not add up"):
        scheduler.check_integrity()
    scheduler.shards[0]._rows.pop()
    scheduler._waiting += 1
    with pytest.raises(AssertionError, match="1 wait, 2 are counted"):
        scheduler.check_integrity()
    scheduler._waiting -= 1
    waiting.pages.append(9)
    with pytest.raises(AssertionError, match="a waiting sequence holds pages"):
        scheduler.check_integrity()
    waiting.pages.clear()
    scheduler.shards[0].pool.share(one.pages[1:])
    two.pages.append(one.pages[1])
    with pytest.raises(AssertionError, match=r"pages \[2\] are writable in two tables"):
        scheduler.check_integrity()


@settings(max_examples=40)
@given(st.data())
def test_random_lives_keep_the_ledger_and_everyone_finishes(data: st.DataObject) -> None:
    scheduler = make(
        num_pages=data.draw(st.integers(5, 12)),
        page_tokens=data.draw(st.integers(1, 4)),
        step_tokens=data.draw(st.integers(4, 12)),
        prefix_cache=data.draw(st.booleans()),
    )
    room = scheduler.shards[0].pool.total * scheduler.config.page_tokens
    alive: list[LiveSequence] = []
    in_flight: StepPlan | None = None
    for now in range(60):
        if now < 30 and data.draw(st.booleans()):
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=min(9, room - 1)))
            limit = data.draw(st.integers(1, min(6, room - len(prompt))))
            one = sequence(prompt, now=float(now), max_tokens=limit, salt=str(len(prompt) % 2))
            enqueue(scheduler, one)
            alive.append(one)
        if alive and data.draw(st.integers(0, 9)) == 0:
            scheduler.finish(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        plan = scheduler.plan(float(now))
        if in_flight is not None:
            publish(scheduler, in_flight)
        in_flight = plan
        scheduler.check_integrity()
        for one in [one for one in alive if len(one.tokens) >= one.max_total]:
            scheduler.finish(one)
            alive.remove(one)
    for _ in range(400):
        if not alive:
            break
        plan = advance(scheduler)
        for one in [one for one in alive if len(one.tokens) >= one.max_total]:
            scheduler.finish(one)
            alive.remove(one)
    assert not alive
    assert scheduler.shards[0].pool.used == 0
