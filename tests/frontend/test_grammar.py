"""Grammars: what clients may say, and what comes of the worst that they can."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError, RetryableError
from jaxserve.frontend import grammar_compiler
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.grammar import Grammar, take_grammar
from jaxserve.frontend.grammar_compiler import (
    MAX_GRAMMAR_CHARS,
    GrammarCompiler,
    GrammarMatcher,
)
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.weights.gguf import gguf_tokenizer
from jaxserve.weights.gguf_file import read_gguf_header

TOKENIZER = byte_tokenizer()
VOCAB = 259
END = 2


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with closing(GrammarCompiler(TOKENIZER, vocab_size=VOCAB)) as made:
        yield made


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def allowed(matcher: GrammarMatcher) -> set[int]:
    words = np.zeros(-(-VOCAB // 32), np.int32)
    matcher.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def accepts(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether the grammar has a text, token by token, and may end behind it."""
    matcher = compiler.compile(grammar).matcher()
    for token in ids(text):
        if matcher.complete or token not in allowed(matcher):
            return False
        assert matcher.accept(token)
    return matcher.complete or END in allowed(matcher)


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("grammar", "text", "expected"),
    [
        (Grammar("json_schema", SCHEMA), '{"name": "Jo", "tags": ["a", "b"], "age": 33}', True),
        (Grammar("json_schema", SCHEMA), '{"name": "Jo", "age": 0}', True),
        (Grammar("json_schema", SCHEMA), '{"name": "Jonathan", "age": 0}', False),
        (Grammar("json_schema", SCHEMA), '{"name": "Jo", "age": 151}', False),
        (Grammar("json_schema", SCHEMA), '{"name": "Jo", "age": 1, "x": 1}', False),
        (Grammar("json_schema", SCHEMA), '{ "name":"Jo","age":1}', False),
        (Grammar("json_object"), '{"any": [1, null, {"x": "é"}]}', True),
        (Grammar("json_object"), "[1]", False),
        (Grammar("regex", r"\d{3}-[a-f]+"), "123-abc", True),
        (Grammar("regex", r"\d{3}-[a-f]+"), "12-abc", False),
        (Grammar("regex", r"\d{3}-[a-f]+"), "x123-abc", False),
        (Grammar("grammar", 'start: "yes" | "no" " "? "way"'), "no way", True),
        (Grammar("grammar", 'start: "yes" | "no" " "? "way"'), "maybe", False),
        (Grammar("grammar", 'root ::= "yes" | "no" [0-9]+'), "no42", True),
        (Grammar("grammar", 'root ::= "yes" | "no" [0-9]+'), "no", False),
        (Grammar("choices", '["a b", "c.d", "é-#&~"]'), "c.d", True),
        (Grammar("choices", '["a b", "c.d", "é-#&~"]'), "c-d", False),
        (Grammar("choices", '["a b", "c.d", "é-#&~"]'), "é-#&~", True),
        (Grammar("choices", '["a", "ab"]'), "a", True),
        (Grammar("choices", '["a", "ab"]'), "ab", True),
    ],
)
def test_a_grammar_has_what_it_says_and_nothing_else(
    compiler: GrammarCompiler, grammar: Grammar, text: str, expected: bool
) -> None:
    assert accepts(compiler, grammar, text) is expected


@pytest.mark.parametrize(
    ("grammar", "match"),
    [
        (Grammar("json_schema", "{"), "no JSON"),
        (Grammar("json_schema", "[" * 5000), "no JSON"),
        (Grammar("json_schema", '"text"'), "no JSON object"),
        (Grammar("json_schema", '{"type": "objekt"}'), "Invalid type: objekt"),
        (Grammar("json_schema", '{"type": "string", "minLength": 3, "maxLength": 1}'), "Unsatisf"),
        (
            Grammar("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
            "",
        ),
        (Grammar("json_schema", '{"not": {}}'), "Unimplemented keys"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(" * 20_000 + "a" + ")" * 20_000), ""),
        (Grammar("grammar", "start: x"), "unknown name"),
        (Grammar("grammar", ""), "no start rule"),
        (Grammar("grammar", "start: start"), "it allows no answer"),
        (Grammar("grammar", "(" * 60_000), "expecting"),
        (Grammar("grammar", "root ::= ("), ""),
        (Grammar("choices", "{}"), "no list of strings"),
        (Grammar("choices", "[1]"), "no list of strings"),
        (Grammar("choices", "[]"), "empty"),
        (Grammar("choices", '["a", ""]'), "empty string"),
        (Grammar("choices", json.dumps([str(n) for n in range(1025)])), "limit is 1024"),
    ],
)
def test_a_grammar_that_cannot_be_used_says_why(
    compiler: GrammarCompiler, grammar: Grammar, match: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"(?s)grammar cannot be used: .*{match}") as got:
        compiler.compile(grammar)
    assert got.value.field == "grammar"
    assert len(str(got.value)) < 500
    assert accepts(compiler, Grammar("regex", "next"), "next")


def test_a_long_grammar_is_refused_before_it_is_read(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match=r"my_regex has 65537 characters .* 65536"):
        compiler.compile(Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1), "my_regex"))


@pytest.mark.parametrize("step", ["r{i}: r{j}", "R{i}: R{j}", "r{i}: r{j}?", 'r{i}: "(" r{j} ")"'])
def test_rules_as_deep_as_a_text_can_hold_do_not_overflow_the_stack(
    compiler: GrammarCompiler, step: str
) -> None:
    """On a thread with the usual 8 MiB, the first of these ends the process."""
    lines = ["start: " + step.partition(":")[0].format(i=0)]
    while sum(map(len, lines)) + len(lines) < MAX_GRAMMAR_CHARS - 100:
        i = len(lines) - 1
        lines.append(step.format(i=i, j=i + 1))
    lines.append(step.partition(":")[0].format(i=len(lines) - 1) + ': "a"')
    try:
        matcher = compiler.compile(Grammar("grammar", "\n".join(lines))).matcher()
    except InvalidRequestError:
        return  # Refused is as good.
    for _ in range(5):
        tokens = allowed(matcher)
        if matcher.error or matcher.complete:
            break
        matcher.accept(min(tokens - {END}))


def test_references_as_deep_as_a_schema_can_hold_do_not_overflow_the_stack(
    compiler: GrammarCompiler,
) -> None:
    count = 1800
    defs: dict[str, Any] = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(count)}
    defs[f"a{count}"] = {"type": "integer"}
    schema = json.dumps({"$ref": "#/$defs/a0", "$defs": defs})
    assert len(schema) < MAX_GRAMMAR_CHARS
    assert accepts(compiler, Grammar("json_schema", schema), "12")


def test_a_grammar_that_explodes_later_says_so_and_allows_nothing(
    compiler: GrammarCompiler,
) -> None:
    properties = {f"p{n}": {"type": "string", "maxLength": n} for n in range(1200)}
    schema = json.dumps({"type": "object", "properties": properties})
    try:
        matcher = compiler.compile(Grammar("json_schema", schema)).matcher()
    except InvalidRequestError:
        return
    for token in ids('{"p'):
        found = allowed(matcher)
        if matcher.error:
            assert not found
            return
        matcher.accept(token)


def test_a_compiled_grammar_is_kept_and_its_matchers_walk_alone(compiler: GrammarCompiler) -> None:
    grammar = Grammar("regex", "ab|ac")
    compiled = compiler.compile(grammar)
    assert compiler.compile(Grammar("regex", "ab|ac", "another_name")) is compiled
    one, other = compiled.matcher(), compiled.matcher()
    assert one.accept(ids("a")[0])
    assert allowed(one) == set(ids("bc"))
    assert allowed(other) == set(ids("a"))


def test_a_token_that_does_not_fit_is_an_error_of_its_matcher(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar("regex", "ab")).matcher()
    assert not matcher.accept(ids("x")[0])
    assert matcher.error


def test_a_matcher_begins_behind_what_is_resumed(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(Grammar("regex", "abc"))
    assert allowed(compiled.matcher(ids("ab"))) == set(ids("c"))
    with pytest.raises(InvalidRequestError, match="does not obey the grammar at its token 1"):
        compiled.matcher(ids("ax"))
    with pytest.raises(InvalidRequestError, match="all that the grammar has"):
        compiled.matcher(ids("abc"))
    with pytest.raises(InvalidRequestError, match="at its token 3"):
        compiled.matcher(ids("abcd"))


def test_what_takes_too_long_is_given_up_and_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = threading.Event()

    def wait(grammar: Grammar) -> str:
        go.wait(30)
        return source_of(grammar)

    source_of = grammar_compiler.source_of
    monkeypatch.setattr(grammar_compiler, "COMPILE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(grammar_compiler, "MAX_COMPILING", 1)
    monkeypatch.setattr(grammar_compiler, "source_of", wait)
    with closing(GrammarCompiler(TOKENIZER, vocab_size=VOCAB)) as compiler:
        # Two threads are busy, one grammar waits.
        for name in ("a", "b", "c"):
            with pytest.raises(InvalidRequestError, match=r"takes more than 0\.05 s to compile"):
                compiler.compile(Grammar("regex", name))
        with pytest.raises(RetryableError, match="1 grammars wait to be compiled already"):
            compiler.compile(Grammar("regex", "d"))
        go.set()
        monkeypatch.setattr(grammar_compiler, "COMPILE_TIMEOUT_S", 30)
        while True:
            try:
                assert compiler.compile(Grammar("regex", "e"))
                break
            except RetryableError:
                continue


def test_only_so_many_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "KEPT_GRAMMARS", 2)
    with closing(GrammarCompiler(TOKENIZER, vocab_size=VOCAB)) as compiler:
        first = compiler.compile(Grammar("regex", "a"))
        compiler.compile(Grammar("regex", "b"))
        assert compiler.compile(Grammar("regex", "a")) is first
        compiler.compile(Grammar("regex", "c"))
        assert compiler.compile(Grammar("regex", "a")) is first
        assert [grammar.text for grammar in compiler._kept] == ["c", "a"]


def test_a_model_without_an_end_token_has_no_grammars() -> None:
    endless = byte_tokenizer()
    endless.eos_ids = frozenset()
    with (
        closing(GrammarCompiler(endless, vocab_size=VOCAB)) as compiler,
        pytest.raises(InvalidRequestError, match="no end token"),
    ):
        compiler.compile(Grammar("regex", "a"))


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"json_schema": {"type": "null"}}, Grammar("json_schema", '{"type": "null"}')),
        ({"json_schema": '{"type": "null"}'}, Grammar("json_schema", '{"type": "null"}')),
        ({"json_object": True}, Grammar("json_object")),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"grammar": "start: A"}, Grammar("grammar", "start: A")),
        ({"choices": ("a", "b")}, Grammar("choices", '["a", "b"]')),
    ],
)
def test_an_option_makes_a_grammar_and_is_taken(
    options: dict[str, Any], expected: Grammar | None
) -> None:
    given = {**options, "seed": 1}
    grammar = take_grammar(given)
    assert grammar == expected
    assert given == {"seed": 1}
    if grammar is not None:
        assert grammar.field == next(iter(options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"regex": "a", "choices": ["a"]}, "regex and choices are given"),
        ({"regex": 5}, "regex is '5'; give a text"),
        ({"json_object": False}, "json_object is 'False'; give True"),
        ({"json_schema": 5}, "give a mapping or JSON text"),
        ({"json_schema": {"enum": {1}}}, "cannot be written as JSON"),
        ({"choices": "ab"}, "give a list of strings"),
    ],
)
def test_options_that_make_no_grammar_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        take_grammar(options)


@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        (Grammar("json_object"), 'Well: {"a": 1}', True),
        (Grammar("json_object"), '{"a": 1}', False),
        (Grammar("regex", "[0-9]{2}"), "Well: 42", True),
        (Grammar("grammar", 'start: word\nword: "a" | "b"'), "Well: b", True),
        (Grammar("grammar", 'root ::= "a" | "b"'), "Well: c", False),
        (Grammar("choices", '["yes"]'), "Well: yes", True),
    ],
)
def test_a_grammar_stands_in_a_frame(
    compiler: GrammarCompiler, inside: Grammar, text: str, expected: bool
) -> None:
    framed = dataclasses.replace(inside, frame='start: "Well: " @answer')
    assert accepts(compiler, framed, text) is expected


def test_a_frame_counts_as_text(compiler: GrammarCompiler) -> None:
    half = "#" * (MAX_GRAMMAR_CHARS // 2)
    grammar = Grammar("grammar", f'start: "a"\n{half}', frame=f"start: @answer\n{half}")
    with pytest.raises(InvalidRequestError, match=f"the limit is {MAX_GRAMMAR_CHARS}"):
        compiler.compile(grammar)


def test_a_server_reads_the_vocabulary_before_a_grammar_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = threading.Event()

    class Words(grammar_compiler._Words):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            read.set()

    monkeypatch.setattr(grammar_compiler, "_Words", Words)
    with closing(GrammarCompiler(TOKENIZER, vocab_size=VOCAB)):
        pass
    assert not read.is_set()
    with closing(GrammarCompiler(TOKENIZER, vocab_size=VOCAB, eager=True)):
        assert read.wait(20)


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "llama-bpe", "qwen2"])
def test_forced_text_is_written_in_the_tokens_of_a_real_vocabulary(
    name: str, assets: Callable[[str], Path]
) -> None:
    path = assets("llama-cpp-vocabs") / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(gguf_tokenizer(read_gguf_header(path)))
    end = tokenizer.token_text(min(tokenizer.eos_ids))
    size = tokenizer.vocab_size
    with closing(GrammarCompiler(tokenizer, vocab_size=size)) as made:
        # Where every call is checked, reading takes longer than a request may wait.
        assert made._ll_tokenizer.vocab_size == size
        for text in ("hello world", '{"city": "Rome é日"}', end, f"a{end}b{end}"):
            matcher = made.compile(Grammar("choices", json.dumps([text]))).matcher()
            words = np.zeros(-(-size // 32), np.int32)
            raw = b""
            while not matcher.complete:
                matcher.fill(words)
                bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                token = int(np.flatnonzero(bits)[-1])
                assert token not in tokenizer.special_ids
                raw += tokenizer.token_bytes(token)
                assert matcher.accept(token), matcher.error
            assert raw.decode() == text
