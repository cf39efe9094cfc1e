from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.engine.pages import NULL_PAGE, PagePool


def test_a_new_pool_has_every_page_free_but_the_null_page() -> None:
    pool = PagePool(5)

    assert (pool.total, pool.free, pool.used, pool.cached, pool.available) == (4, 4, 0, 0, 4)
    assert pool.allocate(4) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.references(NULL_PAGE) == 0


def test_a_pool_needs_a_page_besides_the_null_page() -> None:
    with pytest.raises(ValueError, match=r"num_pages must be at least 2 \(page 0 .*got 1"):
        PagePool(1)


def test_an_allocation_that_cannot_be_met_takes_nothing() -> None:
    pool = PagePool(5)
    pool.allocate(2)

    assert pool.allocate(3) is None
    assert pool.free == 2


def test_released_pages_can_be_reused_the_last_one_first() -> None:
    pool = PagePool(5)
    pages = pool.allocate(4)
    assert pages is not None
    pool.release(pages[:2])

    assert pool.allocate(2) == [1, 2]


def test_a_shared_page_is_used_until_its_last_holder_leaves() -> None:
    pool = PagePool(5)
    pages = pool.allocate(2)
    assert pages is not None
    pool.share(pages[:1])
    assert pool.references(1) == 2

    pool.release(pages)
    assert (pool.used, pool.free) == (1, 3)

    pool.release(pages[:1])
    assert (pool.used, pool.free) == (0, 4)


def test_a_kept_page_stays_readable_and_can_be_taken_up_again() -> None:
    pool = PagePool(5)
    pages = pool.allocate(2)
    assert pages is not None
    pool.keep(1)
    pool.release(pages)
    assert (pool.free, pool.cached, pool.used) == (3, 1, 0)

    pool.share([1])

    assert (pool.free, pool.cached, pool.used) == (3, 0, 1)
    assert pool.references(1) == 1


def test_cached_pages_are_evicted_only_when_none_is_free_and_the_oldest_first() -> None:
    pool = PagePool(5)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    first, second = pool.allocate(2), pool.allocate(1)
    assert (first, second) == ([1, 2], [3])
    for page in (1, 2, 3):
        pool.keep(page)
    pool.release([3])
    pool.release([1, 2])

    assert pool.allocate(1) == [4]
    assert evicted == []
    # Page 3 was released first; of the later two, the tail of the prefix goes before its head.
    assert pool.allocate(3) == [3, 2, 1]
    assert evicted == [3, 2, 1]


def test_taking_a_cached_page_up_again_makes_it_the_youngest() -> None:
    pool = PagePool(4)
    for _ in range(3):
        pool.allocate(1)
    for page in (1, 2, 3):
        pool.keep(page)
        pool.release([page])
    pool.share([1])
    pool.release([1])

    assert pool.allocate(3) == [2, 3, 1]


def test_a_forgotten_page_becomes_free_now_or_when_its_holder_leaves() -> None:
    pool = PagePool(4)
    pool.allocate(2)
    pool.keep(1)
    pool.keep(2)
    pool.release([1])
    assert pool.cached == 1

    pool.forget(1)
    pool.forget(2)
    assert (pool.free, pool.cached, pool.used) == (2, 0, 1)

    pool.release([2])
    assert (pool.free, pool.cached) == (3, 0)


def test_releasing_or_keeping_a_page_that_nobody_holds_is_refused() -> None:
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="page 2 released more often than held"):
        pool.release([2])
    with pytest.raises(AssertionError, match="page 2 is kept while nobody holds it"):
        pool.keep(2)


def test_the_ledger_notices_what_does_not_add_up() -> None:
    pool = PagePool(6)
    held = pool.allocate(2)
    assert held is not None
    pool.check_integrity([held])

    with pytest.raises(AssertionError, match="page 1 has 1 and 2"):
        pool.check_integrity([held, [1]])
    with pytest.raises(AssertionError, match="page 2 has 1 and 0"):
        pool.check_integrity([held[:1]])

    pool._free.append(5)
    with pytest.raises(AssertionError, match="twice in the free list"):
        pool.check_integrity([held])
    pool._free.remove(5)
    pool._free.remove(5)
    with pytest.raises(AssertionError, match=r"free 2 \+ cached 0 \+ used 2 != total 5"):
        pool.check_integrity([held])
    pool._free.append(1)
    with pytest.raises(AssertionError, match=r"pages \[1\] are held and also free or cached"):
        pool.check_integrity([held])
    pool._free.pop()
    pool._cached[3] = None
    with pytest.raises(AssertionError, match=r"pages \[3\] are both free and cached"):
        pool.check_integrity([held])
    pool._cached.clear()
    pool._cached[5] = None
    with pytest.raises(AssertionError, match=r"pages \[5\] cached, not kept"):
        pool.check_integrity([held])
    pool._kept.update((5, 4))
    with pytest.raises(AssertionError, match=r"pages \[4\] are free and still kept"):
        pool.check_integrity([held])


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(2, 20))
def test_everything_that_was_allocated_can_be_given_back(sizes: list[int], pages: int) -> None:
    pool = PagePool(pages)
    tables = [table for size in sizes if (table := pool.allocate(size)) is not None]
    held = [page for table in tables for page in table]
    assert len(set(held)) == len(held), "one page was handed out twice"
    assert NULL_PAGE not in held

    for table in tables:
        pool.release(table)

    pool.check_integrity([])
    assert pool.free == pool.total == pages - 1


class PoolMachine(RuleBasedStateMachine):
    """Random holders of random pages; the model is one list of pages per holder."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(9)
        self.pool.on_evict = lambda page: self.evicted.append(page)
        self.evicted: list[int] = []
        self.tables: list[list[int]] = []
        self.kept: list[int] = []
        """Cached pages, the next to be evicted first."""
        self.marked: set[int] = set()

    @property
    def held(self) -> set[int]:
        return {page for table in self.tables for page in table}

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = 8 - len(self.held) - len(self.kept)
        taken = self.kept[: max(0, count - free)]
        self.evicted.clear()
        pages = self.pool.allocate(count)
        if count > free + len(self.kept):
            assert pages is None
            return
        assert pages is not None
        assert len(set(pages)) == count
        assert not set(pages) & self.held
        assert self.evicted == taken
        self.kept = self.kept[len(taken) :]
        self.marked -= set(taken)
        self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.pool.share(prefix)
        self.tables.append(list(prefix))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def take_up_again(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.kept))
        self.pool.share([page])
        self.kept.remove(page)
        self.tables.append([page])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        gone = [page for page in reversed(table) if page not in self.held]
        self.kept += [page for page in gone if page in self.marked]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.keep(page)
        self.marked.add(page)

    @rule(page=st.integers(1, 8))
    def forget(self, page: int) -> None:
        self.pool.forget(page)
        self.marked.discard(page)
        if page in self.kept:
            self.kept.remove(page)

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.used == len(self.held)
        assert self.pool.cached == len(self.kept)
        assert self.pool.free + self.pool.cached + self.pool.used == self.pool.total


TestPoolMachine = PoolMachine.TestCase
