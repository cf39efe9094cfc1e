"""A seeded simulation of the whole engine under faults, with a clock that is turned by hand.

Everything between ``Engine.submit`` and the events of a stream is the production code, driven one
turn at a time without its thread; only the clock and the runner are doubles (``jaxserve.testing``).
A seed decides the sizes, the requests and every fault, so a failure replays exactly:

    python -m tests.simulator.simulate --seed 17 --steps 5000

What one client is owed is in ``client.py``. After every turn the pages are counted against their
holders, and what must have ended by now is looked for; the engine's own ``check_integrity`` runs
every ``INTEGRITY_EVERY`` turns.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from jaxserve.engine.data_shard import DataShard
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.stream import TokenStream
from jaxserve.errors import (
    DuplicateRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestNotFoundError,
)
from jaxserve.testing import ManualClock, counting_engine
from tests.simulator.client import Client

VOCAB = 509
POISON = 508
"""A context that holds this token has logits that are not finite."""
END = 507
INTEGRITY_EVERY = 64
MAX_AGE_TURNS = 6000
"""No request may live longer; the oldest of a million turns lived for about a third of it."""


class StepFault(Exception):
    """What a step raises when it is told to."""


@dataclass(frozen=True)
class World:
    """What one seed decides beforehand."""

    data_shards: int
    max_rows: int
    """Of each shard, like the pages."""
    page_tokens: int
    num_pages: int
    context_tokens: int
    step_tokens: int
    prefix_cache: bool
    crowd: int
    """Requests that clients try to keep alive."""
    fault_rate: float
    """Per turn."""
    failure_rate: float
    """Steps that raise, per turn."""
    slow_share: float
    """Of the clients."""

    @classmethod
    def from_seed(cls, rng: random.Random) -> World:
        """Draws a world: 1 to 3 data shards of at most 8 rows and 16 to 64 pages."""
        page_tokens = rng.choice((2, 4, 8))
        num_pages = rng.choice((17, 17, 25, 33, 65))
        max_rows = rng.choice((2, 3, 4, 8, 8))
        data_shards = rng.choice((1, 1, 1, 2, 3))
        return cls(
            data_shards=data_shards,
            max_rows=max_rows,
            page_tokens=page_tokens,
            num_pages=num_pages,
            context_tokens=min(48, (num_pages - 1) * page_tokens),
            step_tokens=max_rows + rng.choice((1, 4, 8, 24)),
            prefix_cache=rng.random() < 0.8,
            crowd=data_shards * rng.choice((4, 8, 12, 16)),
            fault_rate=rng.choice((0.0, 0.02, 0.1)),
            failure_rate=rng.choice((0.0, 0.005, 0.02)),
            slow_share=rng.choice((0.0, 0.2)),
        )


class Simulation:
    """One seed: an engine, its clients and its misfortunes."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.world = world = World.from_seed(rng)
        self.clock = ManualClock()
        self.engine, self.runner = counting_engine(
            data_shards=world.data_shards,
            max_rows=world.max_rows,
            page_tokens=world.page_tokens,
            num_pages=world.num_pages,
            context_tokens=world.context_tokens,
            vocab_size=VOCAB,
            end_ids=(END,),
            step_tokens=world.step_tokens,
            prefix_cache=world.prefix_cache,
            overlap=seed % 6 != 5,
            clock=self.clock,
            max_waiting_requests=rng.choice((4, 8, 64)),
            max_waiting_tokens=rng.choice((60, 150, 10_000)),
        )
        self.runner.poison_token = POISON
        self.turn = 0
        self.accepted = self.choices = self.refused = self.ended = self.oldest = 0
        self.failures = 0
        self.live: dict[TokenStream, Client] = {}
        self._names: dict[str, Client] = {}
        self._ready: dict[Client, None] = {}
        self._due: list[Client] = []
        """Clients whose request must be over after the next turn."""
        self._deadlines: list[tuple[float, int, Client]] = []
        self._running: set[int] = set()
        self._steps_at_failure = -1
        """Steps that had run when one last raised: three in a row would end the engine."""
        # Few beginnings, so that prefixes are shared often; what follows them is random.
        self._beginnings = [
            [rng.randrange(VOCAB - 2) for _ in range(rng.randrange(1, 20))] for _ in range(6)
        ]
        self._spoken: Counter[tuple[str, tuple[int, ...]]] = Counter()
        """How often each (salt, first page of the prompt) has been sent so far."""

    # -- one turn ------------------------------------------------------------------------------

    def step(self, *, faults: bool = True) -> None:
        """Lets clients act, the engine turn, and clients read; then checks what must hold."""
        self.turn += 1
        if faults:
            if self.rng.random() < 0.2:
                for _ in range(self.rng.randrange(1, 5)):
                    self._arrive()
            self._misbehave()
        self.clock.now += 0.05
        self.engine.run_once()
        self._check_pages()
        self._check_order()
        self._check_due()
        self._read(faults)
        if self.turn % INTEGRITY_EVERY == 0:
            self.engine.check_integrity()
            self._check_age()

    def advance(self, steps: int) -> None:
        """Runs for ``steps`` turns."""
        logger = logging.getLogger("jaxserve.engine")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # Steps that fail on purpose are not news.
        try:
            for _ in range(steps):
                self.step()
        finally:
            logger.setLevel(level)

    def run(self, steps: int) -> None:
        """Runs for ``steps`` turns, then lets everything finish without faults."""
        self.advance(steps)
        self.finish()

    def finish(self) -> None:
        """Liveness: once the faults stop, every request ends; then nothing is held."""
        self.runner.on_dispatch = self.runner.on_wait = None
        for _ in range(MAX_AGE_TURNS):
            if not self.live:
                break
            self.step(faults=False)
        assert not self.live, f"{len(self.live)} requests never ended"
        self.engine.run_once()
        assert self.engine.idle, "the engine holds requests that have ended"
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert stats.pages_free + stats.pages_cached == stats.pages_total, "pages leaked"
        assert stats.requests_waiting == stats.tokens_waiting == stats.rows_running == 0
        assert stats.requests_accepted_total == self.accepted == self.ended
        assert stats.requests_rejected_total == self.refused
        assert sum(stats.requests_finished_total.values()) == self.choices

    def digest(self) -> str:
        """Returns a hash of everything that decides how the simulation goes on."""
        scheduler = self.engine.scheduler
        running = [(s.rank, s.row, s.pages, s.computed, s.tokens) for s in scheduler.running]
        waiting = sorted((s.rank, s.tokens) for s in scheduler.waiting_sequences())
        state = (self.turn, self.clock.now, running, waiting, self.rng.getstate())
        return hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()

    # -- requests ------------------------------------------------------------------------------

    def _arrive(self) -> None:
        if len(self.live) >= self.world.crowd:
            return
        request = self._request(f"r{self.accepted + self.refused}")
        try:
            stream = self.engine.submit(request, self)
        except QueueFullError as error:
            self._check_refusal(request, error)
        else:
            self._welcome(request, stream)

    def _check_refusal(self, request: Request, error: QueueFullError) -> None:
        self.refused += 1
        prompts = sum(len(client.request.prompt) for client in self.live.values())
        held = len(self.live) if error.what == "requests" else prompts + len(request.prompt)
        assert held >= error.value >= error.limit, f"refused too early: {error}"

    def _welcome(self, request: Request, stream: TokenStream) -> None:
        size = self.world.page_tokens
        context = (*request.prompt, *request.resume)
        shared = request.cache_salt if self.world.prefix_cache else request.request_id
        self._spoken[shared, context[:size]] += 1
        client = Client(
            request,
            stream,
            number=self.accepted,
            now=self.clock.now,
            turn=self.turn,
            vocab_size=VOCAB,
            context_tokens=self.world.context_tokens,
            end_id=END,
            poison=POISON,
            may_hit=partial(self._may_hit, shared, context[:size]),
        )
        client.slow = self.rng.random() < self.world.slow_share
        client.step_failures = self.failures
        self.accepted += 1
        self.choices += request.sampling.n
        self.live[stream] = self._names[request.request_id] = client
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, client.number, client))

    def _may_hit(self, salt: str, first_page: tuple[int, ...]) -> bool:
        """Whether another request may have left this page under this salt."""
        shorter = any((salt, first_page[:end]) in self._spoken for end in range(1, len(first_page)))
        return shorter or self._spoken[salt, first_page] > 1

    def _request(self, name: str) -> Request:
        rng, context = self.rng, self.world.context_tokens
        prompt = list(rng.choice(self._beginnings))
        prompt += [rng.randrange(VOCAB - 2) for _ in range(rng.choice((0, 1, 2, 5, 12)))]
        if rng.random() < 0.03:
            prompt[rng.randrange(len(prompt))] = POISON
        prompt = prompt[: context - 1]
        room = context - len(prompt)
        sampling = self._sampling(prompt, room)
        resume: Sequence[int] = ()
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        if sampling.n == 1 and limit > 1 and rng.random() < 0.1:
            resume = self._first_tokens(prompt, sampling, rng.randrange(1, limit))
        return Request(
            request_id=name,
            prompt=prompt,
            sampling=sampling,
            resume=resume,
            priority=rng.choice((0, 0, 0, -2, 3)),
            cache_salt=rng.choice(("", "", "red", "blue", name)),
            deadline_s=self.clock.now + rng.uniform(0.1, 8) if rng.random() < 0.1 else None,
        )

    def _sampling(self, prompt: list[int], room: int) -> SamplingParams:
        rng = self.rng
        max_tokens = None if rng.random() < 0.1 else rng.randrange(1, min(room, 24) + 1)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(2**31),
            n=rng.choice((2, 3)) if rng.random() < 0.12 else 1,
        )
        kind = rng.random()
        if kind < 0.7:
            return sampling
        fields = dict(vars(sampling))
        if kind < 0.8:  # A stop token that will really come up, maybe too early to count.
            tokens = self._first_tokens(prompt, sampling, min(room, 12))
            fields["stop_token_ids"] = (rng.choice(tokens or [END]),)
            fields["min_tokens"] = rng.randrange(0, min(max_tokens or room, 4) + 1)
        elif kind < 0.85:
            fields["presence_penalty"] = 0.5
        elif kind < 0.95:
            fields["prompt_logprobs"] = 1
        else:
            fields["ignore_eos"] = True
        return SamplingParams(**fields)

    def _first_tokens(self, prompt: list[int], sampling: SamplingParams, count: int) -> list[int]:
        """Returns what the answer begins with, up to where it would end by itself."""
        total = sum((place + 1) * token for place, token in enumerate(prompt))
        tokens: list[int] = []
        salt = sampling.seed or 0 if sampling.temperature else 0
        for place in range(len(prompt), len(prompt) + count):
            token = (1 + total + salt) % VOCAB
            if token in (END, POISON):
                break
            total += (place + 1) * token
            tokens.append(token)
        return tokens

    # -- misfortunes ---------------------------------------------------------------------------

    def _misbehave(self) -> None:
        rng, world = self.rng, self.world
        if rng.random() < world.failure_rate:
            self._plan_failure()
        if rng.random() >= world.fault_rate or not self.live:
            return
        client = rng.choice(list(self.live.values()))
        name = client.request.request_id
        match rng.randrange(5):
            case 0:
                client.close(stays=False)
                self._due.append(client)
            case 1:
                client.close(stays=True)
                self._due.append(client)
            case 2:
                if not client.stream.finished:
                    self.engine.abort(name)
                    client.cancelled = True
                    self._due.append(client)
            case 3:
                client.stop_one(rng)
            case _:
                self._send_nonsense(client)

    def _plan_failure(self) -> None:
        steps = self.engine.stats().steps_total
        if steps > self._steps_at_failure:
            self._steps_at_failure = steps
            if self.rng.random() < 0.5:
                self.runner.on_dispatch = lambda _: self._fail()
            else:
                self.runner.on_wait = self._fail

    def _send_nonsense(self, client: Client) -> None:
        """Sends what must be refused without a trace."""
        request = client.request
        if not client.stream.finished:
            _expect(DuplicateRequestError, lambda: self.engine.submit(request, self))
        _expect(RequestNotFoundError, lambda: self.engine.abort("nobody"))
        long = Request(request_id="long", prompt=[1] * self.world.context_tokens)
        _expect(PromptTooLongError, lambda: self.engine.submit(long, self))

    def _fail(self) -> None:
        self.runner.on_dispatch = self.runner.on_wait = None
        self.failures += 1
        raise StepFault

    # -- reading -------------------------------------------------------------------------------

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Takes the place of a front end: what woke up is read after the turn."""
        for stream in streams:
            client = self.live.get(stream)
            if client is not None:
                self._ready[client] = None

    def _read(self, faults: bool) -> None:
        ready, self._ready = self._ready, {}
        for client in ready:
            if client.slow and faults and self.rng.random() < 0.97:
                self._ready[client] = None
                continue
            if not client.gone:
                client.read(self.clock.now, self.failures)
                if client.over:
                    self._forget(client)

    def _forget(self, client: Client) -> None:
        del self.live[client.stream]
        self.ended += 1
        self.oldest = max(self.oldest, self.turn - client.turn)

    # -- what must hold ------------------------------------------------------------------------

    def _check_pages(self) -> None:
        for shard in self.engine.scheduler.shards:
            self._check_shard(shard)

    def _check_shard(self, shard: DataShard) -> None:
        pool, size = shard.pool, self.world.page_tokens
        holders = [0] * (pool.total + 1)
        for sequence in shard.running:
            for page in sequence.pages:
                holders[page] += 1
        assert holders[0] == 0, "the null page was handed out"
        used = len(holders) - holders.count(0)
        assert pool.free + pool.cached + used == pool.total, (
            f"free {pool.free} + cached {pool.cached} + used {used} != total {pool.total}"
        )
        held = list(pool._references)
        assert held == holders, f"references {held}, holders {holders}"
        for sequence in shard.running:
            for page in sequence.pages[sequence.committed // size :]:
                assert holders[page] == 1, f"page {page} is writable in two tables"

    def _check_order(self) -> None:
        """First come, first served, under priorities: nobody waits who is before one let in."""
        scheduler = self.engine.scheduler
        numbers = {id(sequence): sequence for sequence in scheduler.running}
        new = [sequence for key, sequence in numbers.items() if key not in self._running]
        self._running = set(numbers)
        # Other choices than the first are queued after the plan, when the prompt is there.
        waiting = [s for s in scheduler.waiting_sequences() if s.choice == 0] if new else []
        if waiting:
            worst = max(self._order(sequence.live.request.request_id) for sequence in new)
            best = min(self._order(sequence.live.request.request_id) for sequence in waiting)
            assert worst <= best, f"{worst} was let in before {best}"

    def _order(self, name: str) -> tuple[float, int]:
        return self._names[name].order

    def _check_due(self) -> None:
        for client in self._due:
            name = client.request.request_id
            assert client.stream.finished, f"{name} was cancelled and goes on"
            if client.gone and client.stream in self.live:
                self._forget(client)  # Whoever is gone reads nothing any more.
        self._due.clear()
        while self._deadlines and self._deadlines[0][0] <= self.clock.now:
            client = heapq.heappop(self._deadlines)[2]
            assert client.stream.finished, f"{client.request.request_id} is past its deadline"

    def _check_age(self) -> None:
        for client in self.live.values():
            age = self.turn - client.turn
            assert client.stream.finished or age < MAX_AGE_TURNS, f"starved for {age} turns"
            assert client.stream.pending <= client.most_events, "a slow client grows"


def _expect(error: type[Exception], action: Callable[[], object]) -> None:
    try:
        action()
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")


def simulate(seed: int, steps: int) -> Simulation:
    """Runs one seed; a failure names the seed and the command that replays it."""
    simulation = Simulation(seed)
    try:
        simulation.run(steps)
    except BaseException as error:
        error.add_note(
            f"seed {seed} failed in turn {simulation.turn}; replay it with\n"
            f"    python -m tests.simulator.simulate --seed {seed} --steps {steps}"
        )
        raise
    return simulation


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs seeds from the command line; prints what they amounted to."""
    parser = argparse.ArgumentParser(description="Runs the engine under seeded faults.")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other")
    parser.add_argument("--steps", type=int, default=5000, help="turns with faults, per seed")
    options = parser.parse_args(arguments)
    start, turns, accepted, oldest = time.monotonic(), 0, 0, 0
    for seed in range(options.seed, options.seed + options.seeds):
        simulation = simulate(seed, options.steps)
        turns += simulation.turn
        accepted += simulation.accepted
        oldest = max(oldest, simulation.oldest)
    print(
        f"seeds={options.seeds} steps={turns} requests={accepted} oldest_turns={oldest} "
        f"seconds={time.monotonic() - start:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
