"""The prefix cache: finds pages whose tokens a new prompt starts with.

A full page is known by a digest of its tokens and of everything before them, so a chain of
digests spells a prefix; the chain starts from the request's salt, so tenants with different salts
cannot see each other's pages. Which pages are free, used or cached is the business of
``pages.py``; this file only remembers what is in them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from jaxserve.engine.pages import PagePool

DIGEST_BYTES = 16  # 128 bits: a collision would hand out someone else's keys and values.


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
        self._digest_of: dict[int, bytes] = {}
        self.lookup_tokens = 0
        self.hit_tokens = 0
        pool.on_evict = self._drop

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

    def insert(self, digest: bytes, page: int) -> None:
        """Makes a full, computed page findable; the first page with a digest stays."""
        if digest not in self._page_of:
            assert page not in self._digest_of, f"page {page} is indexed with other contents"
            self._page_of[digest] = page
            self._digest_of[page] = digest
            if self._retain:
                self._pool.keep(page)

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
        self.discard(list(self._digest_of))

    def check_integrity(self) -> None:
        """Verifies that the two maps mirror each other and that nothing free is findable."""
        assert len(self._page_of) == len(self._digest_of), "the prefix index is lopsided"
        for digest, page in self._page_of.items():
            assert self._digest_of.get(page) == digest, f"page {page} is indexed under two digests"
        if not self._retain:
            for page in self._digest_of:
                assert self._pool.references(page) > 0, f"page {page} is indexed and not held"

    def _drop(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
