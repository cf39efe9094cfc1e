"""Tools and calls in the text of messages, for templates that know neither."""

from __future__ import annotations

import json
from typing import Any

from jaxserve.frontend.parsing import FORMATS, AnswerParser, ToolCallArguments, ToolCallStarted
from jaxserve.frontend.tool_texts import with_tools_in_text

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
USER = {"role": "user", "content": "Hi"}


def test_tools_join_the_system_message_or_make_one() -> None:
    made = with_tools_in_text([USER], TOOLS, FORMATS["smollm2"])
    assert [message["role"] for message in made] == ["system", "user"]
    assert '<tools>[{"name": "f", "parameters": {"type": "object"}}]</tools>' in made[0]["content"]
    assert '<tool_call>[{"name": "NAME", "arguments"' in made[0]["content"]
    system = {"role": "system", "content": "Be brief"}
    joined = with_tools_in_text([system, USER], TOOLS, FORMATS["hermes"])
    assert joined[0]["content"].startswith("Be brief\n\nYou may call")
    assert joined[1:] == [USER]


def test_without_tools_messages_stay_as_they_are() -> None:
    assert with_tools_in_text([USER], [], FORMATS["smollm2"]) == [USER]
    assert with_tools_in_text([USER], TOOLS, FORMATS["plain"]) == [USER]


def test_calls_are_written_as_the_model_writes_them() -> None:
    for name in ("smollm2", "hermes", "llama3"):
        message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
        (made,) = with_tools_in_text([message], [], FORMATS[name])
        assert set(made) == {"role", "content"}
        parser = AnswerParser(FORMATS[name])
        parts = [*parser.push(made["content"]), *parser.finish()]
        assert [part.name for part in parts if isinstance(part, ToolCallStarted)] == ["f", "f"]
        arguments = [part.text for part in parts if isinstance(part, ToolCallArguments)]
        assert [json.loads(text) for text in arguments] == [{"a": "é"}] * 2
    (plain,) = with_tools_in_text(
        [{"role": "assistant", "content": "So:", "tool_calls": [CALL]}], [], FORMATS["plain"]
    )
    assert plain["content"] == 'So:\n[{"name": "f", "arguments": {"a": "é"}}]'
