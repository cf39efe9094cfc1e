"""Decides what the next step computes, and who waits.

One ``plan`` in order:

1. every running sequence whose prompt is done gets one decode place, best first; when a page is
   needed and none is left, the worst running sequence is preempted: its pages go back and it is
   computed again later (recomputation; nothing is swapped);
2. prompt chunks of running sequences, then of newly admitted ones, fill what is left of the step's
   token budget.

Order is arrival time plus ``priority * PRIORITY_SECONDS``. A request therefore overtakes those of
the next worse priority only if they arrived less than that long before it, so nobody starves. The
head of the queue is never passed over by a smaller request.

Admission takes pages for the whole prompt at once and holds back one page per running sequence,
which makes preemption rare. Device rows are handed out here too. Nothing here knows the device,
the clock (``now`` comes in) or a protocol.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix import PrefixCache
from jaxserve.engine.sequence import LiveSequence

PRIORITY_SECONDS = 10.0  # Waiting this long is worth one step of priority.
_rank = attrgetter("rank")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one step and of the pool."""

    max_rows: int
    """Sequences running at once."""
    step_tokens: int
    """Tokens of one step at most, decode rows included; above ``max_rows``. Small: prompts take
    long. Large: running answers stutter while a prompt is computed."""
    max_chunks: int
    """Prompt chunks of one step at most."""
    chunk_tokens: int | None = None
    """Tokens of one chunk at most: the longest prefill bucket. None: ``step_tokens``."""
    page_tokens: int
    """Tokens in one page."""
    num_pages: int
    """Pages in the pool, counting the null page."""
    prefix_cache: bool = True
    """Share pages between requests with equal prefixes (and salts)."""

    @property
    def longest_chunk(self) -> int:
        """Tokens that one chunk may have."""
        return min(self.step_tokens, self.chunk_tokens or self.step_tokens)

    def __post_init__(self) -> None:
        """Refuses what could never plan a prompt."""
        for name in ("max_rows", "max_chunks", "chunk_tokens", "page_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.step_tokens <= self.max_rows:
            raise ValueError(
                f"step_tokens is {self.step_tokens} and max_rows {self.max_rows}: full rows would "
                "leave no place for prompts; raise step_tokens above max_rows"
            )


@dataclass(slots=True)
class Chunk:
    """Prompt tokens ``start`` to ``start + count`` of one sequence; ``last`` samples a token."""

    sequence: LiveSequence
    row: int
    start: int
    count: int
    last: bool


@dataclass(slots=True)
class StepPlan:
    """What one step computes. Rows are copied: a sequence may lose its row before it publishes."""

    decode: list[LiveSequence] = field(default_factory=list[LiveSequence])
    decode_rows: list[int] = field(default_factory=list[int])
    decode_positions: list[int] = field(default_factory=list[int])
    """Position of the token that each decode row feeds in."""
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    admitted: list[LiveSequence] = field(default_factory=list[LiveSequence])
    """Sequences that got their row in this plan: their row data has to be set up."""
    grown: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(row, table index, page) of every page added to a running row since the last plan."""

    @property
    def empty(self) -> bool:
        """True when there is nothing to compute."""
        return not self.decode and not self.chunks

    def sequences(self) -> list[LiveSequence]:
        """Every sequence that the step computes something for."""
        return [*self.decode, *(chunk.sequence for chunk in self.chunks)]


class Scheduler:
    """Owns the queue, the rows and, through the pool, the pages. Engine thread only."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Makes an empty pool and an empty queue."""
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.prefix = PrefixCache(self.pool, config.page_tokens, retain=config.prefix_cache)
        self.running: list[LiveSequence] = []
        """Best first: in the order of ``LiveSequence.rank``."""
        self.preemptions = 0
        self._queue: list[tuple[tuple[float, int, int], LiveSequence]] = []
        """A heap. Entries of sequences that ended while they waited are dropped later."""
        self._waiting = 0
        self._longest_chunk = config.longest_chunk
        self._rows = list(range(config.max_rows - 1, -1, -1))

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
            self._vacate(sequence)
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
        preemptions = self.preemptions
        self._plan_decode(plan)
        budget = self.config.step_tokens - len(plan.decode)
        budget = self._plan_prompts(plan, budget)
        # A plan that preempts admits nobody. What it preempted may have a token in flight, which
        # has to be known before that sequence is computed again, and nobody else may pass it.
        if self.preemptions == preemptions:
            self._admit(plan, budget, now)
        return plan

    def _plan_decode(self, plan: StepPlan) -> None:
        page_tokens = self.config.page_tokens
        decode, rows, positions = plan.decode, plan.decode_rows, plan.decode_positions
        for sequence in self.running.copy():
            position = sequence.computed
            if position < sequence.target:
                continue  # Still in its prompt.
            if sequence.row < 0:
                break  # Preempted a moment ago, and so are all that are worse.
            if sequence.prompt_tokens + sequence.sampled >= sequence.max_total:
                continue  # The token in flight is its last.
            if position >= len(sequence.pages) * page_tokens and not self._grow(sequence, plan):
                break  # It was the worst one itself.
            decode.append(sequence)
            rows.append(sequence.row)
            positions.append(position)
            sequence.computed = position + 1
            sequence.sampled += 1

    def _grow(self, sequence: LiveSequence, plan: StepPlan) -> bool:
        """Adds one page, preempting the worst until there is one; False when it was the worst."""
        while True:
            pages = self.pool.allocate(1)
            if pages is not None:
                plan.grown.append((sequence.row, len(sequence.pages), pages[0]))
                sequence.pages += pages
                return True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False

    def _preempt(self, victim: LiveSequence) -> None:
        self._vacate(victim)
        self.preemptions += 1
        self.enqueue(victim)

    def preempt_all(self) -> None:
        """Sends every running sequence back to the queue: the pool's contents were lost.

        What they have in flight is lost too, and is computed again like everything else.
        """
        for sequence in self.running.copy():
            self._preempt(sequence)
        self.prefix.clear()

    def _plan_prompts(self, plan: StepPlan, budget: int) -> int:
        for sequence in self.running:
            if budget <= 0 or len(plan.chunks) >= self.config.max_chunks:
                break
            if sequence.computed < sequence.target:
                budget -= self._add_chunk(plan, sequence, budget)
        return budget

    def _admit(self, plan: StepPlan, budget: int, now: float) -> None:
        while (
            self._queue and self._rows and budget > 0 and len(plan.chunks) < self.config.max_chunks
        ):
            sequence = self._queue[0][1]
            if sequence.done:
                heapq.heappop(self._queue)
                continue
            if not self._take_pages(sequence):
                break
            heapq.heappop(self._queue)
            self._waiting -= 1
            sequence.queued = False
            sequence.target = len(sequence.tokens)
            sequence.sampled = sequence.output_tokens
            sequence.row = self._rows.pop()
            insort(self.running, sequence, key=_rank)
            live = sequence.live
            if live.scheduled_s is None:
                live.scheduled_s = now
                live.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
            plan.admitted.append(sequence)
            budget -= self._add_chunk(plan, sequence, budget)

    def _take_pages(self, sequence: LiveSequence) -> bool:
        """Takes shared pages for the known prefix and new ones for the rest; or nothing."""
        tokens, size = sequence.tokens, self.config.page_tokens
        hit: list[int] = []
        if sequence.prompt_logprobs is None:
            self.prefix.extend_chain(sequence.digests, tokens, sequence.live.salt)
            # At least one token is left to compute, because its logits are needed.
            hit = self.prefix.match(sequence.digests[: (len(tokens) - 1) // size])
        needed = -(-len(tokens) // size) - len(hit)
        # Held back: one page per running sequence, so that decoding can go on for a while.
        # With nothing running that is none, so a prompt as large as the pool can run alone.
        if self.pool.available < needed + len(self.running):
            self._give_back(hit)
            return False
        fresh = self.pool.allocate(needed)
        assert fresh is not None, f"{needed} of {self.pool.available} available pages not to be had"
        sequence.pages = hit + fresh
        sequence.computed = sequence.committed = len(hit) * size
        sequence.indexed = len(hit)
        if sequence.prompt_logprobs is None:
            self.prefix.count_lookup(len(tokens), sequence.computed)
        else:
            sequence.prompt_logprobs = [None]  # What a preemption interrupted starts afresh.
        return True

    def _add_chunk(self, plan: StepPlan, sequence: LiveSequence, budget: int) -> int:
        left = sequence.target - sequence.computed
        count = min(left, budget, self._longest_chunk)
        last = count == left
        plan.chunks.append(Chunk(sequence, sequence.row, sequence.computed, count, last))
        sequence.computed += count
        if last:
            sequence.sampled += 1
        return count

    # -- publishing ----------------------------------------------------------------------------

    def commit(self, sequence: LiveSequence, committed: int) -> None:
        """Records that positions below ``committed`` are good, and indexes their full pages."""
        sequence.committed = committed
        full = committed // self.config.page_tokens
        if full > sequence.indexed:
            self.prefix.extend_chain(sequence.digests, sequence.tokens, sequence.live.salt)
            for index in range(sequence.indexed, full):
                self.prefix.insert(sequence.digests[index], sequence.pages[index])
            sequence.indexed = full

    def distrust(self, sequence: LiveSequence) -> None:
        """Takes the pages of a sequence out of the prefix cache: they may hold a NaN."""
        self.prefix.discard(sequence.pages)

    # -- pages and rows ------------------------------------------------------------------------

    def _vacate(self, sequence: LiveSequence) -> None:
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        pages, sequence.pages = sequence.pages, []
        self._give_back(pages)

    def _give_back(self, pages: list[int]) -> None:
        self.pool.release(pages)
        self.prefix.released(pages)

    def check_integrity(self) -> None:
        """Verifies the page ledger, the rows and the queue's count.

        Raises:
            AssertionError: with the numbers that do not add up.
        """
        self.pool.check_integrity([sequence.pages for sequence in self.running])
        self.prefix.check_integrity()
        rows = [sequence.row for sequence in self.running] + self._rows
        assert sorted(rows) == list(range(self.config.max_rows)), f"rows do not add up: {rows}"
        waiting = self.waiting_sequences()
        assert len(waiting) == self._waiting, f"{len(waiting)} wait, {self._waiting} are counted"
        for sequence in waiting:
            assert not sequence.pages, "a waiting sequence holds pages"
        for sequence in self.running:
            # Pages that more than one sequence holds are full and never written again.
            writable = sequence.pages[sequence.committed // self.config.page_tokens :]
            shared = [page for page in writable if self.pool.references(page) > 1]
            assert not shared, f"pages {shared} are writable in two tables"
