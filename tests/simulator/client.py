"""One simulated client: what its request is owed, worked out by hand, and what it has been given.

The answer of ``CountingRunner`` is a weighted sum of the context, so the next token of a choice is
known from a running total, and every event can be checked as it arrives.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from jaxserve.engine.request import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    StartedEvent,
    TokenEvent,
)
from jaxserve.engine.scheduler import PRIORITY_SECONDS
from jaxserve.engine.stream import TokenStream


class _Choice:
    """One answer, as far as it has come."""

    __slots__ = ("length", "output", "over", "poisoned", "reason", "salt", "stopped", "total")

    def __init__(self, context: list[int], prompt_tokens: int, salt: int, poison: int) -> None:
        self.total = sum((place + 1) * token for place, token in enumerate(context))
        self.length = len(context)
        self.output = len(context) - prompt_tokens
        self.salt = salt
        self.poisoned = poison in context
        self.over = self.poisoned
        """Whether only the ``FinishedEvent`` may follow."""
        self.stopped = False
        self.reason: FinishReason | None = None


class Client:
    """Checks every event of one stream."""

    def __init__(
        self,
        request: Request,
        stream: TokenStream,
        *,
        number: int,
        now: float,
        turn: int,
        vocab_size: int,
        context_tokens: int,
        end_id: int,
        poison: int,
        may_hit: Callable[[], bool],
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.stream = stream
        self.number = number
        self.turn = turn
        self.order = (now + PRIORITY_SECONDS * request.priority, number)
        self.slow = self.gone = self.cancelled = self.started = False
        self.step_failures = 0
        """Steps that had raised when the request came."""
        self._vocab = vocab_size
        self._poison = poison
        self._may_hit = may_hit
        ends = () if sampling.ignore_eos else (end_id,)
        self._stop_ids = frozenset({*ends, *sampling.stop_token_ids})
        self._penalised = bool(sampling.presence_penalty)
        room = context_tokens - len(request.prompt)
        self._limit = min(room, sampling.max_tokens or room)
        context = [*request.prompt, *request.resume]
        seed = sampling.seed or 0
        self._choices = [
            _Choice(
                context,
                len(request.prompt),
                seed + 31 * choice if sampling.temperature else 0,
                poison,
            )
            for choice in range(sampling.n)
        ]
        self._open = sampling.n
        self.most_events = 1 + sampling.n * (self._limit + 1)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be read."""
        return self.gone or self._open == 0

    def close(self, *, stays: bool) -> None:
        """Gives up the request; a client that stays reads to the end."""
        self.stream.close()
        self.cancelled = True
        self.gone = self.gone or not stays

    def stop_one(self, rng: random.Random) -> None:
        """Ends one choice, as if its text had met a stop string."""
        number = rng.randrange(len(self._choices))
        self._choices[number].stopped = True
        self.stream.stop(number)

    def read(self, now: float, step_failures: int) -> None:
        """Takes and checks what has arrived."""
        for event in self.stream.take():
            if type(event) is TokenEvent:
                self._check_token(event)
            else:
                self._check_other(event, now, step_failures)
        assert self.stream.finished or self._open, "the stream has ended and says it has not"

    def _check_token(self, event: TokenEvent) -> None:
        choice = self._choices[event.choice]
        assert self.started, "a token before the start"
        assert not choice.over, f"a token after the end: {event}"
        assert choice.reason is None, f"a token after the finish: {event}"
        assert event.index == choice.output, f"index {event.index}, expected {choice.output}"
        token = (1 + choice.total + choice.salt) % self._vocab
        if self._penalised:
            token = (token + choice.output) % self._vocab
        minimum = self.request.sampling.min_tokens
        if choice.output < minimum:
            while token in self._stop_ids:
                token = (token + 1) % self._vocab
        assert event.token_id == token, f"{event}, expected token {token}"
        choice.length += 1
        choice.total += choice.length * token
        choice.output += 1
        choice.poisoned = token == self._poison
        stops = token in self._stop_ids and choice.output > minimum
        # Poison is found out when the next token is chosen, if there is a next one.
        choice.over = stops or choice.poisoned or choice.output >= self._limit

    def _check_other(self, event: Event, now: float, step_failures: int) -> None:
        if isinstance(event, StartedEvent):
            self._check_start(event)
            return
        assert isinstance(event, FinishedEvent)
        choice = self._choices[event.choice]
        assert choice.reason is None, f"{event} after {choice.reason}"
        choice.reason = event.reason
        self._open -= 1
        assert event.prompt_tokens == len(self.request.prompt)
        assert event.output_tokens == choice.output, f"{event}, {choice.output} tokens came"
        assert (event.error is None) == (event.reason.value in ("stop", "length"))
        self._check_reason(event, choice, now, step_failures)

    def _check_start(self, event: StartedEvent) -> None:
        assert not self.started, "started twice"
        self.started = True
        request = self.request
        assert event.request_id == request.request_id
        assert event.seed == request.sampling.seed
        assert event.cached_tokens <= len(request.prompt)
        assert not event.cached_tokens or self._may_hit(), "a page of somebody else was shared"
        if request.sampling.prompt_logprobs is not None and event.prompt_logprobs is not None:
            assert event.cached_tokens == 0
            assert [None if s is None else s.logprob for s in event.prompt_logprobs] == [
                None,
                *(-1.0 - token % 8 for token in request.prompt[1:]),
            ]

    def _check_reason(
        self, event: FinishedEvent, choice: _Choice, now: float, step_failures: int
    ) -> None:
        match event.reason:
            case FinishReason.LENGTH:
                assert choice.output == self._limit, f"ended at {choice.output}"
            case FinishReason.STOP if event.stop_token_id is not None:
                assert choice.over, "stopped where there was no stop"
                assert event.stop_token_id in self._stop_ids
            case FinishReason.STOP:
                assert choice.stopped, "stopped and nobody asked"
            case FinishReason.CANCELLED:
                assert self.cancelled, "cancelled and nobody asked"
            case FinishReason.DEADLINE:
                deadline = self.request.deadline_s
                assert deadline is not None, "expired without a deadline"
                assert deadline <= now, f"expired before {deadline}"
            case FinishReason.ERROR:
                failed = step_failures > self.step_failures
                assert failed or choice.poisoned, f"failed without a reason: {event.error}"
