"""What the client gives back: plain dataclasses, so that no caller has to hold protobuf messages.

``EngineStats`` and ``ModelInfo`` come from elsewhere in the package and are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from jaxserve.engine.request import FinishReason, Timing
from jaxserve.frontend import display


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``; ranges and defaults as in the proto."""

    model: str
    request_id: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    n: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    banned_token_ids: Sequence[int]
    logprobs: int
    prompt_logprobs: int
    echo: bool
    truncate_prompt_tokens: int
    priority: int
    cache_salt: str
    resume_token_ids: Sequence[int]
    json_schema: Mapping[str, Any] | str
    json_object: bool
    regex: str
    grammar: str
    choices: Sequence[str]


@dataclass(frozen=True)
class TopToken:
    """One likely alternative at a position."""

    token_id: int
    logprob: float
    text: str
    bytes: bytes


@dataclass(frozen=True)
class TokenScore:
    """One token's log-probability under the model."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt."""
    rank: int
    """1 is the likeliest token; 0 when there is no log-probability."""
    text: str
    bytes: bytes
    top: tuple[TopToken, ...]


@dataclass(frozen=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""


@dataclass(frozen=True)
class Finish:
    """How one choice ended."""

    choice: int
    reason: FinishReason
    usage: Usage
    timing: Timing
    """On the server's clock."""
    stop_token_id: int | None
    stop_string: str | None


@dataclass(frozen=True)
class Chunk:
    """One message of a stream: new tokens of a choice, or its end."""

    choice: int
    first_index: int
    """Position of the first token among the choice's output tokens, or in the prompt."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenScore, ...] = ()
    prompt: bool = False
    """True: tokens of the prompt (``echo``, ``prompt_logprobs``)."""
    finish: Finish | None = None
    """Set on the last chunk of a choice."""


@dataclass(frozen=True)
class GeneratedChoice:
    """One finished answer."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenScore, ...]
    finish: Finish


@dataclass(frozen=True)
class Generation:
    """Everything about one finished request. ``text`` and such are those of the first choice."""

    request_id: str
    model_digest: str
    seed: int
    """The seed in use; sending it again gives the same answer."""
    choices: tuple[GeneratedChoice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenScore, ...] = ()

    @property
    def text(self) -> str:
        """The answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended."""
        return self.choices[0].finish.reason

    @property
    def timing(self) -> Timing:
        """How long it took, on the server's clock."""
        return self.choices[0].finish.timing

    def __repr__(self) -> str:
        """One line."""
        return display.answer_repr(self)

    def _repr_html_(self) -> str:
        return display.answer_html(self)


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a given text."""

    request_id: str
    model_digest: str
    tokens: tuple[TokenScore, ...]
    total_logprob: float
    usage: Usage

    def __repr__(self) -> str:
        """One line."""
        return display.score_repr(self)

    def _repr_html_(self) -> str:
        return display.score_html(self)


@dataclass(frozen=True)
class HealthDetail:
    """Whether the server serves, and why not."""

    serving: bool
    detail: str
    draining: bool
    last_step_age_s: float
    uptime_s: float
    model_digest: str


@dataclass(frozen=True)
class DrainProgress:
    """How far a drain is."""

    idle: bool
    rows_running: int
    requests_waiting: int
