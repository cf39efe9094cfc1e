"""Text in, text out, over an engine that knows only tokens; the same for every door.

    GenerationCall --TextEngine.submit--> Request --Engine.submit--> TokenStream
    Output <-------TextStream.feed------- Event  <-------------------/

``TextEngine`` renders, tokenises and truncates; ``TextStream`` (``text_stream.py``) makes text of
what comes back. Waiting is the door's business: gRPC awaits, a notebook blocks. Ranges are checked
by ``Request.validate``, so all doors refuse alike.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.stream import Waker
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.engine_api import EngineApi
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grammar_compiler import CompiledGrammar, GrammarCompiler
from jaxserve.frontend.parsing import PLAIN, AnswerFormat
from jaxserve.frontend.template import ChatTemplate
from jaxserve.frontend.text_stream import TextStream, assemble, stop_ids
from jaxserve.frontend.tokenizer import Tokenizer

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
