"""The scheduler alone: plans are published by hand, with tokens chosen by the test."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.scheduler import PRIORITY_SECONDS, Scheduler
from jaxserve.engine.sequence import LiveSequence
from tests.engine.scheduling import advance, chunks, enqueue, make, publish, sequence

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


def test_the_prompts_of_a_step_are_no_longer_than_the_longest_bucket() -> None:
    scheduler = make(step_tokens=12, chunk_tokens=5, num_pages=30)
    long, short = sequence(list(range(8)), now=0), sequence([1, 2, 3], now=1)
    enqueue(scheduler, long, short)

    assert chunks(advance(scheduler)) == [(long, 0, 5, False)]
    assert chunks(advance(scheduler)) == [(long, 5, 3, True), (short, 0, 2, False)]


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


# -- the ledger ----------------------------------------------------------------------------------


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
