"""One data shard: its pages, its prefix cache, its rows, and the sequences that run in them.

A mesh with ``data=2`` holds the model twice, and each copy has a pool and rows of its own: a page
number or a prefix hit means nothing outside its shard. Which shard a sequence goes to is decided in
``scheduler.py``, when it is admitted; here it is planned until it ends or is preempted. Row numbers
count through all shards, each with a null row behind its own.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from jaxserve.engine.pages import PagePool
from jaxserve.engine.plan import Chunk, SchedulerConfig, StepPlan
from jaxserve.engine.prefix import PrefixCache
from jaxserve.engine.sequence import LiveSequence

_rank = attrgetter("rank")


class DataShard:
    """Owns, through the pool, the pages of one shard. Engine thread only."""

    def __init__(self, number: int, config: SchedulerConfig) -> None:
        """Makes an empty pool; ``number`` counts from 0 along the data axis."""
        self.number = number
        self.pool = PagePool(config.num_pages)
        self.prefix = PrefixCache(self.pool, config.page_tokens, retain=config.prefix_cache)
        self.running: list[LiveSequence] = []
        """Best first: in the order of ``LiveSequence.rank``."""
        self.max_rows = config.max_rows
        self._config = config
        first = number * (config.max_rows + 1)
        self._all_rows = range(first, first + config.max_rows)
        self._rows = list(reversed(self._all_rows))

    # -- planning ------------------------------------------------------------------------------

    def plan_decode(self, plan: StepPlan) -> tuple[int, list[LiveSequence]]:
        """Gives every running sequence that is past its prompt a place in the step.

        Returns:
            How many, and those that were preempted to make room: their pages and rows are given
            back, and they have to be queued again.
        """
        page_tokens = self._config.page_tokens
        decode, rows, positions = plan.decode, plan.decode_rows, plan.decode_positions
        before = len(decode)
        preempted: list[LiveSequence] = []
        for sequence in self.running.copy():
            position = sequence.computed
            if position < sequence.target:
                continue  # Still in its prompt.
            if sequence.row < 0:
                break  # Preempted a moment ago, and so are all that are worse.
            if sequence.prompt_tokens + sequence.sampled >= sequence.max_total:
                continue  # The token in flight is its last.
            if position >= len(sequence.pages) * page_tokens and not self._grow(
                sequence, plan, preempted
            ):
                break  # It was the worst one itself.
            decode.append(sequence)
            rows.append(sequence.row)
            positions.append(position)
            sequence.computed = position + 1
            sequence.sampled += 1
        return len(decode) - before, preempted

    def _grow(self, sequence: LiveSequence, plan: StepPlan, preempted: list[LiveSequence]) -> bool:
        """Adds one page, preempting the worst until there is one; False when it was the worst."""
        while True:
            pages = self.pool.allocate(1)
            if pages is not None:
                plan.grown.append((sequence.row, len(sequence.pages), pages[0]))
                sequence.pages += pages
                return True
            victim = self.running[-1]
            self.vacate(victim)
            preempted.append(victim)
            if victim is sequence:
                return False

    def plan_prompts(self, plan: StepPlan, budget: int) -> tuple[int, int]:
        """Adds chunks of running prompts; returns the chunks added and the budget left."""
        chunks = 0
        for sequence in self.running:
            if budget <= 0 or chunks >= self._config.max_chunks:
                break
            if sequence.computed < sequence.target:
                budget -= self.add_chunk(plan, sequence, budget)
                chunks += 1
        return chunks, budget

    def add_chunk(self, plan: StepPlan, sequence: LiveSequence, budget: int) -> int:
        """Plans the next prompt tokens of a running sequence; returns how many."""
        left = sequence.target - sequence.computed
        count = min(left, budget, self._config.longest_chunk)
        last = count == left
        plan.chunks.append(Chunk(sequence, sequence.row, sequence.computed, count, last))
        sequence.computed += count
        if last:
            sequence.sampled += 1
        return count

    # -- admission -----------------------------------------------------------------------------

    @property
    def has_row(self) -> bool:
        """True when a sequence could be given a row."""
        return bool(self._rows)

    def find_prefix(self, sequence: LiveSequence) -> list[int] | None:
        """The pages here that a waiting sequence could share; None when there is no room for it.

        Nothing is taken yet.
        """
        tokens, size = sequence.tokens, self._config.page_tokens
        hit: list[int] = []
        if sequence.prompt_logprobs is None:
            self.prefix.extend_chain(sequence.digests, tokens, sequence.live.salt)
            # At least one token is left to compute, because its logits are needed.
            hit = self.prefix.find(sequence.digests[: (len(tokens) - 1) // size])
        needed = -(-len(tokens) // size) - len(hit)
        # Held back: one page per running sequence, so that decoding can go on for a while.
        # With nothing running that is none, so a prompt as large as the pool can run alone.
        room = self.pool.available_beside(hit) - len(self.running)
        return hit if needed <= room else None

    def admit(self, sequence: LiveSequence, hit: list[int]) -> None:
        """Gives a sequence its row, the shared pages ``hit`` and new ones for the rest."""
        tokens, size = sequence.tokens, self._config.page_tokens
        self.pool.share(hit)
        needed = -(-len(tokens) // size) - len(hit)
        fresh = self.pool.allocate(needed)
        assert fresh is not None, f"{needed} of {self.pool.available} available pages not to be had"
        sequence.pages = hit + fresh
        sequence.computed = sequence.committed = len(hit) * size
        sequence.indexed = len(hit)
        if sequence.prompt_logprobs is None:
            self.prefix.count_lookup(len(tokens), sequence.computed)
        else:
            sequence.prompt_logprobs = [None]  # What a preemption interrupted starts afresh.
        sequence.target = len(tokens)
        sequence.sampled = sequence.output_tokens
        sequence.shard = self.number
        sequence.row = self._rows.pop()
        insort(self.running, sequence, key=_rank)

    # -- publishing ----------------------------------------------------------------------------

    def commit(self, sequence: LiveSequence, committed: int) -> None:
        """Records that positions below ``committed`` are good, and indexes their full pages."""
        sequence.committed = committed
        size = self._config.page_tokens
        full = committed // size
        if full > sequence.indexed:
            digests, salt = sequence.digests, sequence.live.salt
            self.prefix.extend_chain(digests, sequence.tokens, salt)
            for index in range(sequence.indexed, full):
                self.prefix.insert(
                    digests[index],
                    sequence.pages[index],
                    parent=digests[index - 1] if index else None,
                    tokens=sequence.tokens[index * size : (index + 1) * size],
                    salt=salt,
                )
            sequence.indexed = full

    def vacate(self, sequence: LiveSequence) -> None:
        """Takes the pages and the row of a running sequence back."""
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        pages, sequence.pages = sequence.pages, []
        self.pool.release(pages)
        self.prefix.released(pages)

    def check_integrity(self) -> None:
        """Verifies the page ledger and the rows.

        Raises:
            AssertionError: with the numbers that do not add up.
        """
        self.pool.check_integrity([sequence.pages for sequence in self.running])
        self.prefix.check_integrity()
        rows = [sequence.row for sequence in self.running] + self._rows
        assert sorted(rows) == list(self._all_rows), f"rows do not add up: {rows}"
        for sequence in self.running:
            assert sequence.shard == self.number, "a sequence runs in another shard than its own"
            # Pages that more than one sequence holds are full and never written again.
            writable = sequence.pages[sequence.committed // self._config.page_tokens :]
            shared = [page for page in writable if self.pool.references(page) > 1]
            assert not shared, f"pages {shared} are writable in two tables"
