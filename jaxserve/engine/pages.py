"""The page pool: who holds which page of the key/value cache.

Every page is in exactly one of three states:

    free     nobody holds it and nobody may read it
    used     at least one sequence holds it (reference count > 0)
    cached   nobody holds it, but its contents are kept for a later prompt; least recently
             released first, these are taken back when the free pages run out

    allocate: free -> used (evicting cached pages when needed)     share: used | cached -> used
    release:  used -> cached when the page is kept, else free      forget: drops a kept page's mark

The pool knows page numbers only. What a page contains, and under which key it can be found again,
is known to ``prefix.py``. Page 0 is the null page: padding reads and writes it, it is never handed
out and never counted.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

NULL_PAGE = 0


class PagePool:
    """Reference counts and the three states of every page. Engine thread only."""

    def __init__(self, num_pages: int) -> None:
        """Makes a pool of ``num_pages`` pages, the null page included (so at least 2)."""
        if num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (page {NULL_PAGE} is reserved), got {num_pages}"
            )
        self.total = num_pages - 1
        # A stack: the page released last is handed out first, while it is warm in a cache.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._references = array("i", [0]) * num_pages
        self._kept: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.on_evict: Callable[[int], None] = lambda page: None
        """Called with a cached page that is about to be overwritten."""

    @property
    def free(self) -> int:
        """Pages that nobody holds and nobody may read."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and whose contents are kept."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages held by at least one sequence."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Pages that ``allocate`` could hand out now."""
        return len(self._free) + len(self._cached)

    def available_beside(self, pages: Sequence[int]) -> int:
        """Pages that ``allocate`` could hand out once ``pages`` were shared."""
        return self.available - sum(self._references[page] == 0 for page in pages)

    def references(self, page: int) -> int:
        """How many holders a page has."""
        return self._references[page]

    def picture(self) -> tuple[array[int], list[int]]:
        """Returns how many hold each page, by page number, and the cached pages; both copies."""
        return self._references[:], list(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Hands out ``count`` pages with one reference each, or None (and nothing changes)."""
        if count > self.available:
            return None
        pages: list[int] = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._kept.discard(page)
                self.on_evict(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds one holder to each page; a cached page becomes used again."""
        references = self._references
        for page in pages:
            if references[page] == 0:
                del self._cached[page]
            references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes one holder from each page.

        The last pages of a prompt go first into the cache order, so that eviction takes the tail
        of a prefix before its head.
        """
        references = self._references
        for page in reversed(pages):
            assert references[page] > 0, f"page {page} released more often than held"
            references[page] -= 1
            if references[page] == 0:
                if page in self._kept:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """Marks a used page: when its last holder leaves, its contents stay readable."""
        assert self._references[page] > 0, f"page {page} is kept while nobody holds it"
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """Removes the mark; a cached page becomes free."""
        self._kept.discard(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Verifies the ledger against every page list that is held now.

        Args:
            tables: the page list of every sequence that holds pages.

        Raises:
            AssertionError: with the numbers that do not add up.
        """
        held = Counter(page for table in tables for page in table)
        counts = {page: count for page, count in enumerate(self._references) if count}
        wrong = sorted(
            page for page in held.keys() | counts.keys() if held[page] != counts.get(page, 0)
        )
        assert not wrong, "references and holders differ: " + ", ".join(
            f"page {page} has {counts.get(page, 0)} and {held[page]}" for page in wrong[:8]
        )
        free, cached, used = set(self._free), set(self._cached), set(counts)
        assert len(free) == len(self._free), "a page is twice in the free list"
        assert not free & cached, f"pages {sorted(free & cached)[:8]} are both free and cached"
        assert not (free | cached) & used, (
            f"pages {sorted((free | cached) & used)[:8]} are held and also free or cached"
        )
        assert len(free) + len(cached) + len(used) == self.total, (
            f"free {len(free)} + cached {len(cached)} + used {len(used)} != total {self.total}"
        )
        assert NULL_PAGE not in free | cached | used, "the null page was handed out"
        assert cached <= self._kept, f"pages {sorted(cached - self._kept)[:8]} cached, not kept"
        assert self._kept <= cached | used, (
            f"pages {sorted(self._kept - cached - used)[:8]} are free and still kept"
        )
