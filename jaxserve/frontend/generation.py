"""Text in, text out, over an engine that knows only tokens; the same for every door.

    GenerationCall --TextEngine.submit--> Request --Engine.submit--> TokenStream
    Output <-------TextStream.feed------- Event  <-------------------/

``TextEngine`` renders, tokenises and truncates; ``TextStream`` is a plain state machine: events go
in, ``Started``, ``Delta`` and ``Finished`` come out. Waiting is the door's business: gRPC awaits,
a notebook blocks. Ranges are checked by ``Request.validate``, so all doors refuse alike.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from jaxserve.engine.stream import TokenStream, Waker
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.engine_api import EngineApi
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grammar_compiler import CompiledGrammar, GrammarCompiler
from jaxserve.frontend.parsing import PLAIN, AnswerFormat
from jaxserve.frontend.template import ChatTemplate
from jaxserve.frontend.text import TextAssembler
from jaxserve.frontend.tokenizer import Tokenizer

PROMPT_TOKENS_PER_DELTA = 512
"""Prompt tokens in one delta when log-probabilities are asked for. With 20 alternatives a token is
about 700 bytes on the wire, so a delta stays far below the usual 4 MiB message limit."""

MAX_PROMPTS = 256
"""Of one request that takes several: completions, embeddings."""
EMBEDDING = SamplingParams(max_tokens=1, temperature=0.0)
"""Of a call that wants no answer."""


def check_prompts(count: int, *, field: str) -> None:
    """Refuses requests of no prompts, or of too many.

    Raises:
        InvalidRequestError: with the number.
    """
    if not 1 <= count <= MAX_PROMPTS:
        raise InvalidRequestError(
            f"{field} has {count} prompts; send 1 to {MAX_PROMPTS}, and more in further requests",
            field=field,
        )


@dataclass(frozen=True, kw_only=True)
class GenerationCall:
    """What a client asked for, in the words of no protocol. Exactly one prompt form is set."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    """Chat messages with ``role`` and ``content``, for the model's template. An answer that called
    tools has ``tool_calls``, and may have no text."""
    add_generation_prompt: bool = True
    """Chat only: end with the header that makes the model answer."""
    continue_final_message: bool = False
    """Chat only: end within the last message, which the model goes on with."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Chat only: JSON schemas of functions, for templates that know them."""
    template_variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Chat only: more names for the template, such as ``enable_thinking``."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    """Empty: one is chosen."""
    truncate_prompt_tokens: int | None = None
    """Keep the last so many tokens of the prompt; at least 1."""
    echo: bool = False
    """Give back the prompt's tokens and text first."""
    resume: Sequence[int] = ()
    """Output tokens that the client already has."""
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None
    """On the ``time.monotonic`` clock."""
    grammar: Grammar | None = None
    """What the answer has to be."""
    embed: bool = False
    """What the prompt means is wanted, and no answer."""


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


class TextEngine:
    """Generates text: an engine, its tokenizer and its chat template."""

    def __init__(
        self,
        engine: EngineApi,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        grammars: GrammarCompiler | None = None,
        answer_format: AnswerFormat = PLAIN,
    ) -> None:
        """Keeps them all; none is closed here.

        Args:
            engine: computes.
            tokenizer: of the model.
            template: None refuses chats.
            grammars: None refuses whatever has a grammar.
            answer_format: how the model writes reasoning and tool calls, for doors that split them.
        """
        self.answer_format = answer_format
        self.grammars = grammars
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template

    def encode(
        self, call: GenerationCall, *, add_special_tokens: bool = True
    ) -> tuple[Sequence[int], str | None]:
        """Returns the whole prompt as tokens, and its text unless token ids were given.

        Takes about a microsecond a character: off the event loop when the prompt is long. An empty
        text gives what the tokenizer makes of it.

        Args:
            call: only its prompt is looked at.
            add_special_tokens: begin plain text with the model's start tokens. Chat templates
                write their own.

        Raises:
            InvalidRequestError: none or several prompts, no messages, or no chat template.
        """
        given = [
            name for name in ("text", "token_ids", "messages") if getattr(call, name) is not None
        ]
        if len(given) != 1:
            raise InvalidRequestError(
                f"prompt needs exactly one of text, token_ids and chat, got {len(given)}",
                field="prompt",
            )
        if call.token_ids is not None:
            return call.token_ids, None
        if call.text is not None:
            ids = self.tokenizer.encode(call.text, add_special_tokens=add_special_tokens)
            return ids, call.text
        text = self._render(call)
        return self.tokenizer.encode(text, add_special_tokens=False), text

    def build_request(
        self, call: GenerationCall, compiled: CompiledGrammar | None = None
    ) -> tuple[Request, str | None]:
        """Returns the request for the engine, and the prompt's text when ``echo`` needs it.

        Args:
            call: what is asked for.
            compiled: its grammar, which ``compiler_of`` has compiled.

        Raises:
            InvalidRequestError: the prompt, its truncation or what is resumed cannot be used.
        """
        if call.resume:
            self._check_resume(call)
        if call.text == "":
            # Refused although the start token alone would make a prompt: nobody means that.
            raise InvalidRequestError(
                "prompt is empty; send at least one token of text, chat or token_ids",
                field="prompt",
            )
        prompt, text = self.encode(call)
        keep = call.truncate_prompt_tokens
        if keep is not None:
            if keep < 1:
                raise InvalidRequestError(
                    f"truncate_prompt_tokens must be at least 1, got {keep}; leave it unset to "
                    "keep the whole prompt",
                    field="truncate_prompt_tokens",
                )
            if len(prompt) > keep:
                prompt, text = prompt[-keep:], None
        if call.echo and text is None and self._in_range(prompt):
            text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        request = Request(
            request_id=call.request_id or uuid.uuid4().hex,
            prompt=prompt,
            sampling=call.sampling,
            resume=call.resume,
            priority=call.priority,
            cache_salt=call.cache_salt,
            deadline_s=call.deadline_s,
            constraint=compiled,
            embed=call.embed,
        )
        return request, text if call.echo else None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of whole tokens.

        Raises:
            InvalidRequestError: an id that the model does not have.
        """
        vocab_size = self.engine.limits.vocab_size
        bad = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"token_ids holds token id {bad}; this model's ids are 0 to {vocab_size - 1}",
                field="token_ids",
            )
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def submit(self, call: GenerationCall, waker: Waker) -> TextStream:
        """Tokenises and submits; for doors that may block while doing so.

        Raises:
            JaxserveError: whatever ``GrammarCompiler.compile``, ``build_request`` and
                ``Engine.submit`` raise.
        """
        grammar = call.grammar
        compiled = grammar and self.compiler_of(grammar).compile(grammar)
        request, echo_text = self.build_request(call, compiled)
        return self.open(request, echo_text, waker)

    def open(
        self,
        request: Request,
        echo_text: str | None,
        waker: Waker,
        *,
        with_text: bool = True,
    ) -> TextStream:
        """Submits what ``build_request`` returned; never blocks.

        Raises:
            JaxserveError: whatever ``Engine.submit`` raises.
        """
        stream = self.engine.submit(request, waker)
        return TextStream(stream, request, self.tokenizer, echo_text=echo_text, with_text=with_text)

    def compiler_of(self, grammar: Grammar) -> GrammarCompiler:
        """Returns what compiles a call's grammar, before ``build_request``.

        Raises:
            InvalidRequestError: this engine compiles none.
        """
        if self.grammars is None:
            raise InvalidRequestError(
                f"{grammar.field} is given, and this engine compiles no grammars; leave it out",
                field=grammar.field,
            )
        return self.grammars

    def _render(self, call: GenerationCall) -> str:
        messages = call.messages or ()
        if self.template is None:
            raise InvalidRequestError(
                "this model has no chat template; send text or token_ids instead of chat",
                field="chat",
            )
        if not messages:
            raise InvalidRequestError(
                "chat has no messages; send at least one", field="chat.messages"
            )
        for number, message in enumerate(messages):
            without_text = message.get("content") is None and message.get("tool_calls")
            if not without_text and not isinstance(message.get("content"), str):
                raise InvalidRequestError(
                    f"chat.messages[{number}] has no text; a message looks like "
                    "{'role': 'user', 'content': 'Hello'}",
                    field=f"chat.messages[{number}].content",
                )
        if call.continue_final_message and not messages[-1].get("content"):
            raise InvalidRequestError(
                "continue_final_message is set and the last message has no text to go on with",
                field="continue_final_message",
            )
        text = self.template.render(
            messages,
            add_generation_prompt=call.add_generation_prompt and not call.continue_final_message,
            tools=call.tools or None,
            variables=call.template_variables,
        )
        if not call.continue_final_message:
            return text
        # Templates end the message; what they write behind its text is left off.
        last = str(messages[-1]["content"]).rstrip()
        found = text.rfind(last.strip())
        if found < 0:
            raise InvalidRequestError(
                "continue_final_message is set, and this model's template does not show the last "
                "message as it is; leave it out",
                field="continue_final_message",
            )
        return text[: found + len(last.strip())]

    def _check_resume(self, call: GenerationCall) -> None:
        """Refuses to continue an answer that was already complete."""
        if not self._in_range(call.resume):
            return  # Request.validate says it better.
        last = call.resume[-1]
        if last in stop_ids(call.sampling, self.tokenizer):
            raise InvalidRequestError(
                f"resume ends with token {last}, which ends the answer; nothing is left to "
                "generate",
                field="resume",
            )
        found = assemble(self.tokenizer, call.sampling, call.resume).stop
        if found is not None:
            raise InvalidRequestError(
                f"resume already contains the stop string {found!r}; nothing is left to generate",
                field="resume",
            )

    def _in_range(self, ids: Sequence[int]) -> bool:
        return bool(ids) and min(ids) >= 0 and max(ids) < self.engine.limits.vocab_size


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
