"""OpenAI's chat messages and tools: their types, and how templates and ``chats.py`` take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.http.requests import StrictModel, refuse
from jaxserve.frontend.parsing import Tool

TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
SYSTEM_ROLES = ("system", "developer")


class CalledFunction(StrictModel):
    """What a model called."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call that an earlier answer made."""

    id: str = ""
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class Message(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    # What clients send back of an answer as they received it.
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(StrictModel):
    """A function that may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(StrictModel):
    """A tool of a chat."""

    type: str
    function: Function | None = None
    custom: dict[str, Any] | None = None
    """Refused, by the type."""


class ChatFields(StrictModel):
    """The fields that say what is talked about, which chats and ``/tokenize`` share."""

    messages: list[Message] = Field(default_factory=list)
    tools: list[ToolSpec] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[Any] | None = None

    def refuse_templates(self) -> None:
        """Refuses what the operator alone decides.

        Raises:
            InvalidRequestError: with the name.
        """
        why = "templates are the operator's: launch with --chat-template"
        refuse("chat_template", self.chat_template, (None,), why)
        given = self.chat_template_kwargs or {}
        for name in ("chat_template", "tokenize", "tools", "messages"):
            if name in given:
                raise InvalidRequestError(
                    f"chat_template_kwargs has {name}, which no request decides so; leave it out",
                    field="chat_template_kwargs",
                )
        refuse("documents", self.documents, (None, []), "put them into a message")


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages as chat templates take them.

    Raises:
        InvalidRequestError: content that is no text, or arguments that are no JSON object.
    """
    return [_template_message(place, message) for place, message in enumerate(messages)]


def _template_message(place: int, message: Message) -> dict[str, Any]:
    field = f"messages[{place}]"
    role = "system" if message.role in SYSTEM_ROLES else message.role
    made: dict[str, Any] = {
        "role": "tool" if role == "function" else role,
        "content": text_of(message.content, f"{field}.content"),
    }
    if made["content"] is None and not message.tool_calls:
        made["content"] = message.refusal
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if thoughts := message.reasoning_content or message.reasoning:
        made["reasoning_content"] = thoughts
    if message.tool_calls:
        made["tool_calls"] = [
            _template_call(call, f"{field}.tool_calls[{number}]")
            for number, call in enumerate(message.tool_calls)
        ]
    return made


def _template_call(call: ToolCall, field: str) -> dict[str, Any]:
    """Templates write arguments as JSON, so they are read here first."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"{field}.function.arguments is no JSON object; send back what the answer had",
            field=f"{field}.function.arguments",
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def text_of(content: str | Sequence[Mapping[str, Any]] | None, field: str) -> str | None:
    """Returns the text of a message's content, parts one below the other.

    Raises:
        InvalidRequestError: a part that is no text.
    """
    if content is None or isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in TEXT_TYPES or not isinstance(text, str):
            raise InvalidRequestError(
                f"{field}[{number}] is of the type {str(kind)[:40]!r}; this model takes text only",
                field=f"{field}[{number}]",
            )
        texts.append(text)
    return "\n".join(texts)


def tools_from(specs: Sequence[ToolSpec]) -> list[Tool]:
    """Reads tools.

    Raises:
        InvalidRequestError: one that is no function.
    """
    made = []
    for place, spec in enumerate(specs):
        if spec.type != "function" or spec.function is None:
            raise InvalidRequestError(
                f"tools[{place}] is of the type {spec.type[:40]!r} or has no function; only "
                "functions can be called here",
                field=f"tools[{place}]",
            )
        function = spec.function
        made.append(
            Tool(
                function.name,
                function.description or "",
                function.parameters,
                strict=bool(function.strict),
            )
        )
    return made


def choice_from(choice: str | dict[str, Any] | None, has_tools: bool) -> str:
    """Returns ``Chat.tool_choice``.

    Args:
        choice: a word, or a function by its name: as chats say it, or as responses do.
        has_tools: what is meant by nothing depends on it.

    Raises:
        InvalidRequestError: a word or a type that means nothing.
    """
    match choice:
        case None:
            return "auto" if has_tools else "none"
        case "auto" | "none" | "required":
            return choice
        case {"type": "function", "function": {"name": str() as name, **rest}} if not rest:
            return f"={name}"
        case {"type": "function", "name": str() as name, **rest} if not rest:
            return f"={name}"
        case {"type": "allowed_tools"}:
            why = "is of the type allowed_tools, which is not offered; send these tools alone"
        case {"type": "function"}:
            why = "names no function; send the name and nothing else"
        case {"type": other}:
            why = f"is of the type {str(other)[:40]!r}; only functions can be called here"
        case _:
            why = f"is {str(choice)[:40]!r}; choose auto, none, required, or name a function"
    raise InvalidRequestError(f"tool_choice {why}", field="tool_choice")
