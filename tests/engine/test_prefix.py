from __future__ import annotations

import pytest

from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix import PrefixCache


def make(*, pages: int = 6, retain: bool = True) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(pages)
    return pool, PrefixCache(pool, 2, retain=retain)


def digests(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[bytes]:
    chain: list[bytes] = []
    cache.extend_chain(chain, tokens, salt)
    return chain


def store(pool: PagePool, cache: PrefixCache, tokens: list[int], salt: str = "") -> list[int]:
    """Computes a prompt and lets go of it."""
    pages = pool.allocate(len(tokens) // 2)
    assert pages is not None
    for digest, page in zip(digests(cache, tokens, salt), pages, strict=True):
        cache.insert(digest, page)
    return pages


def test_only_full_pages_have_a_digest() -> None:
    _, cache = make()

    assert len(digests(cache, [1])) == 0
    assert len(digests(cache, [1, 2, 3])) == 1
    assert len(digests(cache, [1, 2, 3, 4])) == 2


def test_a_digest_stands_for_all_tokens_before_it() -> None:
    _, cache = make()

    one, other = digests(cache, [1, 2, 3, 4]), digests(cache, [9, 2, 3, 4])

    assert one[1] != other[1]
    assert digests(cache, [1, 2, 3, 5])[0] == one[0]


def test_a_chain_that_grows_equals_one_made_at_once() -> None:
    _, cache = make()
    chain: list[bytes] = []
    for end in range(7):
        cache.extend_chain(chain, [5, 6, 7, 8, 9, 10][:end], "s")

    assert chain == digests(cache, [5, 6, 7, 8, 9, 10], "s")


def test_the_longest_known_prefix_is_found_and_held() -> None:
    pool, cache = make()
    pages = store(pool, cache, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    assert pool.cached == 3

    found = cache.find(digests(cache, [1, 2, 3, 4, 9, 9]))

    assert found == pages[:2]
    assert pool.available_beside(found) == pool.available - 2
    pool.share(found)
    assert [pool.references(page) for page in pages] == [1, 1, 0]
    assert cache.find(digests(cache, [9, 9, 3, 4])) == []


def test_salts_do_not_see_each_other() -> None:
    pool, cache = make()
    store(pool, cache, [1, 2], "red")

    assert cache.find(digests(cache, [1, 2], "blue")) == []
    assert cache.find(digests(cache, [1, 2], "red")) == [1]


def test_the_first_page_with_a_digest_stays_and_the_second_is_freed() -> None:
    pool, cache = make()
    first, second = store(pool, cache, [1, 2]), store(pool, cache, [1, 2])

    pool.release(second)
    pool.release(first)

    assert (pool.cached, pool.free) == (1, 4)
    assert cache.find(digests(cache, [1, 2])) == first


def test_an_evicted_page_cannot_be_found() -> None:
    pool, cache = make(pages=3)
    pool.release(store(pool, cache, [1, 2]))
    assert cache.pages == 1

    assert pool.allocate(2) is not None

    assert cache.pages == 0
    assert cache.find(digests(cache, [1, 2])) == []
    cache.check_integrity()


def test_without_retaining_a_page_is_found_while_somebody_holds_it() -> None:
    pool, cache = make(retain=False)
    pages = store(pool, cache, [1, 2])
    shared = cache.find(digests(cache, [1, 2]))
    assert shared == pages
    pool.share(shared)
    pool.release(pages)
    cache.released(pages)
    assert cache.find(digests(cache, [1, 2])) == pages

    pool.release(shared)
    cache.released(shared)

    assert pool.cached == 0
    assert cache.find(digests(cache, [1, 2])) == []
    cache.check_integrity()


def test_discarded_pages_are_neither_found_nor_kept() -> None:
    pool, cache = make()
    pages = store(pool, cache, [1, 2, 3, 4])
    cache.discard(pages[1:])

    pool.release(pages)

    assert (pool.cached, pool.free) == (1, 4)
    assert cache.find(digests(cache, [1, 2, 3, 4])) == pages[:1]


def test_clearing_forgets_held_and_cached_pages() -> None:
    pool, cache = make()
    cached, held = store(pool, cache, [1, 2]), store(pool, cache, [3, 4])
    pool.release(cached)

    cache.clear()

    assert (cache.pages, pool.cached, pool.used) == (0, 0, 1)
    pool.release(held)
    assert pool.free == pool.total


def test_the_index_notices_when_it_is_lopsided() -> None:
    pool, cache = make(retain=False)
    pages = store(pool, cache, [1, 2, 3, 4])
    cache.check_integrity()

    with pytest.raises(AssertionError, match="page 1 is indexed with other contents"):
        cache.insert(b"other", 1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 1 is indexed and not held"):
        cache.check_integrity()
    cache._stored[1], cache._stored[2] = cache._stored[2], cache._stored[1]
    with pytest.raises(AssertionError, match="indexed under two digests"):
        cache.check_integrity()
    del cache._stored[1]
    with pytest.raises(AssertionError, match="lopsided"):
        cache.check_integrity()
