"""Writes what ``engine/page_news.py`` tells as the KV events of ``vllm.grpc.engine``.

    subscription ──> snapshot: cleared, then every page ──> changes, one batch a turn ──> ...

No history is kept, so every subscription begins with a snapshot, wherever it wants to resume; its
numbers go on from there. When the subscriber was too slow a number is left out, which tells those
that count, and another snapshot follows, which is all that the others need.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence

from smg_grpc_proto.generated import common_pb2 as pb

from jaxserve.engine.page_news import PageBatch, PageFeed
from jaxserve.engine.prefix import SHARED, ClearedPages, DroppedPage, PageChange, StoredPage

CHUNK_TOKENS = 65_536
"""Of one part of a snapshot, which is 300 kB then; messages of 4 MiB are usual at most."""


class LoopFeed(PageFeed):
    """A feed that one coroutine of an event loop waits for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes an empty feed."""
        self._ready = asyncio.Event()

        def wake() -> None:
            # A loop that has been closed has nobody left to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ready.set)

        super().__init__(wake)

    async def wait(self) -> list[PageBatch]:
        """Returns what is there, as soon as there is something; nothing when it is lost."""
        await self._ready.wait()
        self._ready.clear()
        return self.take()


class KvEventWriter:
    """Numbers and writes the batches of one subscription."""

    def __init__(self, start: int, *, page_tokens: int, shards: int) -> None:
        """Begins behind ``start``, the last number that the subscriber has; 0 when it has none."""
        self._number = start
        self._page_tokens = page_tokens
        self._tells_shard = shards > 1
        self._events = 0

    def write(self, batch: PageBatch) -> Iterator[pb.KvEventBatch]:
        """Returns the messages of one batch."""
        if not batch.snapshot:
            yield self._batch(batch.shard, self._changes(batch.changes))
            return
        size = max(1, CHUNK_TOKENS // self._page_tokens)
        count = max(1, -(-len(batch.changes) // size))
        for index in range(count):
            part = batch.changes[index * size : (index + 1) * size]
            events = [
                pb.KvCacheEvent(stored=self._stored([page]))
                for page in part
                if isinstance(page, StoredPage)
            ]
            if index == 0:
                events.insert(0, pb.KvCacheEvent(cleared=pb.KvCacheCleared()))
            message = self._batch(batch.shard, events)
            message.snapshot.index, message.snapshot.count = index, count
            message.snapshot.blocks = len(batch.changes)
            yield message

    def skip(self) -> None:
        """Leaves a number out: something was lost."""
        self._number += 1

    def _batch(self, shard: int, events: Sequence[pb.KvCacheEvent]) -> pb.KvEventBatch:
        self._number += 1
        return pb.KvEventBatch(
            sequence_number=self._number,
            timestamp=time.time(),
            events=events,
            dp_rank=shard if self._tells_shard else None,
        )

    def _changes(self, changes: Sequence[PageChange]) -> list[pb.KvCacheEvent]:
        """Writes changes in their order; pages of one chain, and pages that go, as one event."""
        events: list[pb.KvCacheEvent] = []
        chain: list[StoredPage] = []
        dropped: list[int] = []
        for change in [*changes, None]:
            if chain and not (isinstance(change, StoredPage) and change.parent == chain[-1].digest):
                events.append(pb.KvCacheEvent(stored=self._stored(chain)))
                chain = []
            if dropped and not isinstance(change, DroppedPage):
                events.append(pb.KvCacheEvent(removed=pb.KvBlocksRemoved(block_hashes=dropped)))
                dropped = []
            match change:
                case StoredPage():
                    chain.append(change)
                case DroppedPage():
                    dropped.append(block_hash(change.digest))
                case ClearedPages():
                    events.append(pb.KvCacheEvent(cleared=pb.KvCacheCleared()))
        for event in events:
            self._events += 1
            event.event_id = self._events
        return events

    def _stored(self, chain: Sequence[StoredPage]) -> pb.KvBlocksStored:
        first = chain[0]
        return pb.KvBlocksStored(
            blocks=[
                pb.KvBlock(
                    block_hash=block_hash(page.digest),
                    token_ids=page.tokens,
                    block_size=self._page_tokens,
                )
                for page in chain
            ],
            parent_block_hash=None if first.parent is None else block_hash(first.parent),
            cache_salt=first.salt.removeprefix(SHARED) or None,
        )


def block_hash(digest: bytes) -> int:
    """Returns a page's digest as the protocol's 64 bits; enough to route by, not to share by."""
    return int.from_bytes(digest[:8], "big", signed=True)
