"""The prefix cache: finds pages whose tokens a new prompt starts with.

A full page is known by a digest of its tokens and of everything before them, so a chain of
digests spells a prefix; the chain starts from the request's salt, so tenants with different salts
cannot see each other's pages. Which pages are free, used or cached is the business of
``pages.py``; this file only remembers what is in them. It also notes what becomes findable and what
no longer is, when somebody listens (``page_news.py``).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxserve.engine.pages import PagePool

DIGEST_BYTES = 16  # 128 bits: a collision would hand out someone else's keys and values.

SHARED = "shared/"
"""How the salts of chains begin that more than one request may use; a client's salt follows."""


@dataclass(slots=True)
class StoredPage:
    """What is in a page that can be found. Not frozen, because making one is then three times as
    slow; nobody writes to it.
    """

    digest: bytes
    """Of its tokens and of everything before them."""
    parent: bytes | None
    """The digest of the page before it; None at the start of a prompt."""
    tokens: Sequence[int]
    salt: str


@dataclass(frozen=True, slots=True)
class DroppedPage:
    """A page that can no longer be found."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class ClearedPages:
    """No page can be found any more."""


PageChange = StoredPage | DroppedPage | ClearedPages


class PrefixCache:
    """Digest of a prefix, page by page -> the page that holds its last part."""

    def __init__(self, pool: PagePool, page_tokens: int, *, retain: bool) -> None:
        """Watches ``pool``.

        Args:
            pool: the pool whose pages are indexed.
            page_tokens: tokens in one page.
            retain: keep pages that nobody holds any more. When False, pages are still shared
                between sequences alive at the same time under one salt (the choices of one
                request).
        """
        self._pool = pool
        self._page_tokens = page_tokens
        self._retain = retain
        self._page_of: dict[bytes, int] = {}
        # About 300 bytes a page, which is megabytes on the device.
        self._stored: dict[int, StoredPage] = {}
        self.changes: list[PageChange] | None = None
        """What has changed since somebody emptied it; None while nobody listens."""
        self.lookup_tokens = 0
        self.hit_tokens = 0
        pool.on_evict = self._drop

    def listen(self) -> None:
        """Begins to note changes. Pages that end with their request are nobody's news."""
        if self._retain and self.changes is None:
            self.changes = []

    @property
    def pages(self) -> int:
        """Pages that can be found."""
        return len(self._page_of)

    @staticmethod
    def root(salt: str) -> bytes:
        """Returns the digest that a chain with this salt starts from."""
        return hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()

    def extend_chain(self, digests: list[bytes], tokens: Sequence[int], salt: str) -> None:
        """Appends the digests of the full pages of ``tokens`` that ``digests`` lacks."""
        size = self._page_tokens
        for index in range(len(digests), len(tokens) // size):
            parent = digests[-1] if digests else self.root(salt)
            data = array("i", tokens[index * size : (index + 1) * size]).tobytes()
            digests.append(hashlib.blake2b(parent + data, digest_size=DIGEST_BYTES).digest())

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Returns the pages of the longest known part of a chain; to keep them, share them."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def count_lookup(self, prompt_tokens: int, hit_tokens: int) -> None:
        """Records an admitted lookup for the hit rate."""
        self.lookup_tokens += prompt_tokens
        self.hit_tokens += hit_tokens

    def insert(
        self,
        digest: bytes,
        page: int,
        *,
        parent: bytes | None = None,
        tokens: Sequence[int] = (),
        salt: str = "",
    ) -> None:
        """Makes a full, computed page findable; the first page with a digest stays.

        Args:
            digest: of the page, out of ``extend_chain``.
            page: its number.
            parent: the digest before it in its chain.
            tokens: what is in it; for those who listen.
            salt: of its chain.
        """
        if digest not in self._page_of:
            assert page not in self._stored, f"page {page} is indexed with other contents"
            self._page_of[digest] = page
            stored = StoredPage(digest, parent, tuple(tokens), salt)
            self._stored[page] = stored
            if self.changes is not None:
                self.changes.append(stored)
            if self._retain:
                self._pool.keep(page)

    def snapshot(self) -> list[StoredPage]:
        """Returns every page that can be found, parents before children."""
        listed: set[bytes] = set()
        pages: list[StoredPage] = []
        for stored in self._stored.values():
            # A parent may have been stored again later than its child, which outlived it.
            chain: list[StoredPage] = []
            current: StoredPage | None = stored
            while current is not None and current.digest not in listed:
                listed.add(current.digest)
                chain.append(current)
                before = self._page_of.get(current.parent) if current.parent is not None else None
                current = None if before is None else self._stored[before]
            pages += reversed(chain)
        return pages

    def released(self, pages: Iterable[int]) -> None:
        """Forgets pages that became free with their last holder (only when not retaining)."""
        if not self._retain:
            for page in pages:
                if self._pool.references(page) == 0:
                    self._drop(page)

    def discard(self, pages: Iterable[int]) -> None:
        """Forgets pages whose contents cannot be trusted; their holders keep them."""
        for page in pages:
            self._drop(page)
            self._pool.forget(page)

    def clear(self) -> None:
        """Forgets everything: the contents of the pool were lost."""
        heard, self.changes = self.changes, None
        self.discard(list(self._stored))
        if heard is not None:
            heard.append(ClearedPages())
        self.changes = heard

    def check_integrity(self) -> None:
        """Verifies that the two maps mirror each other and that nothing free is findable."""
        assert len(self._page_of) == len(self._stored), "the prefix index is lopsided"
        for digest, page in self._page_of.items():
            known = self._stored[page].digest if page in self._stored else None
            assert known == digest, f"page {page} is indexed under two digests"
        if not self._retain:
            for page in self._stored:
                assert self._pool.references(page) > 0, f"page {page} is indexed and not held"

    def _drop(self, page: int) -> None:
        stored = self._stored.pop(page, None)
        if stored is not None:
            del self._page_of[stored.digest]
            if self.changes is not None:
                self.changes.append(DroppedPage(stored.digest))
