"""What the storm asks: seeded random requests that use every field, and what each may end with.

Behaviour is the client's: most read to the end; others leave at some moment, are aborted by a
third party, bring a short deadline, stop reading, or ask for something that must be refused.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.frontend.client_wire import generate_request
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import generation_pb2 as pb

OK = "OK"
LEFT = "LEFT"
"""The client cancelled its call; what the server would have said is not known."""
OVERLOAD = "QUEUE_FULL"


class Behaviour(enum.Enum):
    """What the client does."""

    READ = "reads to the end"
    UNARY = "asks for one message"
    PAUSE = "pauses between two messages"
    DEAF = "stops reading, so that the server's buffers fill"
    LEAVE_AT_ONCE = "leaves before anything can have come"
    LEAVE_QUEUED = "leaves while it waits, if it still does"
    LEAVE_MIDWAY = "leaves after a few messages"
    ABORTED = "is aborted by another client"
    DEADLINE = "brings a short deadline"
    TWICE = "sends its request id a second time while it runs"
    REFUSED = "asks for what no server could do"
    CORNERED = "leaves its own sampler no token"


COMPLETE = frozenset({OK, OVERLOAD})
EXPECTED: dict[Behaviour, frozenset[str]] = {
    Behaviour.READ: COMPLETE,
    Behaviour.UNARY: COMPLETE,
    Behaviour.PAUSE: COMPLETE,
    Behaviour.TWICE: COMPLETE,
    Behaviour.DEAF: frozenset({"SLOW_READER", OVERLOAD}),
    Behaviour.LEAVE_AT_ONCE: frozenset({LEFT, OVERLOAD}),
    Behaviour.LEAVE_QUEUED: COMPLETE | {LEFT},
    Behaviour.LEAVE_MIDWAY: COMPLETE | {LEFT},
    Behaviour.ABORTED: COMPLETE | {"CANCELLED"},
    Behaviour.DEADLINE: COMPLETE | {"DEADLINE_EXCEEDED"},
    Behaviour.REFUSED: frozenset({"INVALID_REQUEST", "PROMPT_TOO_LONG", "MODEL_NOT_FOUND"}),
    Behaviour.CORNERED: frozenset({"INVALID_REQUEST", OVERLOAD}),
}
"""The endings that each may have: OK, LEFT, or the reason of a jaxserve error."""

WEIGHTS = {
    Behaviour.READ: 480,
    Behaviour.UNARY: 90,
    Behaviour.PAUSE: 40,
    Behaviour.DEAF: 4,
    Behaviour.LEAVE_AT_ONCE: 60,
    Behaviour.LEAVE_QUEUED: 60,
    Behaviour.LEAVE_MIDWAY: 70,
    Behaviour.ABORTED: 50,
    Behaviour.DEADLINE: 60,
    Behaviour.TWICE: 20,
    Behaviour.REFUSED: 50,
    Behaviour.CORNERED: 16,
}

REFUSED_FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 1_000_000}),
    ("min_tokens", {"min_tokens": -1}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": -1.0}),
    ("top_p", {"top_p": 0.0}),
    ("top_k", {"top_k": -1}),
    ("min_p", {"min_p": 2.0}),
    ("n", {"n": 65}),
    ("stop", {"stop": [""]}),
    ("logprobs", {"logprobs": 21}),
    ("stop_token_ids", {"stop_token_ids": [2**30]}),
    ("logit_bias", {"logit_bias": {5: float("inf")}}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("priority", {"priority": 2_000_000}),
    ("cache_salt", {"cache_salt": "s" * 129}),
    ("", {"model": "another"}),
)
WORDS = ("the", "sea", "under", "a", "quiet", "light", "née", "日本", "🙂", "42", "runs", "\n")


@dataclass(frozen=True)
class Ask:
    """One request and how its client behaves."""

    number: int
    behaviour: Behaviour
    request: pb.GenerateRequest
    timeout_s: float | None = None
    messages: int = 0
    """Messages read before the client does what it does; for LEAVE_QUEUED, endings of others."""
    field: str = ""
    """For REFUSED: the field that the error names; empty when it names none."""


class Asks:
    """Makes asks for one served model."""

    def __init__(self, info: ModelInfo, *, seed: int, longest_output: int) -> None:
        """Everything follows from the seed."""
        self._rng = random.Random(seed)
        self._info = info
        self._longest = longest_output
        self._room = info.context_tokens - longest_output
        # Past the special tokens and single bytes of either tokenizer when the vocabulary is large.
        self._low, self._high = (300, 20_000) if info.vocab_size > 20_000 else (3, 259)
        self._prefixes = [self._tokens(64) for _ in range(3)]

    def make(self, count: int) -> Iterator[Ask]:
        """Yields asks; every behaviour comes at least once in the first dozen."""
        behaviours = list(Behaviour)
        for number in range(count):
            if number < len(behaviours):
                yield self._ask(number, behaviours[number])
            else:
                (drawn,) = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
                yield self._ask(number, drawn)

    def _ask(self, number: int, behaviour: Behaviour) -> Ask:
        rng = self._rng
        match behaviour:
            case Behaviour.REFUSED:
                field, bad = rng.choice(REFUSED_FIELDS)
                request = self._request(number, {**self._sampling(), **bad})
                return Ask(number, behaviour, request, field=field)
            case Behaviour.CORNERED:
                options = {"allowed_token_ids": [9], "stop_token_ids": [9], "min_tokens": 2}
                return Ask(number, behaviour, self._request(number, options))
            case Behaviour.DEAF:
                # 20 alternatives a token are about 700 bytes, so this overflows any window.
                options = {"n": 4, "logprobs": 20, "ignore_eos": True, "max_tokens": self._room}
                options["request_id"] = f"storm-{number}"
                request = generate_request(None, self._tokens(8), None, options)  # pyright: ignore[reportArgumentType]
                return Ask(number, behaviour, request, messages=1)
            case Behaviour.LEAVE_MIDWAY:
                longer = {"ignore_eos": True, "max_tokens": self._longest, "min_tokens": 0}
                request = self._request(number, {**self._sampling(), **longer})
                return Ask(number, behaviour, request, messages=rng.randint(1, 8))
            case Behaviour.ABORTED | Behaviour.TWICE:
                options = {**self._sampling(), "request_id": f"storm-{number}"}
                request = self._request(number, options)
                return Ask(number, behaviour, request, messages=rng.randint(1, 3))
            case Behaviour.DEADLINE:
                # From a millisecond to seconds; going first, so that some run when it is over.
                options = {**self._sampling(), "priority": -5}
                timeout_s = 10 ** rng.uniform(-3, 0.5)
                return Ask(number, behaviour, self._request(number, options), timeout_s)
            case Behaviour.LEAVE_QUEUED:
                options = {**self._sampling(), "priority": 50}
                return Ask(number, behaviour, self._request(number, options), messages=1)
            case _:
                return Ask(number, behaviour, self._request(number), messages=rng.randint(1, 4))

    def _request(self, number: int, options: dict[str, Any] | None = None) -> pb.GenerateRequest:
        sampling: Any = self._sampling() if options is None else options
        draw = self._rng.random()
        if draw < 0.05 and sampling.get("n", 1) == 1 and "stop" not in sampling:
            self._resume(sampling, number)
        if draw < 0.6:
            return generate_request(None, self._prompt(), None, sampling)
        if draw < 0.85 or not self._info.has_chat_template:
            return generate_request(self._text(), None, None, sampling)
        roles = ("system", "user", "assistant", "user")[self._rng.randrange(2) :]
        messages = [{"role": role, "content": self._text(4)} for role in roles]
        return generate_request(None, None, messages, sampling)

    def _resume(self, sampling: dict[str, Any], number: int) -> None:
        """Makes it a continuation: of random tokens, none of which ends the answer."""
        if sampling.get("max_tokens", 0) < 2 or "allowed_token_ids" in sampling:
            return
        ends = {*self._info.eos_token_ids, *sampling.get("stop_token_ids", ())}
        count = self._rng.randrange(1, sampling["max_tokens"])
        tokens = [token for token in self._tokens(count) if token not in ends]
        if tokens:
            sampling.update(resume_token_ids=tokens, seed=number)

    def _sampling(self) -> dict[str, Any]:
        """Draws every sampling parameter, each often left alone."""
        rng = self._rng
        ranges: tuple[tuple[str, float, Callable[[], Any]], ...] = (
            ("seed", 0.5, lambda: rng.getrandbits(64)),
            ("top_p", 0.2, lambda: rng.uniform(0.1, 1.0)),
            ("top_k", 0.2, lambda: rng.randint(1, 600)),
            ("min_p", 0.2, lambda: rng.uniform(0.0, 0.3)),
            ("presence_penalty", 0.1, lambda: rng.uniform(-2, 2)),
            ("frequency_penalty", 0.1, lambda: rng.uniform(-2, 2)),
            ("repetition_penalty", 0.1, lambda: rng.uniform(0.5, 2)),
            ("n", 0.15, lambda: rng.randint(2, 4)),
            ("stop", 0.15, lambda: rng.sample(["e", "ab", " the", "\n", "zq9"], 2)),
            ("stop_token_ids", 0.15, lambda: self._tokens(3)),
            ("include_stop", 0.2, lambda: True),
            ("ignore_eos", 0.4, lambda: True),
            ("logit_bias", 0.1, lambda: {t: rng.uniform(-20, 20) for t in self._tokens(4)}),
            ("banned_token_ids", 0.1, lambda: self._tokens(8)),
            ("logprobs", 0.15, lambda: rng.randint(0, 20)),
            ("prompt_logprobs", 0.07, lambda: rng.randint(0, 5)),
            ("echo", 0.07, lambda: True),
            ("truncate_prompt_tokens", 0.07, lambda: rng.randint(1, 60)),
            ("priority", 0.2, lambda: rng.randint(-3, 3)),
            ("cache_salt", 0.15, lambda: rng.choice(["blue", "green"])),
        )
        drawn = {name: draw() for name, share, draw in ranges if rng.random() < share}
        drawn["temperature"] = 0.0 if rng.random() < 0.4 else rng.uniform(0.1, 1.5)
        drawn["max_tokens"] = rng.randint(1, self._longest)
        if rng.random() < 0.15:
            drawn["min_tokens"] = rng.randint(0, drawn["max_tokens"])
        if rng.random() < 0.05:
            # Enough of them that neither banned nor suppressed tokens can leave none.
            drawn["allowed_token_ids"] = self._tokens(40)
        return drawn

    def _prompt(self) -> list[int]:
        """A few tokens or many; a third begin like others."""
        rng = self._rng
        own = self._tokens(min(self._room - 65, 1 + int(rng.expovariate(1 / 30))))
        return [*rng.choice(self._prefixes), *own] if rng.random() < 0.35 else own

    def _text(self, most: int = 16) -> str:
        return " ".join(self._rng.choices(WORDS, k=self._rng.randint(1, most)))

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(self._low, self._high) for _ in range(count)]


def sample(asks: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Returns some of them, the same ones for a seed."""
    return random.Random(seed).sample(list(asks), min(count, len(asks)))
