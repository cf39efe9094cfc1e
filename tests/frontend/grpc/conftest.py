"""A scripted engine behind a real server on a real socket.

The engine does what the test says, when the test says it: it holds every request until the test
starts it, gives it tokens and finishes it, or answers at once with a text that the test knows. All
waiting is for a condition, with a bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from jaxserve.engine.measures import EngineMeasures, Measures
from jaxserve.engine.request import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    StartedEvent,
    Timing,
    TokenEvent,
    TokenLogprobs,
)
from jaxserve.engine.stats import EngineStats, ShardStats
from jaxserve.engine.stream import TokenStream, Waker
from jaxserve.errors import (
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    RequestNotFoundError,
)
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.client import Client
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from tests.frontend.grpc.clients import QUICK

BOUND_S = 20.0
"""For conditions that come true in milliseconds on a quiet machine."""
SEED = 41


@dataclass(frozen=True)
class Limits:
    context_tokens: int = 64
    vocab_size: int = 259
    """Of the byte tokenizer: three marks and 256 bytes."""


@dataclass
class Report:
    serving: bool = True
    detail: str = ""


class ScriptedEngine:
    """Has the engine's methods, and does nothing by itself unless given an ``answer``."""

    def __init__(self, answer: str | None = None, *, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.tokenizer = byte_tokenizer()
        self.answer = answer
        self.refusals: list[Exception] = []
        """Raised by the next calls of ``submit``, first to last."""
        self.requests: list[Request] = []
        self.live: dict[str, TokenStream] = {}
        self.closed: list[str] = []
        self.stops: list[tuple[str, int]] = []
        self.report = Report()
        self.draining = False
        self._changed = threading.Condition()

    # -- what front ends call ------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self.live

    def submit(self, request: Request, waker: Waker) -> TokenStream:
        request.validate(
            vocab_size=self.limits.vocab_size, context_tokens=self.limits.context_tokens
        )
        if self.refusals:
            raise self.refusals.pop(0)
        if self.draining:
            raise DrainingError()
        if request.deadline_s is not None and request.deadline_s <= time.monotonic():
            raise DeadlineExceededError(request.request_id, 0)
        if request.request_id in self.live:
            raise DuplicateRequestError(request.request_id)
        stream = TokenStream(
            request.request_id,
            request.sampling.n,
            waker,
            on_close=self._close,
            on_stop=lambda name, choice: self._note(lambda: self.stops.append((name, choice))),
        )
        self._note(lambda: self._accept(request, stream))
        if self.answer is not None:
            self._play(request, self.answer)
        return stream

    def abort(self, request_id: str) -> None:
        if request_id not in self.live:
            raise RequestNotFoundError(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            rows_running=len(self.live),
            pages_total=7,
            pages_free=4,
            pages_used=2,
            pages_cached=1,
            requests_finished_total={"stop": 3},
            phase_seconds_total={"plan": 0.5},
            data_shards=(ShardStats(1, 2, 7, 4, 2, 1, 10, 5), ShardStats(0, 2, 7, 7, 0, 0, 0, 0)),
            draining=self.draining,
        )

    def measures(self) -> EngineMeasures:
        return Measures(context_tokens=self.limits.context_tokens).snapshot({})

    def pages(self) -> Future[list[np.ndarray]]:
        picture: Future[list[np.ndarray]] = Future()
        picture.set_result([np.zeros(7, np.uint8)] * 2)
        return picture

    def drain(self) -> None:
        self._note(lambda: setattr(self, "draining", True))

    def health(self) -> Report:
        if self.draining:
            return Report(False, "draining")
        return self.report

    # -- what tests call -----------------------------------------------------------------------

    def wait(self, condition: Callable[[], Any], *, bound_s: float = BOUND_S) -> Any:
        """Waits until the engine's state makes ``condition`` true, and returns its value."""
        with self._changed:
            assert self._changed.wait_for(condition, bound_s), "the engine never got there"
            return condition()

    def wait_draining(self) -> None:
        """Waits until the server has told the engine to drain."""
        self.wait(lambda: self.draining)

    def wait_taken(self, request_id: str) -> None:
        """Waits until the server has taken all events of a request, or given it up."""
        until = time.monotonic() + BOUND_S
        with self._changed:
            while (stream := self.live.get(request_id)) is not None and stream.pending:
                assert time.monotonic() < until, "the server never took the events"
                self._changed.wait(0.002)

    def wait_request(self, number: int = 0) -> Request:
        """Returns the request that was submitted as ``number``, once it has been."""
        self.wait(lambda: len(self.requests) > number)
        return self.requests[number]

    def start(self, request_id: str, **fields: Any) -> None:
        event = StartedEvent(
            request_id, fields.pop("seed", SEED), fields.pop("cached", 0), **fields
        )
        self.put(request_id, [event])

    def give(
        self,
        request_id: str,
        text: str | Sequence[int],
        *,
        first: int = 0,
        choice: int = 0,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Gives a choice the tokens of a text, in one step."""
        ids = self.ids(text) if isinstance(text, str) else text
        events = [
            TokenEvent(choice, first + number, token, logprobs) for number, token in enumerate(ids)
        ]
        self.put(request_id, events)

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.STOP,
        *,
        tokens: int = 0,
        choice: int = 0,
        error: Exception | None = None,
        stop_token_id: int | None = None,
    ) -> None:
        event = FinishedEvent(
            choice, reason, 5, tokens, 1, Timing(0.25, 0.5, 1.0), error, stop_token_id
        )
        self.put(request_id, [event])

    def put(self, request_id: str, events: Sequence[Event]) -> None:
        """Publishes events of one request as one step does."""
        stream = self.live[request_id]
        woken = [stream.put(e, ends_choice=isinstance(e, FinishedEvent)) for e in events]
        if stream.finished:
            self._note(lambda: self.live.pop(request_id, None))
        if any(woken):
            stream.waker.wake([stream])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _accept(self, request: Request, stream: TokenStream) -> None:
        self.requests.append(request)
        self.live[request.request_id] = stream

    def _close(self, request_id: str) -> None:
        self._note(lambda: (self.closed.append(request_id), self.live.pop(request_id, None)))

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def _play(self, request: Request, answer: str) -> None:
        """Answers at once with a text, as far as ``max_tokens`` goes; behind what is resumed."""
        sampling, done = request.sampling, len(request.resume)
        ids = self.ids(answer)[: sampling.max_tokens]
        entry = None if sampling.logprobs is None else TokenLogprobs(-0.5, 1)
        self.start(request.request_id, seed=SEED if sampling.seed is None else sampling.seed)
        for choice in range(sampling.n):
            self.give(request.request_id, ids[done:], first=done, choice=choice, logprobs=entry)
            self.finish(request.request_id, FinishReason.LENGTH, tokens=len(ids), choice=choice)


class Stubs:
    """The three services over one blocking channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.model = model_pb2_grpc.ModelServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)


class Serving:
    """Starts servers, opens channels to them, and ends all of them after the test."""

    def __init__(self) -> None:
        self.servers: list[ServerThread] = []
        self._channels: list[grpc.Channel] = []

    def start(self, engine: ScriptedEngine, *, template: Any = None, **config: Any) -> str:
        settings = {"port": 0, "health_interval_s": 0.01, **config}
        info = ModelInfo(
            name="scripted",
            model_digest="d1",
            architecture="ScriptedForCausalLM",
            context_tokens=engine.limits.context_tokens,
            vocab_size=engine.limits.vocab_size,
            eos_token_ids=(2, 0),
        )
        text = TextEngine(engine, engine.tokenizer, template)
        server = ServerThread(text, info, ServerConfig(**settings))
        address = server.start()
        self.servers.append(server)
        return address

    def stubs(self, address: str, options: Sequence[tuple[str, int]] = ()) -> Stubs:
        # Channels with equal options share a connection unless told otherwise.
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        channel = grpc.insecure_channel(address, options=options)
        self._channels.append(channel)
        return Stubs(channel)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for server in self.servers:
            server.stop(grace_s=0.0)


@pytest.fixture
def serving() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    serving.close()


@pytest.fixture
def scripted() -> Callable[..., ScriptedEngine]:
    """Makes scripted engines."""
    return ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    """Holds every request until the test says what happens to it."""
    return ScriptedEngine()


@pytest.fixture
def stubs(engine: ScriptedEngine, serving: Serving) -> Stubs:
    """Stubs of a server over ``engine``."""
    return serving.stubs(serving.start(engine))


@pytest.fixture
def connect(serving: Serving) -> Iterator[Callable[..., Client]]:
    """Starts a server over an engine and returns a client of it."""
    clients: list[Client] = []

    def connect(engine: ScriptedEngine, **options: Any) -> Client:
        clients.append(Client(serving.start(engine), **{"retry": QUICK, **options}))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
