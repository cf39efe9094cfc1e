"""The rules of splitting, one by one; whole answers are in ``test_golden.py``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.parsing import (
    FORMATS,
    AnswerParser,
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallEnded,
    ToolCallStarted,
    calls,
)
from jaxserve.frontend.parsing.json_scanner import MAX_DEPTH
from jaxserve.frontend.parsing.reading import MAX_NAME_CHARS
from tests.frontend.parsing.golden import call, joined, mark, read

MARKERS = [marker for format in FORMATS.values() for marker in format.markers]


def parse(family: str, text: str, **options: Any) -> list[Part]:
    """Reads a text whole and by character, which must agree."""
    whole = read(AnswerParser(FORMATS[family], **options), text)
    assert read(AnswerParser(FORMATS[family], **options), *text) == whole
    return whole


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


# Nothing is lost.


@given(text=st.text(), family=st.sampled_from(sorted(FORMATS)))
def test_text_without_markers_comes_back(text: str, family: str) -> None:
    parts = parse(family, text)
    if any(isinstance(part, ToolCallStarted) for part in parts):
        return
    assert parts == ([Content(text)] if text else [])


@given(
    pieces=st.lists(st.sampled_from(MARKERS) | st.text(max_size=4) | st.sampled_from(' \n{["')),
    family=st.sampled_from(sorted(FORMATS)),
)
def test_text_full_of_markers_is_lost_in_no_piece(pieces: list[str], family: str) -> None:
    text = "".join(pieces)
    parse(family, text)
    parts = parse(family, text, parses_reasoning=False)
    if not any(isinstance(part, ToolCallStarted) for part in parts):
        assert parts == ([Content(text)] if text else [])


@given(
    pieces=st.lists(st.sampled_from(MARKERS) | st.text(max_size=4)),
    family=st.sampled_from(sorted(FORMATS)),
)
def test_with_all_parsing_off_everything_is_content(pieces: list[str], family: str) -> None:
    text = "".join(pieces)
    parts = parse(family, text, parses_tools=False, parses_reasoning=False)
    assert parts == ([Content(text)] if text else [])


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", "<tool_call>hello</tool_call>"),
        ("hermes", "<tool_call>\n[]</tool_call>"),
        ("hermes", "<tool_call>{}</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": {}, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name" "f"}</tool_call>'),
        ("hermes", "a < b <tool <tool_cal"),
        ("hermes", "<<think>"),
        ("hermes", "Text about <think> and </think>."),
        ("llama3", '{"name": "f", "age": 5}'),
        ("llama3", '{"name": "f"}'),
        ("llama3", '{"answer": 42}'),
        ("llama3", 'Like this: {"name": "f", "parameters": {}}'),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", "[TOOL_CALLS]f g[ARGS]{}"),
        ("mistral", "[TOOL_CALLS]f[ARGS]nothing"),
        ("mistral", "[TOOL_CALLS][ARGS]{}"),
        ("mistral", "[TOOL_CALLS]other[ARGS]{}"),
        ("deepseek", f"{mark('calls▁begin')}hello"),
        (
            "deepseek",
            f"{mark('calls▁begin')}{mark('call▁begin')}thing{mark('sep')}f\n```json\n{{}}",
        ),
        ("qwen3_coder", "<tool_call>\n<function=other>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f g>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f>\nhello"),
        ("qwen3_coder", '<tool_call>{"name": "f"}</tool_call>'),
        ("glm", '<tool_call>{"name": "f"}\n</tool_call>'),
    ],
)
def test_what_only_looks_like_a_call_is_content_unaltered(family: str, text: str) -> None:
    assert parse(family, text, tools={"f": None}) == [Content(text)]
    assert parse(family, f"{text} On.", tools={"f": None}) == [Content(f"{text} On.")]


def test_a_call_may_follow_what_looked_like_one() -> None:
    text = '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse("hermes", text) == [Content("<tool_call>"), *call("f", "{}")]


def test_a_marker_may_begin_in_what_looked_like_one() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse("hermes", f"<{text}") == [Content("<"), *call("f", "{}")]
    assert parse("hermes", f"a<tool_{text}") == [Content("a<tool_"), *call("f", "{}")]


def test_limits_turn_calls_into_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_HELD_CHARS", 1000)
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    long = "n" * (MAX_NAME_CHARS + 1)
    held = '"' + "x" * 1000 + '"'
    for text in (
        f'<tool_call>{{"arguments": {{"a": {deep}}}, "name": "f"}}</tool_call>',
        f'<tool_call>{{"name": "{long}", "arguments": {{}}}}</tool_call>',
        f'<tool_call>{{"{long}": 1, "name": "f"}}</tool_call>',
        f'<tool_call>{{"arguments": {{"a": {held}}}, "name": "f"}}</tool_call>',
    ):
        assert read(AnswerParser(FORMATS["hermes"]), text) == [Content(text)]
    for family, text in (
        ("mistral", f"[TOOL_CALLS]{long}[ARGS]{{}}"),
        ("glm", f"<tool_call>{long}</tool_call>"),
    ):
        assert parse(family, text) == [Content(text)]


# Text is given as soon as it is certain.


def test_content_is_held_only_while_it_could_become_a_marker() -> None:
    parser = AnswerParser(FORMATS["hermes"])
    pushed = [parser.push(piece) for piece in ["Hi", " <", "tool", "box", "> <tool_cal", "!"]]
    assert pushed == [
        [Content("Hi")],
        [Content(" ")],
        [],
        [Content("<toolbox")],
        [Content("> ")],
        [Content("<tool_cal!")],
    ]


def test_an_answer_in_json_is_not_held_to_its_end() -> None:
    parser = AnswerParser(FORMATS["llama3"])
    assert parser.push('{"answer"') == [Content('{"answer"')]
    parser = AnswerParser(FORMATS["llama3"])
    assert parser.push('{"type": "function", "name": "f", "parameters": {}') == call("f", "{}")


def test_arguments_are_streamed_as_they_arrive() -> None:
    parser = AnswerParser(FORMATS["hermes"])
    assert parser.push('<tool_call>{"name": "f", ') == []
    assert parser.push('"arguments": {"a') == [
        ToolCallStarted(0, "f"),
        ToolCallArguments(0, '{"a'),
    ]
    assert parser.push('": 1') == [ToolCallArguments(0, '": 1')]
    assert parser.push("}") == [ToolCallArguments(0, "}"), ToolCallEnded(0)]
    assert parser.push("}\n</tool_call>\n") == parser.finish() == []


def test_strings_between_tags_are_streamed_as_they_arrive() -> None:
    tools = {"f": {"properties": {"a": {"type": "string"}, "n": {"type": "number"}}}}
    parser = AnswerParser(FORMATS["qwen3_coder"], tools=tools)
    assert parser.push("<tool_call>\n<function=f>\n<para") == []
    assert parser.push("meter=a>\nx\n") == [
        ToolCallStarted(0, "f"),
        ToolCallArguments(0, '{"a": "x'),
    ]
    assert parser.push('"</para') == [ToolCallArguments(0, '\\n\\"')]
    assert parser.push("meter>\n<parameter=n>1") == [ToolCallArguments(0, '", "n": ')]
    assert parser.push("2\n</parameter></function>") == [
        ToolCallArguments(0, "12}"),
        ToolCallEnded(0),
    ]


def test_arguments_in_front_of_their_name_wait_for_it() -> None:
    parser = AnswerParser(FORMATS["hermes"])
    assert parser.push('<tool_call>{"parameters": {"name": "x"}, "name": "f') == []
    assert parser.push('"') == call("f", '{"name": "x"}')
    assert parser.push("}</tool_call>") == parser.finish() == []


def test_other_members_are_passed_over() -> None:
    text = (
        '<tool_call>{"id": 7, "type": ["function", {"name": 1}], "name": "f\\u0041", '
        '"arguments": {}, "more": {"arguments": {}}, "x": true}</tool_call>'
    )
    assert parse("hermes", text) == call("fA", "{}")


def test_a_call_without_arguments_has_none() -> None:
    assert parse("hermes", '<tool_call>{"name": "f"}</tool_call>') == call("f", "{}")


# Calls that are cut off or break.


@pytest.mark.parametrize(
    ("text", "given", "rest"),
    [
        ('<tool_call>{"name": "f", "argum', None, '<tool_call>{"name": "f", "argum'),
        ('<tool_call>{"name": "f", "arguments": {"a": "b', '{"a": "b', ""),
        ('<tool_call>{"name": "f", "arguments": {"a": x}}', '{"a": ', "x}}"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1]}', '{"a": 1', "]}"),
    ],
)
def test_an_unfinished_call_keeps_what_was_given(text: str, given: str | None, rest: str) -> None:
    expected: list[Part] = []
    if given is not None:
        expected = [ToolCallStarted(0, "f"), ToolCallArguments(0, given)]
    assert parse("hermes", text) == expected + ([Content(rest)] if rest else [])


def test_arguments_that_are_too_deep_break_their_call() -> None:
    text = "[TOOL_CALLS]f[ARGS]" + '{"a":' * (MAX_DEPTH + 1)
    given = '{"a":' * MAX_DEPTH
    assert parse("mistral", text) == [
        ToolCallStarted(0, "f"),
        ToolCallArguments(0, given),
        Content('{"a":'),
    ]


def test_an_unfinished_value_between_tags_comes_back() -> None:
    tools = {"f": {"properties": {"n": {"type": "number"}}}}
    text = "<tool_call>\n<function=f>\n<parameter=n>\n12"
    assert parse("qwen3_coder", text, tools=tools) == [
        ToolCallStarted(0, "f"),
        ToolCallArguments(0, '{"n": '),
        Content("\n12"),
    ]
    tools = {"f": {"properties": {"a": {"type": "string"}}}}
    text = "<tool_call>\n<function=f>\n<parameter=a>\nx\n\n</para"
    assert parse("qwen3_coder", text, tools=tools) == [
        ToolCallStarted(0, "f"),
        ToolCallArguments(0, '{"a": "x\\n'),
        Content("\n</para"),
    ]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('<tool_call>{"name": "f", "arguments": {}}', ""),
        ('<tool_call>{"name": "f", "arguments": {}', ""),
        ('<tool_call>{"name": "f", "arguments": {}\n</tool_call>', ""),
        ('<tool_call>[{"name": "f", "arguments": {}]</tool_call>', ""),
        ('<tool_call>{"name": "f", "arguments": {}, 5}</tool_call>', ", 5}</tool_call>"),
        ('<tool_call>{"name": "f", "arguments": {}} \n so', " \n so"),
        ('<tool_call>[{"name": "f", "arguments": {}}, 5]', ", 5]"),
        ('<tool_call>[{"name": "f", "arguments": {}}; ]', "; ]"),
        ('<tool_call>[{"name": "f", "arguments": {}}, {"name": 5}]', ', {"name": 5}]'),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_box>', "</tool_box>"),
    ],
)
def test_a_call_is_complete_with_its_arguments(text: str, rest: str) -> None:
    assert parse("hermes", text) == call("f", "{}") + ([Content(rest)] if rest else [])


def test_several_objects_in_one_tag_are_several_calls() -> None:
    text = (
        '<tool_call>\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n</tool_call>'
    )
    assert parse("hermes", text) == call("f", "{}") + call("g", "{}", 1)


def test_both_of_mistrals_spellings_are_read() -> None:
    listed = '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'
    named = "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS] {}"
    for family in ("mistral", "mistral_list"):
        assert parse(family, listed) == parse(family, named) == call("f", "{}")


# White space.


def test_white_space_between_calls_is_dropped_and_that_of_text_is_kept() -> None:
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse("hermes", f"\n {one} \n{one}\n ok \n{one}\n\n") == [
        *call("f", "{}"),
        *call("f", "{}", 1),
        Content("\n ok \n"),
        *call("f", "{}", 2),
    ]
    assert parse("hermes", "  Hi\n\n") == [Content("  Hi\n\n")]
    assert parse("hermes", "\n \n") == [Content("\n \n")]


# Reasoning.


def test_reasoning_goes_on_until_its_marker_whatever_is_in_it() -> None:
    text = '<think>a <tool_call>{"name": "f", "arguments": {}}</tool_call>\n\n b </th </think>c'
    inner = 'a <tool_call>{"name": "f", "arguments": {}}</tool_call>\n\n b </th'
    assert parse("hermes", text) == [Reasoning(inner), Content("c")]


def test_unfinished_reasoning_comes_back_with_what_was_held() -> None:
    assert parse("hermes", "<think>\nso </thi") == [Reasoning("so </thi")]
    assert parse("hermes", "<think>\nso \n") == [Reasoning("so \n")]


def test_a_prompt_may_open_the_reasoning() -> None:
    assert parse("hermes", "hm</think>Hi", in_reasoning=True) == [Reasoning("hm"), Content("Hi")]
    assert parse("plain", "hm</think>Hi", in_reasoning=True) == [Content("hm</think>Hi")]


def test_reasoning_may_follow_calls() -> None:
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse("hermes", f"{one}\n<think>more</think>") == [*call("f", "{}"), Reasoning("more")]


def test_reasoning_that_is_not_parsed_keeps_its_markers_and_hides_calls() -> None:
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    thought = f"\n<think>\n{one}\n</think>\n\n"
    assert parse("hermes", f"{thought}Hi {one}", parses_reasoning=False) == [
        Content(f"{thought}Hi "),
        *call("f", "{}"),
    ]
    inside = f"{one}</think>\n\nHi"
    assert parse("hermes", inside, parses_reasoning=False, in_reasoning=True) == [Content(inside)]


def test_tools_that_are_not_parsed_are_content() -> None:
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse("hermes", f"<think>a</think>\n{one}\n", parses_tools=False) == [
        Reasoning("a"),
        Content(f"{one}\n"),
    ]


# The markers.


def test_markers_are_all_texts_that_the_parser_looks_for() -> None:
    assert FORMATS["hermes"].markers == ("<think>", "</think>", "<tool_call>", "</tool_call>")
    assert FORMATS["mistral"].markers == (
        "[THINK]",
        "[/THINK]",
        "[TOOL_CALLS]",
        "[CALL_ID]",
        "[ARGS]",
    )
    assert FORMATS["llama3"].markers == ("<|python_tag|>",)
    assert "<parameter=" in FORMATS["qwen3_coder"].markers
    assert ">" not in FORMATS["qwen3_coder"].markers
    assert FORMATS["plain"].markers == ()


@pytest.mark.parametrize("family", FORMATS)
def test_markers_that_are_looked_for_together_do_not_overlap(family: str) -> None:
    """One inside another could never be told apart."""
    format = FORMATS[family]
    openings = {shape.markers[0] for shape in format.tools} | set((format.reasoning or ())[:1])
    for one in openings:
        assert not any(one in other for other in openings - {one})


# Time.

TIMING = """
import time
from jaxserve.frontend.parsing import FORMATS, AnswerParser
N = 200_000
TOOLS = {"f": {"properties": {"a": {"type": "string"}}}, "g": None}
for family, text in [
    ("hermes", "x" * N),
    ("hermes", " " * N),
    ("hermes", "<" * N),
    ("hermes", "<think>" + " " * N),
    ("hermes", "<tool_call>" * (N // 11)),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "' + "y" * N),
    ("hermes", '<tool_call>{"arguments": {"a": "' + "y" * N),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * (N // 52)),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>" + "<" * N),
    ("qwen3_coder", "<tool_call><function=g><parameter=a>" + "1" * N),
    ("mistral", "[TOOL_CALLS]" * (N // 12)),
    ("llama3", "{" * N),
    ("llama3", '{"id": "' + '<|python_tag|>{"id": "' * (N // 22)),
]:
    parser = AnswerParser(FORMATS[family], tools=TOOLS)
    started = time.process_time()
    for char in text:
        parser.push(char)
    parser.finish()
    took_s = time.process_time() - started
    assert took_s < 2, (family, text[:60], took_s)
"""


@pytest.mark.slow
def test_single_characters_take_time_in_proportion() -> None:
    """In a process of its own, without the run-time type checks of the tests.

    200 kB took 0.2 to 0.7 s each when this was written; scanning all that was held again for every
    character would take minutes.
    """
    subprocess.run([sys.executable, "-c", TIMING], check=True)


def test_large_pieces_are_as_good() -> None:
    text = ("word " * 20 + '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>') * 50
    parser = AnswerParser(FORMATS["hermes"])
    parts = joined(parser.push(text) + parser.finish())
    assert sum(isinstance(part, ToolCallEnded) for part in parts) == 50
