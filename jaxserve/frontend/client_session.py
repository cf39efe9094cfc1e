"""What a client does about failures, decided without making a call: retry, resume or raise.

    attempt --failure--> nothing received yet and retryable?  --> same request again, after a wait
                         broken midway and resume asked for?  --> request + tokens received so far
                         otherwise                            --> raise

Both clients drive these objects; they differ only in how they wait.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.errors import InvalidRequestError, JaxserveError
from jaxserve.frontend.client_errors import Failure, make_error
from jaxserve.frontend.client_types import Chunk
from jaxserve.frontend.client_wire import chunk_from
from jaxserve.v1 import generation_pb2 as pb

MAX_RESUMES = 3


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When and how often a call is tried again."""

    attempts: int = 4
    """Calls in all. 1 never retries."""
    first_delay_s: float = 0.05
    """Doubles with every attempt; each wait is 50 to 150 % of it, so that clients spread out."""
    max_delay_s: float = 1.0
    """Of our own; a longer wait that the server asks for is kept."""

    def delay_s(self, attempt: int, retry_after_s: float) -> float:
        """Returns how long to wait after a failed attempt, counted from 1."""
        own = min(self.max_delay_s, self.first_delay_s * 2 ** (attempt - 1))
        return max(own * random.uniform(0.5, 1.5), retry_after_s)


class Attempts:
    """The attempts of one call, within its deadline."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins the first attempt; the caller's time runs from here.

        Raises:
            InvalidRequestError: no time is left from the start.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise InvalidRequestError(
                f"timeout_s must be above 0, got {timeout_s:g}; leave it out to wait for ever",
                field="timeout_s",
            )
        self._policy = policy
        self._clock = clock
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._made = 1
        self._cause: JaxserveError | None = None

    @property
    def timeout_s(self) -> float | None:
        """What is left of the caller's time, for the next attempt's deadline."""
        return None if self._deadline_s is None else self._deadline_s - self._clock()

    def after(self, failure: Failure) -> float:
        """Returns how long to wait before trying again, or raises why the call failed.

        A server that dies says so once, and then nobody answers: its own words are raised.
        """
        if failure.answered or self._cause is None:
            self._cause = failure.error
        if failure.retry_after_s is None or self._made >= self._policy.attempts:
            raise self._cause
        delay_s = self._policy.delay_s(self._made, failure.retry_after_s)
        left_s = self.timeout_s
        if left_s is not None and delay_s >= left_s:
            raise self._cause
        self._made += 1
        return delay_s


class StreamSession:
    """One answer's stream across the calls that it may take."""

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts, *, resume: bool) -> None:
        """Begins with the request as the caller made it."""
        self.request = request
        """What to send next."""
        self.started: pb.GenerateStarted | None = None
        """From the first call that got through; cleared by nothing."""
        self._first = request
        self._attempts = attempts
        self._resume = resume
        self._resumes = 0
        self._choices = request.n if request.HasField("n") else 1
        self._open = self._choices
        self._next_index: dict[int, int] = {}
        self._tokens: list[int] = list(request.resume.token_ids)
        self._prompt_tokens_seen = 0
        if self._tokens:
            self._next_index[0] = len(self._tokens)

    @property
    def finished(self) -> bool:
        """True once every choice has ended."""
        return self._open == 0

    @property
    def timeout_s(self) -> float | None:
        """What is left of the caller's time."""
        return self._attempts.timeout_s

    def accept(self, response: pb.GenerateResponse) -> Chunk | None:
        """Takes one message; returns what the caller sees of it.

        Raises:
            JaxserveError: tokens are missing or doubled, or another model continued the stream.
        """
        match response.WhichOneof("event"):
            case "started":
                self._check_started(response.started)
                return None
            case "delta":
                self._check_delta(response.delta)
            case "finished":
                self._open -= 1
            case _:
                return None  # An event that a later version added.
        return chunk_from(response)

    def after(self, failure: Failure) -> float:
        """Decides what follows a broken call: sets ``request`` and returns how long to wait first.

        Raises:
            JaxserveError: the failure's error, when nothing follows.
        """
        if self.started is None:
            return self._attempts.after(failure)
        if not self._can_resume(failure):
            raise failure.error
        self._resumes += 1
        self.request = self._continuation()
        return self._attempts.after(
            Failure(failure.error, retry_after_s=failure.retry_after_s or 0.0, resumable=True)
        )

    def _can_resume(self, failure: Failure) -> bool:
        if not (self._resume and failure.resumable and self._choices == 1):
            return False
        if self._first.HasField("max_tokens") and len(self._tokens) >= self._first.max_tokens:
            return False  # All tokens are here; only the reason is missing.
        wants_prompt = self._first.echo or self._first.HasField("prompt_logprobs")
        in_prompt = wants_prompt and 0 < self._prompt_tokens_seen < self._prompt_tokens()
        return not in_prompt and self._resumes < MAX_RESUMES

    def _continuation(self) -> pb.GenerateRequest:
        assert self.started is not None
        request = pb.GenerateRequest()
        request.CopyFrom(self._first)
        request.seed = self.started.seed_used
        request.resume.token_ids[:] = self._tokens
        if request.request_id:
            # The broken call may not have ended yet on the server that it ran on.
            request.request_id = f"{request.request_id[:100]}.resume{self._resumes}"
        if self._prompt_tokens_seen:
            request.echo = False
            request.ClearField("prompt_logprobs")
        return request

    def _prompt_tokens(self) -> int:
        return 0 if self.started is None else self.started.prompt_tokens

    def _check_started(self, started: pb.GenerateStarted) -> None:
        if self.started is None:
            self.started = started
        elif started.model_digest != self.started.model_digest:
            raise _broken(
                f"the stream was continued by another model (digest {started.model_digest} instead "
                f"of {self.started.model_digest}); ask again"
            )

    def _check_delta(self, delta: pb.GenerateDelta) -> None:
        if delta.prompt:
            self._prompt_tokens_seen += max(len(delta.token_ids), len(delta.logprobs))
            return
        expected = self._next_index.get(delta.choice, 0)
        if delta.token_ids and delta.first_index != expected:
            raise _broken(
                f"the stream of choice {delta.choice} goes on at token {delta.first_index} and "
                f"{expected} was expected; tokens are missing or doubled, ask again"
            )
        self._next_index[delta.choice] = expected + len(delta.token_ids)
        if self._choices == 1:
            self._tokens.extend(delta.token_ids)


class StreamFacts:
    """What is known of a stream once its first message has arrived; None and 0 before."""

    _session: StreamSession

    @property
    def request_id(self) -> str | None:
        """The id to abort it by."""
        return self._session.started.request_id if self._session.started else None

    @property
    def seed(self) -> int | None:
        """The seed in use; sending it again gives the same answer."""
        return self._session.started.seed_used if self._session.started else None

    @property
    def model_digest(self) -> str | None:
        """SHA-256 of weights, config and tokenizer."""
        return self._session.started.model_digest if self._session.started else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._session.started.prompt_tokens if self._session.started else 0

    @property
    def cached_tokens(self) -> int:
        """Those that came from the prefix cache."""
        return self._session.started.cached_tokens if self._session.started else 0


def _broken(message: str) -> JaxserveError:
    return make_error(JaxserveError, message, "BROKEN_STREAM")
