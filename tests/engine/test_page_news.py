"""What listeners hear of the prefix cache: against the cache itself, through a whole engine."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jaxserve.engine import page_news
from jaxserve.engine.engine import Engine
from jaxserve.engine.page_news import PageBatch, PageFeed, PageNews
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix import ClearedPages, DroppedPage, PrefixCache, StoredPage
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.stream import ThreadWaker
from jaxserve.testing import counting_engine


class Listener:
    """Follows a feed as a client would, and keeps what it believes can be found."""

    def __init__(self) -> None:
        self.woken = 0
        self.feed = PageFeed(self.wake)
        self.known: dict[int, dict[bytes, StoredPage]] = {}

    def wake(self) -> None:
        self.woken += 1

    def follow(self) -> list[PageBatch]:
        batches = self.feed.take()
        for batch in batches:
            if batch.snapshot:
                self.known[batch.shard] = {}
            known = self.known[batch.shard]
            for change in batch.changes:
                match change:
                    case StoredPage():
                        assert change.parent is None or not batch.snapshot or change.parent in known
                        known[change.digest] = change
                    case DroppedPage():
                        del known[change.digest]
                    case ClearedPages():
                        known.clear()
        return batches


def ask(engine: Engine, prompt: list[int], request_id: str, **fields: Any) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.0)
    engine.submit(
        Request(request_id=request_id, prompt=prompt, sampling=sampling, **fields), ThreadWaker()
    )


def turn(engine: Engine) -> None:
    while engine.run_once():
        pass


def truth(engine: Engine) -> dict[int, dict[bytes, StoredPage]]:
    return {
        shard.number: {page.digest: page for page in shard.prefix.snapshot()}
        for shard in engine.scheduler.shards
    }


def test_a_listener_knows_what_can_be_found_through_evictions() -> None:
    """A small pool, so that pages are evicted all the time; the second listener comes later."""
    engine, _ = counting_engine(num_pages=17, data_shards=2, max_rows=2)
    early, late = Listener(), Listener()
    engine.watch_pages(early.feed)
    draw = random.Random(3)
    dropped = 0
    for number in range(60):
        if number == 30:
            engine.watch_pages(late.feed)
        prompt = [draw.randrange(2) for _ in range(draw.randint(1, 40))]
        ask(engine, prompt, str(number), cache_salt=draw.choice(["", "s"]))
        turn(engine)
        batches = early.follow()
        dropped += sum(isinstance(c, DroppedPage) for batch in batches for c in batch.changes)
        assert early.known == truth(engine)
        if number >= 30:
            late.follow()
            assert late.known == early.known
    assert dropped > 20
    stored = next(iter(early.known[0].values()))
    assert (len(stored.tokens), stored.salt.split("/")[0]) == (4, "shared")
    engine.unwatch_pages(early.feed)
    engine.unwatch_pages(late.feed)
    turn(engine)
    assert all(shard.prefix.changes is None for shard in engine.scheduler.shards)
    engine.check_integrity()


def test_pages_are_told_with_their_tokens_and_parents() -> None:
    engine, _ = counting_engine()
    listener = Listener()
    engine.watch_pages(listener.feed)
    ask(engine, list(range(9)), "a")
    turn(engine)
    snapshot, *batches = listener.follow()

    assert (snapshot.snapshot, list(snapshot.changes)) == (True, [])
    stored = [change for batch in batches for change in batch.changes]
    assert [list(page.tokens) for page in stored if isinstance(page, StoredPage)][:2] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    first, second = stored[:2]
    assert isinstance(first, StoredPage)
    assert isinstance(second, StoredPage)
    assert (first.parent, second.parent) == (None, first.digest)
    assert listener.woken == len(batches) + 1


def test_a_failed_step_clears_what_listeners_know() -> None:
    engine, runner = counting_engine()
    listener = Listener()
    engine.watch_pages(listener.feed)
    ask(engine, list(range(9)), "a")
    turn(engine)
    listener.follow()
    assert listener.known[0]
    engine.scheduler.preempt_all()
    ask(engine, [1], "b")
    turn(engine)

    changes = [change for batch in listener.follow() for change in batch.changes]
    assert isinstance(changes[0], ClearedPages)
    assert listener.known == truth(engine) == {0: {}}
    assert runner.compiles_after_ready == 0


def test_a_feed_that_nobody_empties_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_news, "FEED_BATCHES", 3)
    slow, quick = Listener(), Listener()
    pool = PagePool(9)
    cache = PrefixCache(pool, 1, retain=True)
    news = PageNews([cache])
    news.watch(slow.feed)
    news.watch(quick.feed)
    quick.follow()
    chain: list[bytes] = []
    tokens = [1, 2, 3, 4, 5]
    cache.extend_chain(chain, tokens, "")
    pages = pool.allocate(5)
    assert pages is not None
    for number, page in enumerate(pages):
        parent = chain[number - 1] if number else None
        cache.insert(chain[number], page, parent=parent, tokens=tokens[number : number + 1])
        news.tell()
        quick.follow()

    assert (slow.feed.lost, slow.feed.take()) == (True, [])
    assert not quick.feed.lost
    news.unwatch(slow.feed)
    again = Listener()
    news.watch(again.feed)
    again.follow()
    assert again.known == quick.known
    assert len(again.known[0]) == 5


def test_a_snapshot_has_parents_first_when_they_came_back_later() -> None:
    pool = PagePool(9)
    cache = PrefixCache(pool, 1, retain=True)
    chain: list[bytes] = []
    cache.extend_chain(chain, [7, 8], "")
    pages = pool.allocate(3)
    assert pages is not None
    first, second, third = pages
    cache.insert(chain[0], first, tokens=[7])
    cache.insert(chain[1], second, parent=chain[0], tokens=[8])
    cache.discard([first])
    assert [page.digest for page in cache.snapshot()] == [chain[1]]
    cache.insert(chain[0], third, tokens=[7])

    assert [page.digest for page in cache.snapshot()] == chain


def test_without_the_prefix_cache_there_is_nothing_to_tell() -> None:
    engine, _ = counting_engine(prefix_cache=False)
    listener = Listener()
    engine.watch_pages(listener.feed)
    ask(engine, list(range(9)), "a")
    turn(engine)

    assert [list(batch.changes) for batch in listener.follow()] == [[]]


def test_a_late_listener_hears_nothing_twice() -> None:
    """What has changed in this very turn is in its snapshot already."""
    pool = PagePool(9)
    cache = PrefixCache(pool, 1, retain=True)
    news = PageNews([cache])
    early, late = Listener(), Listener()
    news.watch(early.feed)
    pages = pool.allocate(2)
    assert pages is not None
    cache.insert(b"one", pages[0])
    cache.insert(b"two", pages[1])
    cache.discard(pages[:1])
    news.watch(late.feed)
    news.tell()

    assert [len(batch.changes) for batch in late.follow()] == [1]
    assert [len(batch.changes) for batch in early.follow()] == [0, 3]
    assert late.known == early.known
