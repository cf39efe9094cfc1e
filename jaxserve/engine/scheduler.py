"""Decides what the next step computes, and who waits.

One ``plan`` in order:

1. every running sequence whose prompt is done gets one decode place, best first; when a page is
   needed and none is left, the worst running sequence is preempted: its pages go back and it is
   computed again later (recomputation; nothing is swapped);
2. prompt chunks of running sequences, then of newly admitted ones, fill what is left of the step's
   token budget, or the longest prompt call.

Order is arrival time plus ``priority * PRIORITY_SECONDS``. A request therefore overtakes those of
the next worse priority only if they arrived less than that long before it, so nobody starves. The
head of the queue is never passed over by a smaller request.

Admission takes pages for the whole prompt at once and holds back one page per running sequence,
which makes preemption rare. It also chooses the data shard (``data_shard.py``): the one that knows
most of the prompt, unless it is much busier than another, then the least busy. What is preempted is
computed anew and may go elsewhere. Nothing here knows the device, the clock (``now`` comes in) or a
protocol.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from jaxserve.engine.data_shard import DataShard
from jaxserve.engine.plan import SchedulerConfig, StepPlan
from jaxserve.engine.sequence import LiveSequence

PRIORITY_SECONDS = 10.0  # Waiting this long is worth one step of priority.
BUSIER_ROWS = 4
"""A shard with more than twice the rows of the least busy one, and so many more, is passed over
even by prompts that it knows: all rows of a step wait for the shard with the longest."""


class Scheduler:
    """Owns the queue and, through the shards, rows and pages. Engine thread only."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Makes empty shards and an empty queue."""
        self.config = config
        self.shards = [DataShard(number, config) for number in range(config.data_shards)]
        self.preemptions = 0
        self._queue: list[tuple[tuple[float, int, int], LiveSequence]] = []
        """A heap. Entries of sequences that ended while they waited are dropped later."""
        self._waiting = 0

    @property
    def running(self) -> list[LiveSequence]:
        """Every sequence that has a row, shard after shard, best first."""
        return [sequence for shard in self.shards for sequence in shard.running]

    # -- the queue -----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self._waiting

    def waiting_sequences(self) -> list[LiveSequence]:
        """Returns the queue, in no particular order."""
        return [sequence for _, sequence in self._queue if not sequence.done]

    def enqueue(self, sequence: LiveSequence) -> None:
        """Puts a sequence into the queue, at its rank."""
        sequence.queued = True
        heapq.heappush(self._queue, (sequence.rank, sequence))
        self._waiting += 1

    def finish(self, sequence: LiveSequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages and row back."""
        assert not sequence.done, "a sequence ended twice"
        sequence.done = True
        if sequence.row >= 0:
            self.shards[sequence.shard].vacate(sequence)
        elif sequence.queued:
            self._waiting -= 1
            self._compact_queue()

    def _compact_queue(self) -> None:
        # Entries of ended sequences are dropped when there are more of them than of live ones.
        if len(self._queue) > 64 and len(self._queue) > 2 * self._waiting:
            self._queue = [entry for entry in self._queue if not entry[1].done]
            heapq.heapify(self._queue)

    # -- planning ------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Decides the next step; ``now`` stamps the first scheduling of a request."""
        plan = StepPlan()
        room: list[_Room] = []
        preempted: list[LiveSequence] = []
        for shard in self.shards:
            decoded, victims = shard.plan_decode(plan)
            preempted += victims
            tokens = min(self.config.step_tokens - decoded, self.config.longest_chunk)
            room.append(_Room(tokens, self.config.max_chunks))
        for sequence in preempted:
            self._requeue(sequence)
        for shard, left in zip(self.shards, room, strict=True):
            chunks, left.tokens = shard.plan_prompts(plan, left.tokens)
            left.chunks -= chunks
        # A plan that preempts admits nobody. What it preempted may have a token in flight, which
        # has to be known before that sequence is computed again, and nobody else may pass it.
        if not preempted:
            self._admit(plan, room, now)
        return plan

    def _requeue(self, sequence: LiveSequence) -> None:
        self.preemptions += 1
        self.enqueue(sequence)

    def preempt_all(self) -> None:
        """Sends every running sequence back to the queue: the pools' contents were lost.

        What they have in flight is lost too, and is computed again like everything else.
        """
        for shard in self.shards:
            for sequence in shard.running.copy():
                shard.vacate(sequence)
                self._requeue(sequence)
            shard.prefix.clear()

    def _admit(self, plan: StepPlan, room: list[_Room], now: float) -> None:
        while self._queue:
            sequence = self._queue[0][1]
            if sequence.done:
                heapq.heappop(self._queue)
                continue
            choice = self._choose_shard(sequence, room)
            if choice is None:
                break
            shard, hit = choice
            heapq.heappop(self._queue)
            self._waiting -= 1
            sequence.queued = False
            shard.admit(sequence, hit)
            live = sequence.live
            if live.scheduled_s is None:
                live.scheduled_s = now
                live.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
            plan.admitted.append(sequence)
            left = room[shard.number]
            left.tokens -= shard.add_chunk(plan, sequence, left.tokens)
            left.chunks -= 1

    def _choose_shard(
        self, sequence: LiveSequence, room: list[_Room]
    ) -> tuple[DataShard, list[int]] | None:
        """The shard that can take a waiting sequence now, and the pages that it knows of it."""
        open_shards = [
            shard
            for shard, left in zip(self.shards, room, strict=True)
            if shard.has_row and left.tokens > 0 and left.chunks > 0
        ]
        found = [
            (shard, hit)
            for shard in open_shards
            if (hit := shard.find_prefix(sequence)) is not None
        ]
        if not found:
            return None
        least = min(len(shard.running) for shard, _ in found)
        calm = [
            (shard, hit) for shard, hit in found if len(shard.running) <= 2 * least + BUSIER_ROWS
        ]
        return min(calm, key=lambda choice: (-len(choice[1]), len(choice[0].running)))

    # -- publishing ----------------------------------------------------------------------------

    def commit(self, sequence: LiveSequence, committed: int) -> None:
        """Records that positions below ``committed`` are good, and indexes their full pages."""
        self.shards[sequence.shard].commit(sequence, committed)

    def distrust(self, sequence: LiveSequence) -> None:
        """Takes the pages of a sequence out of the prefix cache: they may hold a NaN."""
        self.shards[sequence.shard].prefix.discard(sequence.pages)

    def check_integrity(self) -> None:
        """Verifies the page ledgers, the rows and the queue's count.

        Raises:
            AssertionError: with the numbers that do not add up.
        """
        for shard in self.shards:
            shard.check_integrity()
        waiting = self.waiting_sequences()
        assert len(waiting) == self._waiting, f"{len(waiting)} wait, {self._waiting} are counted"
        for sequence in waiting:
            assert not sequence.pages, "a waiting sequence holds pages"


@dataclass(slots=True)
class _Room:
    """What a step has left for prompts in one shard."""

    tokens: int
    chunks: int
