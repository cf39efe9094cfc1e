"""Drives an engine by hand in tests: submits, turns, and reads what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxserve.engine.engine import Engine
from jaxserve.engine.request import (
    Event,
    FinishedEvent,
    Request,
    SamplingParams,
    StartedEvent,
    TokenEvent,
)
from jaxserve.engine.stream import TokenStream

REQUEST_FIELDS = ("resume", "priority", "cache_salt", "deadline_s", "constraint")


class Recorder:
    """A waker that remembers whom it was told to wake."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def wake(self, streams: Sequence[TokenStream]) -> None:
        self.calls.append([stream.request_id for stream in streams])


def make_request(name: str, prompt: Sequence[int], **values: Any) -> Request:
    """Returns a greedy request; ``values`` are fields of ``Request`` or ``SamplingParams``."""
    own = {key: values.pop(key) for key in REQUEST_FIELDS if key in values}
    sampling = SamplingParams(**{"temperature": 0.0, **values})
    return Request(request_id=name, prompt=prompt, sampling=sampling, **own)


def submit(engine: Engine, name: str, prompt: Sequence[int], **values: Any) -> Reader:
    """Submits a request; see ``make_request``."""
    return Reader(engine.submit(make_request(name, prompt, **values), Recorder()))


def run(engine: Engine, turns: int = 2000) -> None:
    """Turns the engine until it is idle; checks the ledger after every turn."""
    for _ in range(turns):
        if engine.idle:
            break
        engine.run_once()
        engine.scheduler.check_integrity()
    assert engine.idle, f"not idle after {turns} turns"
    engine.run_once()
    engine.check_integrity()


def turn(engine: Engine, times: int = 1) -> None:
    """Turns the engine a few times."""
    for _ in range(times):
        engine.run_once()


def lose_the_pool(engine: Engine) -> None:
    """Does to the running requests what a failed step of others would do."""
    engine._in_flight = None
    engine.scheduler.preempt_all()
    engine._runner.reset()


class Reader:
    """Everything that a stream has said so far."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        self._events += self.stream.take()
        return self._events

    def has_ended(self) -> bool:
        """Takes what is there; returns whether nothing more will come."""
        return bool(self.events) and self.stream.finished

    @property
    def started(self) -> StartedEvent:
        return next(event for event in self.events if isinstance(event, StartedEvent))

    def token_events(self, choice: int = 0) -> list[TokenEvent]:
        tokens = [event for event in self.events if isinstance(event, TokenEvent)]
        return [event for event in tokens if event.choice == choice]

    def tokens(self, choice: int = 0) -> list[int]:
        return [event.token_id for event in self.token_events(choice)]

    def finishes(self) -> list[FinishedEvent]:
        return [event for event in self.events if isinstance(event, FinishedEvent)]

    def finish(self, choice: int = 0) -> FinishedEvent:
        (found,) = [event for event in self.finishes() if event.choice == choice]
        return found
