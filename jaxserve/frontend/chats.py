"""Chats as doors that speak of messages and tools see them: a call for the engine, parts back.

    Chat --ChatEngine.call_of--> GenerationCall       Delta --ChatAnswer.push--> parts

Which tools may be called, and whether they must, becomes a grammar here; what the model wrote is
split into content, reasoning and tool calls by ``parsing``. Nothing here knows a protocol.
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
    Part,
    Reasoning,
    Tool,
    ToolCallStarted,
    tool_grammar,
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

        Raises:
            InvalidRequestError: its tools cannot be used, or contradict its grammar.
        """
        self._check_tools(chat)
        grammar = call.grammar
        forced = _forced(chat)
        if forced:
            if grammar is not None:
                raise InvalidRequestError(
                    f"{grammar.field} and tool_choice are given, and an answer obeys one of them; "
                    "leave one out",
                    field="tool_choice",
                )
            source = tool_grammar(
                self.format,
                forced,
                parallel=chat.parallel_tool_calls and chat.tool_choice == "required",
                special_tokens=self._added,
            )
            grammar = Grammar("grammar", source, "tools")
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
            grammar=grammar,
            sampling=replace(call.sampling, kept_token_ids=self._kept),
        )

    async def ask(
        self, door: Door, chat: Chat, call: GenerationCall
    ) -> tuple[TextStream, list[ChatAnswer]]:
        """Submits ``call`` as a chat; returns its stream, and what splits each choice's text.

        Raises:
            JaxserveError: see ``call_of`` and ``Door.ask``.
        """
        built = await door.build(self.call_of(chat, call))
        answers = [self.answer(chat, built[0]) for _ in range(call.sampling.n)]
        return door.open(built), answers

    def answer(self, chat: Chat, request: Request) -> ChatAnswer:
        """Returns what splits one choice of the answer."""
        opens = self.format.reasoning[0] if self.format.reasoning else ""
        tail = self._text.tokenizer.decode(request.prompt[-TAIL_TOKENS:], skip_special_tokens=False)
        return ChatAnswer(
            AnswerParser(
                self.format,
                tools={tool.name: tool.parameters for tool in chat.tools},
                parses_tools=bool(chat.tools) and chat.tool_choice != "none",
                in_reasoning=bool(opens) and tail.rstrip().endswith(opens.strip()),
            )
        )

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
        self.calls = 0
        """Tool calls that have begun."""
        self.reasoning_tokens = 0
        """Tokens of the model's thoughts; one that holds a marker too may count or not."""

    def push(self, text: str, tokens: int) -> list[Part]:
        """Takes the text of so many tokens and returns what it makes certain."""
        parts = self._counted(self._parser.push(text)) if text else []
        if parts and type(parts[-1]) is Reasoning:
            self.reasoning_tokens += tokens
        return parts

    def finish(self) -> list[Part]:
        """Returns what was held back. Once, last."""
        return self._counted(self._parser.finish())

    def _counted(self, parts: list[Part]) -> list[Part]:
        self.calls += sum(type(part) is ToolCallStarted for part in parts)
        return parts


def _forced(chat: Chat) -> list[Tool]:
    """The tools one of which has to be called; empty when none has.

    Raises:
        InvalidRequestError: there is no such tool.
    """
    if chat.tool_choice in ("auto", "none"):
        return []
    if not chat.tools:
        raise InvalidRequestError(
            "tool_choice asks for a call and tools is empty; send the tools", field="tool_choice"
        )
    if chat.tool_choice == "required":
        return list(chat.tools)
    name = chat.tool_choice.removeprefix("=")
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
