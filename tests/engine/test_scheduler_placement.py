"""Where the scheduler places a sequence: on pages that are there already, and on which shard."""

from __future__ import annotations

from tests.engine.scheduling import advance, chunks, enqueue, make, sequence

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
