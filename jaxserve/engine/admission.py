"""The door: which requests are let in, and which live requests there are.

Everything here is shared by the front ends' threads (``admit``, ``find``) and the engine thread
(``scheduled``, ``forget``, ``close``), under one lock that is never held for longer than a few
dictionary operations. A request waits from its admission until it is first scheduled; the bounds
of the queue count waiting requests only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from jaxserve.engine.sequence import LiveRequest
from jaxserve.errors import (
    DrainingError,
    DuplicateRequestError,
    EngineDeadError,
    QueueFullError,
    RequestNotFoundError,
)

MAX_RETRY_AFTER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Bounds that a request is checked against."""

    context_tokens: int
    """Prompt and output together at most: the model's window, or the pool when it is smaller."""
    vocab_size: int
    max_waiting_requests: int = 1024
    max_waiting_tokens: int = 1_048_576
    """Prompt tokens of all waiting requests together. One request alone is always let in."""
    watchdog_s: float = 60.0
    """Without a finished step for this long while work is there, health says so."""
    prompt_logprobs: bool = True
    """Whether programs that score prompts were compiled."""
    embeddings: bool = False
    """Whether programs that embed prompts were compiled."""


class Admission:
    """The live requests and the bounds of the queue."""

    def __init__(self, limits: EngineLimits) -> None:
        """Opens the door, with nobody inside."""
        self._limits = limits
        self._lock = threading.Lock()
        self._live: dict[str, LiveRequest] = {}
        """Every accepted request that has not ended, oldest first."""
        self._waiting: dict[str, LiveRequest] = {}
        """Those that have never been scheduled, oldest first."""
        self.waiting_tokens = 0
        """Prompt tokens of the waiting requests."""
        self.accepted = 0
        self.rejected = 0
        self._refusals: dict[str, int] = {}
        self.draining = False
        self.dead: BaseException | None = None

    @property
    def live(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Requests that have never been scheduled."""
        return len(self._waiting)

    def admit(self, live: LiveRequest) -> bool:
        """Lets a request in; returns whether it is the only one.

        Raises:
            EngineDeadError, DrainingError, DuplicateRequestError, QueueFullError: it is not.
        """
        request = live.request
        prompt_tokens = len(request.prompt)
        with self._lock:
            if self.dead is not None:
                raise EngineDeadError(describe(self.dead))
            if self.draining:
                raise DrainingError()
            if request.request_id in self._live:
                raise DuplicateRequestError(request.request_id)
            self._check_bounds(prompt_tokens, live.accepted_s)
            self.accepted += 1
            self._live[request.request_id] = live
            self._waiting[request.request_id] = live
            self.waiting_tokens += prompt_tokens
            return len(self._live) == 1

    def _check_bounds(self, prompt_tokens: int, now: float) -> None:
        if not self._waiting:
            return
        limits = self._limits
        tokens = self.waiting_tokens + prompt_tokens
        if len(self._waiting) >= limits.max_waiting_requests:
            full = ("requests", len(self._waiting), limits.max_waiting_requests)
        elif tokens > limits.max_waiting_tokens:
            full = ("tokens", tokens, limits.max_waiting_tokens)
        else:
            return
        self.rejected += 1
        # A place came free about as long ago as the oldest has waited for one, so half of that
        # is a fair guess for the next.
        age = now - next(iter(self._waiting.values())).accepted_s
        raise QueueFullError(*full, retry_after_s=min(MAX_RETRY_AFTER_S, max(0.1, age / 2)))

    def count_refusal(self, reason: str) -> None:
        """Counts a request that was not let in; ``reason`` is one of the errors' few words."""
        with self._lock:
            self._refusals[reason] = self._refusals.get(reason, 0) + 1

    def refusals(self) -> dict[str, int]:
        """Returns how many were refused, by reason."""
        with self._lock:
            return dict(self._refusals)

    def get(self, request_id: str) -> LiveRequest | None:
        """Returns a live request, or None."""
        return self._live.get(request_id)

    def find(self, request_id: str) -> LiveRequest:
        """Returns a live request.

        Raises:
            RequestNotFoundError: no live request has this id.
        """
        live = self.get(request_id)
        if live is None:
            raise RequestNotFoundError(request_id)
        return live

    def scheduled(self, requests: Iterable[LiveRequest]) -> None:
        """Takes requests out of the queue's counts; those taken out before are passed over."""
        with self._lock:
            for live in requests:
                self._uncount(live)

    def forget(self, requests: Iterable[LiveRequest]) -> None:
        """Drops requests that have ended."""
        with self._lock:
            for live in requests:
                self._uncount(live)
                del self._live[live.request.request_id]

    def _uncount(self, live: LiveRequest) -> None:
        if self._waiting.pop(live.request.request_id, None) is not None:
            self.waiting_tokens -= len(live.request.prompt)

    def drain(self) -> None:
        """Refuses new requests from now on."""
        with self._lock:
            self.draining = True

    def die(self, cause: BaseException) -> None:
        """Refuses new requests from now on, because the engine has ended."""
        with self._lock:
            self.dead = cause

    def live_requests(self) -> list[LiveRequest]:
        """Returns every live request, oldest first."""
        with self._lock:
            return list(self._live.values())

    def queue_age_s(self, now: float) -> float:
        """Returns how long the oldest waiting request has waited; 0 when none does."""
        with self._lock:
            oldest = next(iter(self._waiting.values()), None)
        return 0.0 if oldest is None else max(0.0, now - oldest.accepted_s)

    def check_integrity(self) -> None:
        """Verifies the counts. Raises AssertionError with the numbers that do not add up."""
        with self._lock:
            tokens = sum(len(live.request.prompt) for live in self._waiting.values())
            assert tokens == self.waiting_tokens, f"{tokens} tokens wait, not {self.waiting_tokens}"
            lost = self._waiting.keys() - self._live.keys()
            assert not lost, f"{sorted(lost)[:8]} wait and are not live"
            for name, live in self._waiting.items():
                assert live.scheduled_s is None, f"{name} was scheduled and counts as waiting"


def describe(error: BaseException) -> str:
    """Returns an exception in a few words; its class when it has no message."""
    return str(error) or type(error).__name__
