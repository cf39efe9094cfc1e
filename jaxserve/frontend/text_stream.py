"""One request's events become what its client is told: a start, deltas of text, an end.

    Event --TextStream.feed--> Started | Delta | Finished

A plain state machine: waiting is the door's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxserve.engine.request import (
    EmbeddingEvent,
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingParams,
    StartedEvent,
    Timing,
    TokenEvent,
    TokenLogprobs,
)
from jaxserve.engine.stream import TokenStream
from jaxserve.frontend.text import TextAssembler
from jaxserve.frontend.tokenizer import Tokenizer

PROMPT_TOKENS_PER_DELTA = 512
"""Prompt tokens in one delta when log-probabilities are asked for. With 20 alternatives a token is
about 700 bytes on the wire, so a delta stays far below the usual 4 MiB message limit."""


@dataclass(frozen=True, slots=True)
class Started:
    """The request has its first row; comes once, first."""

    request_id: str
    seed: int
    cached_tokens: int
    prompt_tokens: int


@dataclass(slots=True)
class Delta:
    """Consecutive tokens of one choice, and the text that they complete."""

    choice: int
    first_index: int
    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[tuple[int, TokenLogprobs | None]] = ()
    """Token id and log-probability (None for the first prompt token), when asked for."""
    prompt: bool = False
    """True: these are tokens of the prompt and ``first_index`` counts there."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice has ended; nothing follows for it."""

    choice: int
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    """Tokens delivered, resumed ones counted; those computed past a stop string are not."""
    cached_tokens: int
    timing: Timing
    error: Exception | None
    """What to report instead of an answer; None after STOP and LENGTH."""
    stop_token_id: int | None
    """The end or stop token that ended it, when one did."""
    stop_string: str | None
    """The stop string that ended it, when one did."""


Output = Started | Delta | Finished


class TextStream:
    """Turns one request's events into outputs. One thread at a time."""

    def __init__(
        self,
        stream: TokenStream,
        request: Request,
        tokenizer: Tokenizer,
        *,
        echo_text: str | None = None,
        with_text: bool = True,
    ) -> None:
        """Begins at the first event.

        Args:
            stream: what ``Engine.submit`` returned for ``request``.
            request: says how many choices there are and where each ends.
            tokenizer: of the model.
            echo_text: the prompt's text, to be sent first; None sends no prompt.
            with_text: False for doors that hand on token ids: nothing is detokenised but to find
                stop strings.
        """
        self.stream = stream
        self._request = request
        self._echo_text = echo_text
        self._tokenizer = tokenizer
        sampling = request.sampling
        self._stop_ids = stop_ids(sampling, tokenizer)
        # Without text the tokens are read for stop strings alone.
        self._reads = with_text or bool(sampling.stop)
        # Text of resumed tokens is with the client; what was held back comes with the next token.
        self._choices = [
            _Choice(number, assemble(tokenizer, sampling, request.resume), len(request.resume))
            for number in range(sampling.n)
        ]
        self._open = sampling.n

    @property
    def finished(self) -> bool:
        """True once every choice's ``Finished`` has been returned."""
        return self._open == 0

    def close(self) -> None:
        """Gives the request up, if it still runs; safe to call again."""
        self.stream.close()

    def feed(self, events: Iterable[Event]) -> list[Output]:
        """Takes what ``TokenStream.take`` returned and gives what there is to tell the client.

        Tokens of one choice come back as one ``Delta``. A stop string ends the choice at its
        token: the engine is told, later tokens are dropped, and ``Finished`` follows when the
        engine confirms.
        """
        outputs: list[Output] = []
        touched: list[_Choice] = []
        for event in events:
            if type(event) is TokenEvent:
                choice = self._choices[event.choice]
                if choice.stop is None:
                    if not choice.pending:
                        touched.append(choice)
                    choice.pending.append(event)
            elif type(event) is FinishedEvent:
                choice = self._choices[event.choice]
                self._flush(choice, outputs, last=True)
                outputs.append(self._finish(choice, event))
            elif type(event) is StartedEvent:
                self._start(event, outputs)
        for choice in touched:
            self._flush(choice, outputs)
        return outputs

    def _start(self, event: StartedEvent, outputs: list[Output]) -> None:
        prompt = self._request.prompt
        outputs.append(Started(event.request_id, event.seed, event.cached_tokens, len(prompt)))
        logprobs = event.prompt_logprobs
        text = self._echo_text
        if logprobs is None and text is None:
            return
        # Log-probabilities are the prompt's, so one copy serves all choices.
        size = len(prompt) if logprobs is None else PROMPT_TOKENS_PER_DELTA
        for first in range(0, len(prompt), size):
            ids = prompt[first : first + size]
            scored = () if logprobs is None else tuple(zip(ids, logprobs[first:], strict=False))
            echoed = text if first == 0 and text is not None else ""
            sent = () if text is None else ids
            outputs.append(Delta(0, first, sent, echoed, scored, prompt=True))
        if text is not None:
            outputs.extend(
                Delta(choice.number, 0, prompt, text, prompt=True) for choice in self._choices[1:]
            )

    def _flush(self, choice: _Choice, outputs: list[Output], *, last: bool = False) -> None:
        """Appends the delta of a choice's pending tokens; with ``last``, held-back text too."""
        events, choice.pending = choice.pending, []
        text = ""
        if events:
            text, events = self._push(choice, events)
            if choice.stop is not None and not last:
                self.stream.stop(choice.number)
        if last and choice.stop is None:
            text += choice.assembler.finish() + choice.tail
        if not events and not text:
            return
        first = events[0].index if events else choice.next_index
        choice.next_index = first + len(events)
        ids = [event.token_id for event in events]
        scored = (
            [(event.token_id, event.logprobs) for event in events]
            if self._request.sampling.logprobs is not None
            else ()
        )
        outputs.append(Delta(choice.number, first, ids, text, scored))

    def _push(self, choice: _Choice, events: list[TokenEvent]) -> tuple[str, list[TokenEvent]]:
        """Returns the text of new tokens, and those of them that belong to the answer."""
        ids = [event.token_id for event in events]
        if ids[-1] in self._stop_ids:
            # Kept from the assembler: the text of an end token is not part of the answer, and a
            # special one has no text there.
            last = ids.pop()
            if self._request.sampling.include_stop:
                choice.tail = self._tokenizer.token_text(last)
        if not self._reads:
            return "", events
        delta = choice.assembler.push(ids)
        if not delta.stopped:
            return delta.text, events
        choice.stop = delta.stop
        return delta.text, events[: delta.tokens]

    def _finish(self, choice: _Choice, event: FinishedEvent) -> Finished:
        self._open -= 1
        # A stop string makes the answer complete, whatever the engine met while it was told so.
        stopped = choice.stop is not None
        return Finished(
            choice=choice.number,
            reason=FinishReason.STOP if stopped else event.reason,
            prompt_tokens=event.prompt_tokens,
            output_tokens=choice.next_index if stopped else event.output_tokens,
            cached_tokens=event.cached_tokens,
            timing=event.timing,
            error=None if stopped else event.error,
            stop_token_id=None if stopped else event.stop_token_id,
            stop_string=choice.stop,
        )


class _Choice:
    """One choice being assembled."""

    __slots__ = ("assembler", "next_index", "number", "pending", "stop", "tail")

    def __init__(self, number: int, assembler: TextAssembler, next_index: int) -> None:
        self.number = number
        self.assembler = assembler
        self.next_index = next_index
        self.pending: list[TokenEvent] = []
        self.stop: str | None = None
        self.tail = ""


def find_started(events: Iterable[Event]) -> StartedEvent | None:
    """Returns the start of a request, if it is there; raises what the request failed with."""
    for event in events:
        if isinstance(event, StartedEvent):
            return event
        if isinstance(event, FinishedEvent) and event.error is not None:
            raise event.error
    return None


def find_embedding(events: Iterable[Event]) -> EmbeddingEvent | None:
    """Returns what a prompt means, if it is there; raises what the request failed with."""
    for event in events:
        if isinstance(event, EmbeddingEvent):
            return event
        if isinstance(event, FinishedEvent) and event.error is not None:
            raise event.error
    return None


def stop_ids(sampling: SamplingParams, tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that end an answer and whose text is not part of it."""
    ends = frozenset() if sampling.ignore_eos else tokenizer.eos_ids
    return ends | frozenset(sampling.stop_token_ids)


def assemble(
    tokenizer: Tokenizer, sampling: SamplingParams, resume: Sequence[int]
) -> TextAssembler:
    """Returns the assembler for one choice, behind the tokens that the client already has."""
    return TextAssembler(
        tokenizer,
        stop=sampling.stop,
        include_stop=sampling.include_stop,
        skip_special_tokens=sampling.skip_special_tokens,
        kept=sampling.kept_token_ids,
        context=resume,
    )
