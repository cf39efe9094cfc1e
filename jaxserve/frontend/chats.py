"""Chats as doors that speak of messages and tools see them: a call for the engine, parts back.

    Chat --ChatEngine.call_of--> GenerationCall       Delta --ChatAnswer.push--> parts

Which tools may be called, and whether they must, becomes a grammar here, behind the thoughts that
the prompt leaves room for; what the model wrote is split into content, reasoning and tool calls by
``parsing``. Nothing here knows a protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.engine.request import Request
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import GenerationCall, TextEngine
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.parsing import (
    AnswerFormat,
    AnswerParser,
    Otherwise,
    Part,
    Reasoning,
    Thoughts,
    Tool,
    answer_grammar,
)
from jaxserve.frontend.text_stream import TextStream
from jaxserve.frontend.tool_texts import with_tools_in_text

MAX_TOOLS = 128
MAX_TOOL_NAME_CHARS = 64
TAIL_TOKENS = 16
"""Of a prompt, which say whether it ends inside the model's thoughts."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What a client asked for beside how tokens are chosen."""

    messages: Sequence[Mapping[str, Any]]
    """For the model's template: ``role``, ``content``, and what else templates know."""
    tools: Sequence[Tool] = ()
    tool_choice: str = "auto"
    """``auto``, ``none``, ``required``, or ``=NAME``: this one has to be called."""
    parallel_tool_calls: bool = True
    template_variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatEngine:
    """Chats of one model. Read-only, so safe to share."""

    def __init__(self, text: TextEngine) -> None:
        """Looks up what the model's way of writing tool calls means to its tokenizer."""
        self.format: AnswerFormat = text.answer_format
        fast = text.tokenizer.fast
        added = fast.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        special = text.tokenizer.special_ids
        self._kept = tuple(
            number
            for marker in self.format.markers
            if (number := self._added.get(marker)) is not None and number in special
        )
        self._template_knows_tools = text.template is None or "tool" in text.template.text
        self._text = text

    def call_of(self, chat: Chat, call: GenerationCall) -> GenerationCall:
        """Returns ``call`` with everything that follows from a chat.

        Its grammar is left off: what stands around it depends on how the prompt ends.

        Raises:
            InvalidRequestError: its tools cannot be used.
        """
        self._check_tools(chat)
        tools = [] if chat.tool_choice == "none" else [_schema(tool) for tool in chat.tools]
        messages = chat.messages
        if not self._template_knows_tools:
            messages = with_tools_in_text(messages, tools, self.format)
        return replace(
            call,
            messages=messages,
            tools=tools,
            template_variables=chat.template_variables,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            grammar=None,
            sampling=replace(call.sampling, kept_token_ids=self._kept),
        )

    async def ask(
        self, door: Door, chat: Chat, call: GenerationCall
    ) -> tuple[TextStream, list[ChatAnswer]]:
        """Submits ``call`` as a chat; returns its stream, and what splits each choice's text.

        Raises:
            JaxserveError: its grammar and its tools contradict each other; see ``call_of`` and
                ``Door.ask``, too.
        """
        tools = _callable(chat, call.grammar)
        request, echo_text = await door.build(self.call_of(chat, call))
        thoughts = self._thoughts(chat, request)
        grammar = self._grammar(chat, tools, call.grammar, thoughts)
        if grammar is not None:
            request = replace(request, constraint=await door.compile(grammar))
        has_grammar = call.grammar is not None
        answers = [self._answer(chat, thoughts, has_grammar) for _ in range(call.sampling.n)]
        return door.open((request, echo_text)), answers

    def _answer(self, chat: Chat, thoughts: Thoughts, has_grammar: bool) -> ChatAnswer:
        """Returns what splits one choice of the answer."""
        return ChatAnswer(
            AnswerParser(
                self.format,
                tools={tool.name: tool.parameters for tool in chat.tools},
                parses_tools=bool(chat.tools) and chat.tool_choice != "none",
                in_reasoning=thoughts is Thoughts.OPEN,
                text_or_calls=has_grammar,
            )
        )

    def _thoughts(self, chat: Chat, request: Request) -> Thoughts:
        """Returns whether the model thinks, or may, before it answers."""
        if self.format.reasoning is None:
            return Thoughts.NONE
        opening, closing = (marker.strip() for marker in self.format.reasoning)
        tail = self._text.tokenizer.decode(request.prompt[-TAIL_TOKENS:], skip_special_tokens=False)
        tail = tail.rstrip()
        if tail.endswith(opening):
            return Thoughts.OPEN
        begins = chat.add_generation_prompt and not chat.continue_final_message
        # A model that was taught to think has a token for it.
        is_taught = any(map(opening.startswith, self._added))
        may_think = begins and is_taught and not tail.endswith(closing)
        return Thoughts.POSSIBLE if may_think else Thoughts.NONE

    def _grammar(
        self, chat: Chat, tools: Sequence[Tool], answer: Grammar | None, thoughts: Thoughts
    ) -> Grammar | None:
        """Returns what a whole answer has to be; None when it may be anything.

        Args:
            chat: is asked for how many calls there may be.
            tools: that may be called in an answer which obeys.
            answer: what the client says an answer in words has to be.
            thoughts: may stand before either.
        """
        if answer is None and not tools:
            return None
        if answer is not None and not tools and thoughts is Thoughts.NONE:
            return answer
        otherwise = Otherwise.TEXT if chat.tool_choice == "auto" else Otherwise.NOTHING
        lark = answer_grammar(
            self.format,
            tools=tools,
            otherwise=otherwise if answer is None else Otherwise.ANSWER,
            parallel=chat.parallel_tool_calls and not chat.tool_choice.startswith("="),
            thoughts=thoughts,
            special_tokens=self._added,
        )
        if answer is None:
            return Grammar("grammar", lark, "tools")
        return replace(answer, frame=lark)

    def _check_tools(self, chat: Chat) -> None:
        if len(chat.tools) > MAX_TOOLS:
            raise InvalidRequestError(
                f"tools has {len(chat.tools)} entries and the limit is {MAX_TOOLS}; send fewer",
                field="tools",
            )
        names = [tool.name for tool in chat.tools]
        for place, name in enumerate(names):
            letters = name.replace("_", "").replace("-", "").replace(".", "")
            if not (letters.isascii() and letters.isalnum()) or len(name) > MAX_TOOL_NAME_CHARS:
                raise InvalidRequestError(
                    f"tools[{place}] is named {name[:80]!r}; names have 1 to {MAX_TOOL_NAME_CHARS} "
                    "letters, digits, underscores, hyphens and dots",
                    field=f"tools[{place}].function.name",
                )
            kind = (chat.tools[place].parameters or {}).get("type", "object")
            if kind != "object":
                raise InvalidRequestError(
                    f"tools[{place}].parameters has the type {str(kind)[:40]!r}; arguments are an "
                    "object",
                    field=f"tools[{place}].function.parameters",
                )
            if name in names[:place]:
                raise InvalidRequestError(
                    f"tools has {name!r} twice; give every function a name of its own",
                    field=f"tools[{place}].function.name",
                )
        if chat.tools and not self.format.tools and chat.tool_choice != "none":
            raise InvalidRequestError(
                f"this model's answers (format {self.format.name!r}) have no tool calls; send the "
                "request without tools",
                field="tools",
            )


class ChatAnswer:
    """One choice's text, split; and what was in it, for its finish reason."""

    def __init__(self, parser: AnswerParser) -> None:
        """Begins at the first character."""
        self._parser = parser
        self.reasoning_tokens = 0
        """Tokens of the model's thoughts; one that holds a marker too may count or not."""

    def push(self, text: str, tokens: int) -> list[Part]:
        """Takes the text of so many tokens and returns what it makes certain."""
        parts = self._parser.push(text) if text else []
        if parts and type(parts[-1]) is Reasoning:
            self.reasoning_tokens += tokens
        return parts

    def finish(self) -> list[Part]:
        """Returns what was held back. Once, last."""
        return self._parser.finish()

    @property
    def ends_with_calls(self) -> bool:
        """Whether tools are called, and the last call is whole."""
        return self._parser.calls > 0 and not self._parser.in_call


def _callable(chat: Chat, grammar: Grammar | None) -> Sequence[Tool]:
    """The tools that an answer may call which obeys; empty when calls are not to be watched.

    Raises:
        InvalidRequestError: there is no such tool, or the answer has to obey a grammar and to be a
            call as well.
    """
    choice = chat.tool_choice
    if choice == "none":
        return ()
    if choice == "auto":
        # Otherwise the model is trusted to call them well.
        is_promised = not chat.parallel_tool_calls or any(tool.strict for tool in chat.tools)
        return chat.tools if is_promised or grammar is not None else ()
    if not chat.tools:
        raise InvalidRequestError(
            "tool_choice asks for a call and tools is empty; send the tools", field="tool_choice"
        )
    if grammar is not None:
        raise InvalidRequestError(
            f"{grammar.field} is given and tool_choice asks for a call, and an answer is one of "
            "them; leave one out",
            field="tool_choice",
        )
    if choice == "required":
        return chat.tools
    name = choice.removeprefix("=")
    found = [tool for tool in chat.tools if tool.name == name]
    if not found:
        raise InvalidRequestError(
            f"tool_choice names {name[:80]!r}, which is not among tools; choose one of "
            f"{', '.join(tool.name for tool in chat.tools)[:400]}",
            field="tool_choice",
        )
    return found


def _schema(tool: Tool) -> dict[str, Any]:
    """A tool as templates read it: OpenAI's form."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}
