"""Grammars, compiled and followed by llguidance over the default model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.parsing import (
    FORMATS,
    AnswerParser,
    Otherwise,
    Reasoning,
    Thoughts,
    Tool,
    ToolCallEnded,
    ToolCallStarted,
    answer_grammar,
)
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights.gguf import gguf_tokenizer
from jaxserve.weights.gguf_file import read_gguf_header
from tests.frontend.parsing.golden import SCHEMA, mark, read

TOOLS = [Tool("get_weather", "Tells the weather.", SCHEMA), Tool("now")]
SCHEMAS: dict[str, Mapping[str, Any] | None] = {tool.name: tool.parameters for tool in TOOLS}
TAGGED = ("qwen3_coder", "glm")
FAMILIES = [format.name for format in FORMATS.values() if format.tools]


class Judge:
    """Says whether a grammar allows a whole text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._guide = LLTokenizer(tokenizer.fast.to_str(), eos_token=sorted(tokenizer.eos_ids))

    def allows(self, grammar: str, text: str) -> bool:
        matcher = LLMatcher(self._guide, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(scope="module")
def judge(assets: Callable[[str], Path]) -> Judge:
    return Judge(load_tokenizer(gguf_tokenizer(read_gguf_header(assets("smollm2")))))


def write(family: str, *calls: tuple[str, str, Any]) -> str:
    """Writes calls of (name, city, days) in a family's format, by hand."""
    begin, between, end, one = {
        "hermes": (
            "", "\n", "",
            '<tool_call>\n{{"name": "{0}", "arguments": {1}}}\n</tool_call>',
        ),
        "smollm2": ("<tool_call>[", ", ", "]</tool_call>", '{{"name": "{0}", "arguments": {1}}}'),
        "apriel": ("<tool_calls>[", ", ", "]</tool_calls>", '{{"name": "{0}", "arguments": {1}}}'),
        "granite": ("<|tool_call|>[", ", ", "]", '{{"name": "{0}", "arguments": {1}}}'),
        "mistral_list": ("[TOOL_CALLS][", ", ", "]", '{{"name": "{0}", "arguments": {1}}}'),
        "llama3": ("", "; ", "", '{{"name": "{0}", "parameters": {1}}}'),
        "command_r": (
            "<|START_ACTION|>[", ", ", "]<|END_ACTION|>",
            '{{"tool_call_id": "0", "tool_name": "{0}", "parameters": {1}}}',
        ),
        "mistral": ("", "", "", "[TOOL_CALLS]{0}[ARGS]{1}"),
        "deepseek": (
            mark("calls▁begin"), "\n", mark("calls▁end"),
            f"{mark('call▁begin')}function{mark('sep')}{{0}}\n```json\n{{1}}\n```{mark('call▁end')}",
        ),
        "deepseek_v3_1": (
            mark("calls▁begin"), "", mark("calls▁end"),
            f"{mark('call▁begin')}{{0}}{mark('sep')}{{1}}{mark('call▁end')}",
        ),
        "kimi": (
            "<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>",
            "<|tool_call_begin|>functions.{0}:0<|tool_call_argument_begin|>{1}<|tool_call_end|>",
        ),
        "qwen3_coder": (
            "", "\n", "", "<tool_call>\n<function={0}>\n{1}</function>\n</tool_call>"
        ),
        "glm": ("", "\n", "", "<tool_call>{0}\n{1}</tool_call>"),
    }[family]  # fmt: skip
    parameter = {
        "qwen3_coder": "<parameter={0}>\n{1}\n</parameter>\n",
        "glm": "<arg_key>{0}</arg_key>\n<arg_value>{1}</arg_value>\n",
    }.get(family)
    texts = []
    for name, city, days in calls:
        if parameter:
            arguments = "".join(parameter.format(k, v) for k, v in [("city", city), ("days", days)])
        else:
            arguments = f'{{"city": "{city}", "days": {days}}}'
        texts.append(one.format(name, arguments if city else "" if parameter else "{}"))
    return begin + between.join(texts) + end


PARIS, ROME, NOW = ("get_weather", "Paris", 3), ("get_weather", "Rome", 4), ("now", "", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_given_tools_are_allowed_and_read_back(family: str, judge: Judge) -> None:
    one = answer_grammar(FORMATS[family], tools=TOOLS, parallel=False)
    many = answer_grammar(FORMATS[family], tools=TOOLS, parallel=True)
    for calls in [(PARIS,), (NOW,), (PARIS, NOW, ROME)]:
        text = write(family, *calls)
        assert judge.allows(many, text), text
        assert judge.allows(one, text) == (len(calls) == 1), text
        parts = read(AnswerParser(FORMATS[family], tools=SCHEMAS), text)
        assert [p.name for p in parts if isinstance(p, ToolCallStarted)] == [c[0] for c in calls]
        assert isinstance(parts[-1], ToolCallEnded)


@pytest.mark.parametrize("family", FAMILIES)
def test_anything_else_is_refused(family: str, judge: Judge) -> None:
    grammar = answer_grammar(FORMATS[family], tools=TOOLS, parallel=True)
    good = write(family, PARIS)
    assert judge.allows(grammar, good)
    for text in (
        "",
        "Hello",
        f"Hello {good}",
        f"{good} bye",
        good[:-1],
        write(family, ("get_weathers", "Paris", 3)),
        write(family, ("other", "Paris", 3)),
        write(family, ("get_weather", "Paris", "true")),
        write(family, ("get_weather", "Paris", "3.5")),
        write(family, ("get_weather", "", 0)),
        write(family, ("now", "Paris", 3)),
    ):
        assert not judge.allows(grammar, text), text


@pytest.mark.parametrize("family", FAMILIES)
def test_free_answers_call_strict_tools_as_they_are_described(family: str, judge: Judge) -> None:
    strict = [replace(tool, strict=True) for tool in TOOLS]
    grammar = answer_grammar(FORMATS[family], tools=strict, otherwise=Otherwise.TEXT)
    good, many = write(family, PARIS), write(family, PARIS, NOW, ROME)
    wrong = write(family, ("get_weather", "Paris", "true"))
    unknown = write(family, ("other", "Paris", 3))
    is_bare = family == "llama3"  # Its calls are calls only where an answer begins.
    for text in ("", "Hello", "1 < 2, [a] {b}\n\n<i>", '{"a": 1}', good, many):
        assert judge.allows(grammar, text), text
    for text in (wrong, unknown, f"{good} bye", good[:-1]):
        assert not judge.allows(grammar, text), text
    for text, allowed in ((good, True), (many, True), (wrong, is_bare), (unknown, is_bare)):
        assert judge.allows(grammar, f"Hello {text}") == allowed, text
    if is_bare:
        assert judge.allows(grammar, f"Hello <|python_tag|>{good}")
        assert not judge.allows(grammar, f"Hello <|python_tag|>{wrong}")
        assert not judge.allows(grammar, f" {wrong}")
    one = answer_grammar(FORMATS[family], tools=strict, otherwise=Otherwise.TEXT, parallel=False)
    assert judge.allows(one, f"Hello {good}")
    assert judge.allows(one, many) is False


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TAGGED])
def test_free_answers_call_other_tools_with_any_object(family: str, judge: Judge) -> None:
    grammar = answer_grammar(FORMATS[family], tools=TOOLS, otherwise=Otherwise.TEXT)
    assert judge.allows(grammar, write(family, ("get_weather", "Paris", "true")))
    assert not judge.allows(grammar, write(family, ("other", "Paris", 3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_obeys_another_grammar_or_calls(family: str, judge: Judge) -> None:
    strict = [replace(tool, strict=True) for tool in TOOLS]
    frame = answer_grammar(FORMATS[family], tools=strict, otherwise=Otherwise.ANSWER)
    properties = {"name": {"type": "string"}, "city": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    answer = {"name": "answer", "json_schema": {**schema, "x-guidance": {"key_separator": ": "}}}
    grammar = json.dumps({"grammars": [{"lark_grammar": frame}, answer]})
    good, many = write(family, PARIS), write(family, PARIS, NOW)
    for text in ('{"name": "now"}', '{"name": "no", "city": "x"}', '{"city": "x"}', good, many):
        assert judge.allows(grammar, text), text
    wrong = write(family, ("get_weather", "Paris", "true"))
    for text in ("", "Hello", '{"days": 1}', f"Hello {good}", wrong, f'{{"city": "x"}}{good}'):
        assert not judge.allows(grammar, text), text


@pytest.mark.parametrize("family", [name for name in FAMILIES if FORMATS[name].reasoning])
def test_thoughts_stand_before_what_is_asked_for(family: str, judge: Judge) -> None:
    format = FORMATS[family]
    assert format.reasoning is not None
    opening, closing = format.reasoning
    good = write(family, PARIS)
    for thoughts, before in ((Thoughts.OPEN, ""), (Thoughts.POSSIBLE, opening)):
        grammar = answer_grammar(format, tools=TOOLS, thoughts=thoughts)
        thought = f"{before}Hm. {{a}} </b>\n{closing}"
        assert judge.allows(grammar, f"{thought}\n\n{good}")
        assert judge.allows(grammar, f"{before}{closing}{good}")
        assert judge.allows(grammar, good) == (thoughts is Thoughts.POSSIBLE)
        for text in ("", thought, f"{thought}Hello", f"{thought}\n\n\n{good}", f"{before}{good}"):
            assert not judge.allows(grammar, text), text
        parts = read(
            AnswerParser(format, tools=SCHEMAS, in_reasoning=not before), f"{thought}\n\n{good}"
        )
        assert parts[0] == Reasoning("Hm. {a} </b>")
        assert isinstance(parts[-1], ToolCallEnded)


def test_strings_between_tags_may_be_any_text_or_a_listed_one(judge: Judge) -> None:
    schema = {
        "$defs": {"Unit": {"enum": ["C", "F"]}},
        "properties": {
            "text": {"type": "string"},
            "unit": {"$ref": "#/$defs/Unit"},
            "only": {"const": "x"},
            "point": {"type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit"}}},
            "free": {},
        },
        "required": ["unit", "extra"],
    }
    grammar = answer_grammar(FORMATS["qwen3_coder"], tools=[Tool("f", "", schema)], parallel=False)

    def text(**values: str) -> str:
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"

    assert judge.allows(grammar, text(text='a\n\n<b> "é" </parameter', unit="C", extra="1"))
    assert judge.allows(grammar, text(unit="F", only="x", point='{"unit": "C"}', extra='"a"'))
    assert judge.allows(grammar, text(unit="F", free='[1, {"a": null}]', extra="{}"))
    assert not judge.allows(grammar, text(unit="K", extra="1"))
    assert not judge.allows(grammar, text(unit="C"))
    assert not judge.allows(grammar, text(unit="C", only="y", extra="1"))
    assert not judge.allows(grammar, text(unit="C", point='{"unit": "K"}', extra="1"))
    assert not judge.allows(grammar, text(extra="1", unit="C"))


@pytest.mark.parametrize(
    ("parameters", "strict", "arguments", "allowed"),
    [
        (None, False, "{}", True),
        (None, False, '{"a": 1}', False),
        ({}, False, '{"a": 1}', True),
        ({}, False, "[]", False),
        ({"properties": {"a": {}}}, False, '{"a": {"b": 1}}', True),
        ({"properties": {"a": {}}}, False, '{"z": 1}', False),
        ({"properties": {"a": {}}, "additionalProperties": True}, False, '{"z": 1}', True),
        ({"properties": {"a": {"properties": {}}}}, False, '{"a": {"z": 1}}', True),
        ({"properties": {"a": {"properties": {}}}}, True, '{"a": {"z": 1}}', False),
        ({"properties": {"a": {"items": {"properties": {}}}}}, True, '{"a": [{"z": 1}]}', False),
        ({"properties": {"a": {"anyOf": [{"properties": {}}]}}}, True, '{"a": {"z": 1}}', False),
        ({"properties": {"a": True}}, True, '{"a": {"z": 1}}', True),
        ({"properties": {"a": {"maxLength": 1}}}, False, '{"a":"xy"}', False),
    ],
)
def test_arguments_obey_their_schema(
    parameters: Mapping[str, Any] | None,
    strict: bool,
    arguments: str,
    allowed: bool,
    judge: Judge,
) -> None:
    grammar = answer_grammar(
        FORMATS["smollm2"], tools=[Tool("f", "", parameters, strict)], parallel=False
    )
    text = f'<tool_call>[{{"name": "f", "arguments": {arguments}}}]</tool_call>'
    assert judge.allows(grammar, text) == allowed


@pytest.mark.parametrize("name", ['we"ird\\', "naïve", "a.b-c_d", "\n"])
def test_any_name_is_written_as_json(name: str, judge: Judge) -> None:
    grammar = answer_grammar(FORMATS["smollm2"], tools=[Tool(name)], parallel=False)
    written = json.dumps(name, ensure_ascii=False)
    assert judge.allows(
        grammar, f'<tool_call>[{{"name": {written}, "arguments": {{}}}}]</tool_call>'
    )
    assert not judge.allows(grammar, '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>')


def test_a_string_between_tags_ends_where_readers_end_it(judge: Judge) -> None:
    schema = {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a"]}
    grammar = answer_grammar(FORMATS["qwen3_coder"], tools=[Tool("f", "", schema)], parallel=False)

    def text(value: str) -> str:
        inner = f"<parameter=a>\n{value}\n</parameter>\n"
        return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"

    assert judge.allows(grammar, text("</paramete\n"))
    assert not judge.allows(grammar, text("see </parameter> tag"))
    assert not judge.allows(grammar, text("a</parameter>\n<parameter=n>\n1\n</parameter>\n<"))


@pytest.mark.parametrize("family", ["glm", "qwen3_coder", "mistral", "kimi"])
def test_markers_that_are_special_are_written_as_tokens(
    family: str, assets: Callable[[str], Path]
) -> None:
    tokenizer = load_tokenizer(gguf_tokenizer(read_gguf_header(assets("smollm2"))))
    markers = [marker for marker in FORMATS[family].markers if marker != "<parameter="]
    tokenizer.fast.add_special_tokens([AddedToken(m, special=True) for m in markers])
    added = tokenizer.fast.get_added_tokens_decoder()
    ids = {token.content: number for number, token in added.items() if token.content in markers}
    special = Judge(tokenizer)
    grammar = answer_grammar(FORMATS[family], tools=TOOLS, parallel=True, special_tokens=ids)
    assert f"<[{ids[markers[-1]]}]>" in grammar
    assert special.allows(grammar, write(family, PARIS, NOW))
    assert not special.allows(grammar, write(family, ("other", "Paris", 3)))
    # Without being told, the grammar asks for letters and the token is not allowed.
    assert not special.allows(
        answer_grammar(FORMATS[family], tools=TOOLS, parallel=True), write(family, PARIS, NOW)
    )


@pytest.mark.parametrize(
    ("name", "family", "end"),
    [
        ("qwen3", "hermes", "<|im_end|>"),
        ("qwen3", "qwen3_coder", "<|im_end|>"),
        ("mistral_nemo", "mistral_list", "</s>"),
        ("llama3_1", "llama3", "<|eot_id|>"),
    ],
)
def test_a_family_is_written_in_the_tokens_of_its_models(
    name: str, family: str, end: str, assets: Callable[[str], Path]
) -> None:
    fast = FastTokenizer.from_file(str(assets("tokenizers") / name / "tokenizer.json"))
    ids = {token.content: number for number, token in fast.get_added_tokens_decoder().items()}
    guide = LLTokenizer(fast.to_str(), eos_token=ids[end])
    grammar = answer_grammar(FORMATS[family], tools=TOOLS, parallel=True, special_tokens=ids)
    matcher = LLMatcher(guide, grammar)
    tokens = fast.encode(write(family, PARIS, NOW), add_special_tokens=False).ids
    assert matcher.try_consume_tokens(tokens) == len(tokens), matcher.get_error()
    assert matcher.is_accepting()


@pytest.mark.parametrize("family", ["plain", "thinking", "gemma4"])
def test_a_family_without_calls_refuses_tools(family: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"'{family}', has no tool calls; send") as error:
        answer_grammar(FORMATS[family], tools=TOOLS, parallel=False)
    assert error.value.field == "tools"


def test_no_tools_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"tools is empty; name at least one") as error:
        answer_grammar(FORMATS["hermes"], tools=[], parallel=False)
    assert error.value.field == "tools"
