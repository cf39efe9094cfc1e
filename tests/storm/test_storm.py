"""A storm over real gRPC: thousands of random requests against a pool that is far too small.

Everything is the production code: server, engine, compiled programs, sockets. A tiny random model
by default; ``make prove-storm`` takes SmolLM2. The pool holds a few sequences, so requests are
preempted all the time, and the queue is shorter than the number of clients, so some are refused.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jaxserve.assets import default_directory
from jaxserve.engine.engine import Engine
from jaxserve.engine.request import Request
from jaxserve.engine.stream import TokenStream, Waker
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.model_info import ModelInfo
from tests.agreement.ways import engine_over, make_service
from tests.storm.asks import OK, OVERLOAD, Ask, Asks, Behaviour, sample
from tests.storm.clients import PATIENCE_S, Clients, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODEL = os.environ.get("JAXSERVE_STORM_MODEL", "dummy:tiny-llama")
REQUESTS = int(os.environ.get("JAXSERVE_STORM_REQUESTS", "2000"))
OUTPUT_TOKENS = int(os.environ.get("JAXSERVE_STORM_OUTPUT_TOKENS", "56"))
MESH = os.environ.get("JAXSERVE_STORM_MESH", "1x1")
SHARDS = int(MESH.partition("x")[0])
SEED = int(os.environ.get("JAXSERVE_STORM_SEED", "1"))
CONCURRENT = 96
MAX_WAITING = 88
CONTEXT_TOKENS = 256
PAGE_TOKENS = 8
NUM_PAGES = 1 + OUTPUT_TOKENS
"""56 or 32 pages, and 16 rows that would like 2 to 32 each."""
STALL_S = 4.0
"""Far above what clients in this same process may be held up on a busy machine."""
ASKED_AGAIN = 40


@dataclass
class Storm:
    """What is left to look at when it is over."""

    outcomes: dict[int, Outcome]
    side_endings: Counter[str]
    stats: Any
    taken: list[tuple[Request, TokenStream]]
    """Every request that the engine took in."""
    client_tasks: int
    seconds: float
    """Of the storm itself."""
    again: list[tuple[Outcome, Outcome]] = field(default_factory=list)
    """Finished requests, and the same asked alone afterwards."""
    threads_left: set[str] = field(default_factory=set)

    def endings(self, behaviour: Behaviour) -> Counter[str]:
        return Counter(
            outcome.ending
            for outcome in self.outcomes.values()
            if outcome.ask.behaviour is behaviour
        )


@pytest.fixture(scope="module")
def storm(cache_dir: Path) -> Storm:
    """Runs the storm once; the tests look at what it left."""
    before = set(threading.enumerate())
    with (
        make_service(
            MODEL,
            cache_dir,
            default_directory(os.environ),
            mesh=MESH,
            context_tokens=CONTEXT_TOKENS,
            page_tokens=PAGE_TOKENS,
            max_waiting_requests=MAX_WAITING,
        ) as service,
        engine_over(service, num_pages=NUM_PAGES) as engine,
    ):
        ledger = Ledger(engine)
        text = TextEngine(engine, service.text.tokenizer, service.text.template)
        server = ServerThread(text, service.info, ServerConfig(port=0, stall_timeout_s=STALL_S))
        with server as address:
            result = asyncio.run(_weather(address, service.info, server, engine, ledger))
    # gRPC's poller ends with the last object of gRPC, and some of those are in cycles.
    gc.collect()
    result.threads_left = {thread.name for thread in set(threading.enumerate()) - before}
    return result


class Ledger:
    """Notes what an engine takes in and what is closed; the client of a cancelled call cannot."""

    def __init__(self, engine: Engine) -> None:
        self.taken: list[tuple[Request, TokenStream]] = []
        self._closed: set[str] = set()
        self._submit = engine.submit
        engine.submit = self._record

    def is_closed(self, request_id: str) -> bool:
        return request_id in self._closed

    def _record(self, request: Request, waker: Waker) -> TokenStream:
        stream = self._submit(request, waker)
        self.taken.append((request, stream))
        close = stream.close

        def recorded_close() -> None:
            self._closed.add(request.request_id)
            close()

        stream.close = recorded_close
        return stream


async def _weather(
    address: str,
    info: ModelInfo,
    server: ServerThread,
    engine: Engine,
    ledger: Ledger,
) -> Storm:
    clients = Clients(address, ends=info.eos_token_ids, is_given_up=ledger.is_closed)
    loop = server._loop
    assert loop is not None
    try:
        await clients.stats()
        tasks_before = len(asyncio.all_tasks(loop))
        asks = Asks(info, seed=SEED, longest_output=OUTPUT_TOKENS).make(REQUESTS)
        start_s = time.perf_counter()
        await clients.storm(asks, concurrent=CONCURRENT)
        seconds = time.perf_counter() - start_s
        async with asyncio.timeout(PATIENCE_S):
            while not engine.idle or _extra_tasks(loop, tasks_before):
                await clients.stats()
        result = Storm(
            outcomes=dict(clients.outcomes),
            side_endings=clients.side_endings,
            stats=await clients.stats(),
            taken=list(ledger.taken),
            client_tasks=len(asyncio.all_tasks()) - 1,
            seconds=seconds,
        )
        finished = [outcome for outcome in clients.outcomes.values() if outcome.ending == OK]
        for outcome in sample(finished, ASKED_AGAIN, SEED):
            result.again.append((outcome, await clients.ask(_alone(outcome))))
        return result
    finally:
        await clients.close()


def _extra_tasks(loop: asyncio.AbstractEventLoop, before: int) -> int:
    """Tasks of the server's event loop more than before the storm."""
    return max(0, len(asyncio.all_tasks(loop)) - before)


def _alone(outcome: Outcome) -> Ask:
    """The same request with the seed that the server had chosen."""
    request = type(outcome.ask.request)()
    request.CopyFrom(outcome.ask.request)
    request.request_id = ""
    assert outcome.transcript.started is not None
    request.seed = outcome.transcript.started.seed_used
    unary = outcome.ask.behaviour is Behaviour.UNARY
    return Ask(REQUESTS, Behaviour.UNARY if unary else Behaviour.READ, request)


def test_every_request_ends_exactly_once_and_as_it_may(storm: Storm) -> None:
    """That each ending is one of those its behaviour may have is checked as it comes."""
    print(
        f"\n{len(storm.outcomes)} requests in {storm.seconds:.0f} s, {storm.stats.steps_total} "
        f"steps, {storm.stats.preemptions_total} preemptions"
    )
    for behaviour in Behaviour:
        print(f"{behaviour.name:>14}: {dict(storm.endings(behaviour))}")
    print(f"  second calls: {dict(storm.side_endings)}")
    assert sorted(storm.outcomes) == list(range(REQUESTS))


def test_the_engine_ended_what_it_took_in_and_nothing_twice(storm: Storm) -> None:
    stats = storm.stats
    assert all(stream.finished for _, stream in storm.taken)
    assert stats.requests_accepted_total == len(storm.taken)
    choices = sum(request.sampling.n for request, _ in storm.taken)
    assert sum(stats.requests_finished_total.values()) == choices
    refused = [o for o in storm.outcomes.values() if o.ending == OVERLOAD]
    # A client that left may have been refused without hearing of it.
    assert stats.requests_rejected_total >= len(refused)


def test_the_storm_met_every_kind_of_weather(storm: Storm) -> None:
    """Otherwise the other tests would prove less than they say."""
    assert storm.stats.preemptions_total > REQUESTS / 100
    assert storm.stats.prefix_hit_rate > 0
    for behaviour, ending in (
        (Behaviour.READ, OK),
        (Behaviour.READ, OVERLOAD),
        (Behaviour.UNARY, OK),
        (Behaviour.PAUSE, OK),
        (Behaviour.DEAF, "SLOW_READER"),
        (Behaviour.LEAVE_AT_ONCE, "LEFT"),
        (Behaviour.LEAVE_QUEUED, "LEFT"),
        (Behaviour.LEAVE_MIDWAY, "LEFT"),
        (Behaviour.ABORTED, "CANCELLED"),
        (Behaviour.DEADLINE, "DEADLINE_EXCEEDED"),
        (Behaviour.REFUSED, "INVALID_REQUEST"),
        (Behaviour.CORNERED, "INVALID_REQUEST"),
    ):
        assert storm.endings(behaviour)[ending], f"no {behaviour.name} ended {ending}"
    assert storm.side_endings["DUPLICATE_REQUEST_ID"]


def test_all_pages_came_back(storm: Storm) -> None:
    """The ledger itself was checked when the engine had stopped (``engine_over``)."""
    stats = storm.stats
    assert stats.pages_used == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert [shard.pages_total for shard in stats.data_shards] == [NUM_PAGES - 1] * SHARDS
    assert (stats.rows_running, stats.requests_waiting, stats.tokens_waiting) == (0, 0, 0)


def test_nothing_was_compiled_after_ready(storm: Storm) -> None:
    assert storm.stats.compiles_after_ready == 0


def test_no_task_and_no_thread_is_left(storm: Storm) -> None:
    """The server's tasks were waited for in the storm itself, which fails if they stay."""
    assert storm.client_tasks == 0
    assert not storm.threads_left


def test_a_request_of_the_storm_gets_the_same_tokens_alone(storm: Storm) -> None:
    """Which also says that the server answers the next request."""
    assert len(storm.again) >= min(ASKED_AGAIN, REQUESTS // 4)
    differing = [
        f"request {before.ask.number}, temperature {before.ask.request.temperature:.2f}"
        for before, after in storm.again
        if after.ending != OK or not _same(before, after)
    ]
    assert not differing, f"{len(differing)} of {len(storm.again)} differ: {differing}"


def _same(left: Outcome, right: Outcome) -> bool:
    pairs = zip(left.transcript.choices, right.transcript.choices, strict=True)
    return all(a.outcome() == b.outcome() for a, b in pairs)
