"""Whole answers of each family, as their chat templates write them, and what they consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.frontend.parsing import (
    FORMATS,
    AnswerParser,
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallEnded,
    ToolCallStarted,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city"],
}
TOOLS: dict[str, Mapping[str, Any] | None] = {"get_weather": SCHEMA, "now": None}


@dataclass(frozen=True)
class Golden:
    """One answer of one family."""

    family: str
    text: str
    parts: list[Part]
    in_reasoning: bool = False
    tools: Mapping[str, Mapping[str, Any] | None] = field(default_factory=lambda: TOOLS)

    def parser(self) -> AnswerParser:
        return AnswerParser(FORMATS[self.family], tools=self.tools, in_reasoning=self.in_reasoning)

    def __str__(self) -> str:
        return f"{self.family}-{self.text[:30]!r}"


def call(name: str, arguments: str, index: int = 0) -> list[Part]:
    return [
        ToolCallStarted(index, name),
        ToolCallArguments(index, arguments),
        ToolCallEnded(index),
    ]


def mark(name: str) -> str:
    """One of DeepSeek's markers."""
    return f"<\uff5ctool▁{name}\uff5c>"


PARIS = '{"city": "Paris", "days": 3}'
BOTH = call("get_weather", PARIS) + call("now", "{}", 1)

GOLDEN = [
    Golden(
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        BOTH,
    ),
    Golden(
        "hermes",
        "<think>\nThey ask\n\nfor weather.\n</think>\n\nLet me look.\n"
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        [
            Reasoning("They ask\n\nfor weather."),
            Content("Let me look.\n"),
            *call("get_weather", PARIS),
        ],
    ),
    Golden(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "</tool_call> \\u00e9 \\"[TOOL_CALLS]\\" {", "more": [{"a": [1.5e3, null]}]}}\n'
        "</tool_call>Done.",
        [
            *call(
                "get_weather",
                '{"city": "</tool_call> \\u00e9 \\"[TOOL_CALLS]\\" {", '
                '"more": [{"a": [1.5e3, null]}]}',
            ),
            Content("Done."),
        ],
    ),
    Golden(
        "smollm2",
        f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS}}}, '
        '{"name": "now", "arguments": {}}]</tool_call>',
        BOTH,
    ),
    Golden(
        "smollm2",
        f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>',
        call("get_weather", PARIS),
    ),
    Golden(
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"
        'Paris </b> "x"\n\\ y\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
        "<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [
            Content("I look.\n"),
            *call(
                "get_weather",
                '{"city": "Paris </b> \\"x\\"\\n\\\\ y", "days": 3, "unit": "C"}',
            ),
            *call("now", "{}", 1),
        ],
    ),
    Golden(
        "glm",
        "\n<think>Weather.</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        "</tool_call>\n<tool_call>now\n</tool_call>",
        [Reasoning("Weather."), *BOTH],
    ),
    Golden(
        "llama3",
        f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "now", "parameters": {{}}}}',
        BOTH,
    ),
    Golden(
        "llama3",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}\n'
        '{"name": "now", "parameters": {}}',
        BOTH,
    ),
    Golden(
        "llama3",
        '{"id<|python_tag|>{"name": "now", "parameters": {}}',
        [Content('{"id'), *call("now", "{}")],
    ),
    Golden("llama3", '{"id<|python_tag|>{"na', [Content('{"id<|python_tag|>{"na')]),
    Golden(
        "mistral",
        f"[THINK]Weather.[/THINK]Looking.[TOOL_CALLS]get_weather[ARGS]{PARIS}"
        "[TOOL_CALLS]now[ARGS]{}",
        [Reasoning("Weather."), Content("Looking."), *BOTH],
    ),
    Golden(
        "mistral_list",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}, "id": "abcdefghi"}}, '
        '{"name": "now", "arguments": {}, "id": "abcdefghj"}]',
        BOTH,
    ),
    Golden(
        "deepseek",
        f"They ask.\n</think>\n\n{mark('calls▁begin')}{mark('call▁begin')}function{mark('sep')}"
        f"get_weather\n```json\n{PARIS}\n```{mark('call▁end')}\n{mark('call▁begin')}function"
        f"{mark('sep')}now\n```json\n{{}}\n```{mark('call▁end')}{mark('calls▁end')}",
        [Reasoning("They ask."), *BOTH],
        in_reasoning=True,
    ),
    Golden(
        "deepseek_v3_1",
        f"</think>Wait.{mark('calls▁begin')}{mark('call▁begin')}get_weather{mark('sep')}{PARIS}"
        f"{mark('call▁end')}{mark('call▁begin')}now{mark('sep')}{{}}{mark('call▁end')}"
        f"{mark('calls▁end')}",
        [Content("Wait."), *BOTH],
        in_reasoning=True,
    ),
    Golden(
        "kimi",
        "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_call_begin|>functions.now:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        [Content("Ok."), *BOTH],
    ),
    Golden(
        "granite",
        f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS}}}, '
        '{"name": "now", "arguments": {}}]',
        BOTH,
    ),
    Golden(
        "command_r",
        "<|START_THINKING|>I will look.<|END_THINKING|><|START_ACTION|>[\n"
        f'    {{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {PARIS}}},\n'
        '    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
        [Reasoning("I will look."), *BOTH],
    ),
    Golden(
        "apriel",
        f'\n<tool_calls>[{{"name": "get_weather", "arguments": {PARIS}}}, '
        '{"name": "now", "arguments": {}}]</tool_calls>',
        BOTH,
    ),
    Golden("gemma4", "<|channel>thought\nHm.\n<channel|>Hi.", [Reasoning("Hm."), Content("Hi.")]),
    Golden("thinking", "<think>\n\n</think>\n\nHi.", [Content("Hi.")]),
    Golden("plain", " <think>Hi.</think><tool_call>", [Content(" <think>Hi.</think><tool_call>")]),
]


def joined(parts: list[Part]) -> list[Part]:
    """Joins neighbours that would be one part had the text come at once."""
    result: list[Part] = []
    for part in parts:
        match (result[-1] if result else None), part:
            case Content(before), Content(text):
                result[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                result[-1] = Reasoning(before + text)
            case ToolCallArguments(index, before), ToolCallArguments(same, text) if index == same:
                result[-1] = ToolCallArguments(index, before + text)
            case _:
                result.append(part)
    return result


def read(parser: AnswerParser, *pieces: str) -> list[Part]:
    """Feeds pieces and returns the whole answer."""
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined(parts + parser.finish())
