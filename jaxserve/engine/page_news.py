"""Tells listeners which pages a prompt may find: all at first, then every change.

    PrefixCache.changes ──PageNews.tell, once a turn──> PageFeed ──take──> a front end

The engine thread only produces and never waits: a feed that is not emptied in time is given up, its
listener sees ``lost`` and watches anew with another feed, which begins with a fresh snapshot. While
nobody listens the prefix caches note nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.engine.prefix import PageChange, PrefixCache

FEED_BATCHES = 1024
"""Turns that may wait in one feed: ten seconds of a fast engine. A batch holds references to pages
that the cache knows anyway, so a full feed costs what they cost once they are dropped."""


@dataclass(frozen=True, slots=True)
class PageBatch:
    """What one turn of the engine has changed in one data shard."""

    shard: int
    changes: Sequence[PageChange]
    snapshot: bool = False
    """True: these are all pages that can be found, parents first; earlier batches are history."""


class PageFeed:
    """One listener's batches. ``take`` and ``lost`` are for its thread, ``put`` the engine's."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """Makes an empty feed; ``wake`` must not block or raise, and is called after ``put``."""
        self._batches: deque[PageBatch] = deque()
        self._wake = wake
        self.lost = False
        """True once it was full: what is in it is of no use, and nothing more comes."""

    def put(self, batch: PageBatch) -> None:
        """Appends a batch, or gives the feed up."""
        if self.lost:
            return
        if len(self._batches) >= FEED_BATCHES:
            self.lost = True
            self._batches.clear()
        else:
            self._batches.append(batch)
        self._wake()

    def take(self) -> list[PageBatch]:
        """Removes and returns what is there; never waits."""
        taken: list[PageBatch] = []
        try:
            while True:
                taken.append(self._batches.popleft())
        except IndexError:  # Empty, or emptied by ``put`` a moment ago.
            return taken


class PageNews:
    """Every feed of one engine. Engine thread only."""

    def __init__(self, caches: Sequence[PrefixCache]) -> None:
        """Listens to nothing yet; ``caches`` are the data shards', in their order."""
        self._caches = caches
        self._feeds: list[PageFeed] = []

    def watch(self, feed: PageFeed) -> None:
        """Gives a new feed a snapshot of every shard, and what changes from here on."""
        self.tell()  # What has changed before is in the snapshot.
        self._feeds.append(feed)
        for shard, cache in enumerate(self._caches):
            cache.listen()
            pages = [] if cache.changes is None else cache.snapshot()
            feed.put(PageBatch(shard, pages, snapshot=True))

    def unwatch(self, feed: PageFeed) -> None:
        """Forgets a feed; safe for one that is not known."""
        if feed in self._feeds:
            self._feeds.remove(feed)
        if not self._feeds:
            for cache in self._caches:
                cache.changes = None

    def tell(self) -> None:
        """Hands on what has changed since the last time."""
        if not self._feeds:
            return
        for shard, cache in enumerate(self._caches):
            if cache.changes:
                changes, cache.changes = cache.changes, []
                batch = PageBatch(shard, changes)
                for feed in self._feeds:
                    feed.put(batch)
