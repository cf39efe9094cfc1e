"""What a client asked for, and what it is told back.

Plain data that crosses the boundary between a front end and the engine thread: ``Request`` goes
in through ``Engine.submit``, ``TokenEvent``, ``FinishedEvent`` and ``StartedEvent`` come out of a
``TokenStream``. Validation lives here, so that every door (gRPC, notebook, command line) refuses
the same things with the same words. Nothing here knows a protocol, a tokenizer or a device.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from jaxserve.engine.constraint import Constraint
from jaxserve.errors import InvalidRequestError, PromptTooLongError

MAX_CHOICES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_LIST = 65_536
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 128
MAX_SEED = 2**64 - 1
PRIORITY_LIMIT = 1_000_000


class FinishReason(enum.Enum):
    """Why a choice ended. The values are the words used in JSON and logs."""

    STOP = "stop"
    """The model's end token, a stop token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the context window was reached."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Defaults are greedy-free and neutral: plain sampling at 1.0.

    Order of application: repetition, presence and frequency penalties; logit bias, allowed and
    banned tokens, suppressed stop tokens (``min_tokens``); temperature; min_p; top_k; top_p.
    Reported log-probabilities are of the model's own distribution, before all of these.
    """

    max_tokens: int | None = None
    """New tokens at most; at least 1. None means until the context window is full."""
    min_tokens: int = 0
    """End and stop tokens cannot be chosen before this many new tokens."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. Finite, 0 to 100."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches it; above 0, at most 1."""
    top_k: int = 0
    """The k likeliest tokens; 0 is off. Ties with the k-th are kept."""
    min_p: float = 0.0
    """Tokens at least this share of the likeliest one's probability; 0 to 1."""
    seed: int | None = None
    """0 to 2**64 - 1. None: the engine chooses one and says which."""
    presence_penalty: float = 0.0
    """Subtracted once from every token already generated; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence among generated tokens; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; above 0, at
    most 100. Keskar et al. 2019 (CTRL), section 4.1."""
    n: int = 1
    """Choices to generate from one prompt; 1 to 64."""
    stop: Sequence[str] = ()
    """Strings that end the answer; at most 16 of at most 256 characters."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the answer, besides the model's own; at most 16."""
    include_stop: bool = False
    """Keep the stop string (or the stop token's text) at the end of the answer."""
    skip_special_tokens: bool = True
    """Leave the text of special tokens out of the answer."""
    kept_token_ids: Sequence[int] = ()
    """Special tokens whose text stays all the same, such as the marks of tool calls."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to the logits of these tokens; finite, -100 to 100; at most 1,024 entries."""
    allowed_token_ids: Sequence[int] = ()
    """When not empty, only these can be chosen."""
    banned_token_ids: Sequence[int] = ()
    """These can never be chosen."""
    logprobs: int | None = None
    """Report each chosen token's log-probability and this many alternatives; 0 to 20."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first; 0 to 20."""

    def __post_init__(self) -> None:
        """Takes one stop string for a list of one, not for a list of its characters."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

    def validate(self, *, vocab_size: int) -> None:
        """Checks every range.

        Raises:
            InvalidRequestError: naming the field, the value, the limit and the remedy.
        """
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_count("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not text:
                raise InvalidRequestError(
                    "stop holds an empty string, which would end every answer at once; remove it",
                    field="stop",
                )
            if len(text) > MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"stop holds a string of {len(text)} characters and the limit is "
                    f"{MAX_STOP_CHARS}; shorten it",
                    field="stop",
                )
        _check_tokens("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size)
        _check_tokens("logit_bias", tuple(self.logit_bias), MAX_LOGIT_BIAS, vocab_size)
        for token, bias in self.logit_bias.items():
            _check_float(f"logit_bias[{token}]", bias, -100.0, 100.0, field_name="logit_bias")
        _check_tokens("allowed_token_ids", self.allowed_token_ids, MAX_TOKEN_LIST, vocab_size)
        _check_tokens("banned_token_ids", self.banned_token_ids, MAX_TOKEN_LIST, vocab_size)
        if self.allowed_token_ids and not set(self.allowed_token_ids) - set(self.banned_token_ids):
            raise InvalidRequestError(
                "every one of allowed_token_ids is also in banned_token_ids, so no token is left",
                field="banned_token_ids",
            )
        if len(set(self.banned_token_ids)) >= vocab_size:
            raise InvalidRequestError(
                "banned_token_ids holds the whole vocabulary, so no token is left",
                field="banned_token_ids",
            )
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as the engine takes it: token ids in, nothing of the protocol left."""

    request_id: str
    """Unique among live requests; at most 128 characters."""
    prompt: Sequence[int]
    """Token ids of the prompt; at least one."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    resume: Sequence[int] = ()
    """Output tokens that the client already has. They count as output (``max_tokens``,
    penalties, sampling positions) and are not sent again. Only with n = 1."""
    priority: int = 0
    """Lower is served first; ties by arrival."""
    cache_salt: str = ""
    """Prompts share cached pages only under the same salt."""
    deadline_s: float | None = None
    """Monotonic time (``time.monotonic`` clock) after which the answer is of no use."""
    constraint: Constraint | None = None
    """The grammar that every choice of the answer obeys."""
    embed: bool = False
    """What the prompt means is wanted (``EmbeddingEvent``), and no answer; only with n = 1."""

    def validate(
        self,
        *,
        vocab_size: int,
        context_tokens: int,
        prompt_logprobs: bool = True,
        embeddings: bool = True,
    ) -> None:
        """Checks the request against the model's limits.

        Args:
            vocab_size: token ids are below this.
            context_tokens: prompt and output tokens together at most.
            prompt_logprobs: whether prompts can be scored by this server.
            embeddings: whether it can embed them.

        Raises:
            InvalidRequestError: naming the field, the value, the limit and the remedy.
            PromptTooLongError: when no room is left for one new token.
        """
        if len(self.request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequestError(
                f"request_id has {len(self.request_id)} characters and the limit is "
                f"{MAX_REQUEST_ID_CHARS}; send a shorter one",
                field="request_id",
            )
        if len(self.cache_salt) > MAX_CACHE_SALT_CHARS:
            raise InvalidRequestError(
                f"cache_salt has {len(self.cache_salt)} characters and the limit is "
                f"{MAX_CACHE_SALT_CHARS}; send a shorter one",
                field="cache_salt",
            )
        try:
            self.cache_salt.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "cache_salt holds half a surrogate pair, which is no character; send valid text",
                field="cache_salt",
            ) from None
        _check_int("priority", self.priority, -PRIORITY_LIMIT, PRIORITY_LIMIT)
        if not self.prompt:
            raise InvalidRequestError(
                "prompt is empty; send at least one token of text, chat or token_ids",
                field="prompt",
            )
        self.sampling.validate(vocab_size=vocab_size)
        if self.sampling.prompt_logprobs is not None and not prompt_logprobs:
            raise InvalidRequestError(
                "prompt_logprobs is off on this server (it was launched with "
                "--no-prompt-logprobs); leave it unset",
                field="prompt_logprobs",
            )
        if self.embed and not embeddings:
            raise InvalidRequestError(
                "embeddings are off on this server; launch it with --embeddings", field="embed"
            )
        tokens = len(self.prompt) + len(self.resume)
        if tokens >= context_tokens:
            raise PromptTooLongError(tokens, context_tokens)
        _check_tokens("token_ids", self.prompt, None, vocab_size)
        _check_tokens("resume", self.resume, None, vocab_size)
        room = context_tokens - len(self.prompt)
        max_tokens = self.sampling.max_tokens
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {max_tokens} but a prompt of {len(self.prompt)} tokens leaves "
                f"room for {room} in the context window of {context_tokens}; lower max_tokens to "
                f"{room}, shorten the prompt, or leave max_tokens unset",
                field="max_tokens",
            )
        if self.resume:
            if self.sampling.n != 1:
                raise InvalidRequestError(
                    f"resume needs n = 1, got n = {self.sampling.n}", field="resume"
                )
            if max_tokens is not None and len(self.resume) >= max_tokens:
                raise InvalidRequestError(
                    f"resume holds {len(self.resume)} tokens and max_tokens is {max_tokens}; "
                    "nothing is left to generate",
                    field="resume",
                )
            if self.sampling.seed is None and self.sampling.temperature > 0:
                raise InvalidRequestError(
                    "resume of a sampled answer needs the seed that `started` reported; set seed",
                    field="seed",
                )


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log-probability under the model, and its likeliest alternatives."""

    logprob: float
    rank: int
    """1 is the likeliest token."""
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class StartedEvent:
    """The request has its first row: sent once, before any token."""

    request_id: str
    seed: int
    cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One per prompt token (None for the first), when asked for."""


@dataclass(slots=True)
class TokenEvent:
    """One new token of one choice. Not frozen, because that makes one five times as slow."""

    choice: int
    index: int
    """Position among the choice's output tokens, resumed ones counted; from 0."""
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class EmbeddingEvent:
    """What a prompt means, when that was asked for: the normalised hidden state of its last token
    behind the final norm, float32."""

    vector: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds, on the engine's clock."""

    queue_s: float
    """Accepted until first scheduled."""
    first_token_s: float
    """Accepted until the first new token; 0 when there was none."""
    total_s: float
    """Accepted until finished."""


@dataclass(frozen=True)
class FinishedEvent:
    """A choice has ended; nothing follows for it."""

    choice: int
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    """New tokens of this choice, resumed ones counted."""
    cached_tokens: int
    timing: Timing
    error: Exception | None = None
    """Set when ``reason`` is CANCELLED, DEADLINE or ERROR: what the front end reports."""
    stop_token_id: int | None = None
    """The end or stop token that ended the choice, when one did."""


Event = StartedEvent | TokenEvent | EmbeddingEvent | FinishedEvent


def _is_int(value: object) -> bool:
    """Whether a value is a whole number (numpy's count, True and False do not)."""
    if type(value) is int:  # Nearly always, and much faster than asking the abstract class.
        return True
    return isinstance(value, Integral) and value is not True and value is not False


def _check_int(name: str, value: int | float, low: int, high: int | None) -> None:
    if not _is_int(value):
        raise InvalidRequestError(f"{name} must be a whole number, got {value!r}", field=name)
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise InvalidRequestError(f"{name} must be {span}, got {value}", field=name)


def _check_float(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    field_name: str | None = None,
) -> None:
    too_low = value <= low if open_low else value < low
    if not math.isfinite(value) or too_low or value > high:
        span = f"above {low:g} and at most {high:g}" if open_low else f"{low:g} to {high:g}"
        raise InvalidRequestError(
            f"{name} must be a finite number, {span}, got {value:g}", field=field_name or name
        )


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequestError(
            f"{name} has {count} entries and the limit is {limit}; send fewer", field=name
        )


def _check_tokens(
    name: str, tokens: Sequence[int | float], limit: int | None, vocab_size: int
) -> None:
    if limit is not None:
        _check_count(name, len(tokens), limit)
    if not all(map(_is_int, tokens)):
        bad = next(token for token in tokens if not _is_int(token))
        raise InvalidRequestError(f"{name} holds {bad!r}; token ids are whole numbers", field=name)
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"{name} holds token id {bad}; this model's ids are 0 to {vocab_size - 1}", field=name
        )
