"""Tools for chat templates that do not know them: what a template would have written, as text.

SmolLM2's template shows neither tools nor calls, although the model was taught a format for both.
Only formats of plain JSON between marks are written; models of all others bring templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.frontend.parsing import AnswerFormat, JsonCalls


def with_tools_in_text(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    format: AnswerFormat,
) -> list[dict[str, Any]]:
    """Returns messages in which tools stand in the system message, and calls in the answers.

    Args:
        messages: as for a template that knows tools.
        tools: in OpenAI's form; may be empty.
        format: says between which marks the model writes calls.
    """
    shape = next((shape for shape in format.tools if isinstance(shape, JsonCalls)), None)
    told = [_without_calls(message, shape) for message in messages]
    if not tools or shape is None:
        return told
    text = _system_text(tools, shape)
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _without_calls(message: Mapping[str, Any], shape: JsonCalls | None) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return {**message}
    calls = [
        {
            "name": call["function"]["name"],
            (shape.argument_keys[0] if shape else "arguments"): call["function"]["arguments"],
        }
        for call in message["tool_calls"]
    ]
    text = json.dumps(calls, ensure_ascii=False) if shape is None else _written(calls, shape)
    parts = [message.get("content"), text]
    return {"role": message["role"], "content": "\n".join(part for part in parts if part)}


def _written(calls: Sequence[Mapping[str, Any]], shape: JsonCalls) -> str:
    if shape.is_list:
        return f"{shape.begin}{json.dumps(calls, ensure_ascii=False)}{shape.end}"
    begin, end = ("", "") if shape.bare else (shape.begin, shape.end)
    pad = shape.padding
    texts = [f"{begin}{pad}{json.dumps(call, ensure_ascii=False)}{pad}{end}" for call in calls]
    return shape.between.join(texts)


def _system_text(tools: Sequence[Mapping[str, Any]], shape: JsonCalls) -> str:
    schemas = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    example = _written([{"name": "NAME", shape.argument_keys[0]: {"PARAMETER": "VALUE"}}], shape)
    return (
        f"You may call these functions:\n<tools>{schemas}</tools>\n"
        f"To call some, answer with nothing but this:\n{example}"
    )
