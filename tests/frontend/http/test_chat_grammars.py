"""What chats let an answer be: Qwen 3's tokenizer and template behind the door, over HTTP.

The scripted engine shows the constraint that a request came with; texts are then held against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from jaxserve.engine.constraint import Constraint, mask_words
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grammar_compiler import GrammarCompiler
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.parsing import choose_format
from jaxserve.frontend.template import ChatTemplate
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.tokenizer_source import TokenizerSource
from tests.frontend.grpc.conftest import Limits, ScriptedEngine
from tests.frontend.http.conftest import Asking

VOCAB = 151_936
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Where to?"}]}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
PARIS, OSLO = '{"city": "Paris"}', '{"city": "Oslo"}'
THOUGHT = "<think>\nWhat is {a} city?\n</think>\n\n"
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
JSON = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
}


def tools(*, strict: bool = True) -> dict[str, Any]:
    """Two functions that know cities; only of the first it is to be said whether it is strict."""
    return {
        "tools": [
            {
                "type": "function",
                "function": {"name": name, "parameters": SCHEMA, "strict": name == "go" and strict},
            }
            for name in ("go", "see")
        ]
    }


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


GO, SEE, GO_WRONG, SEE_WRONG = (
    call("go", PARIS), call("see", PARIS), call("go", OSLO), call("see", OSLO)
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(assets: Callable[[str], Path]) -> Tokenizer:
    folder = assets("tokenizers") / "qwen3"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return load_tokenizer(TokenizerSource(source=str(folder), files=files))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    with closing(GrammarCompiler(tokenizer, vocab_size=VOCAB)) as made:
        # Reading a vocabulary takes longer than a request may wait where every call is checked.
        assert made._ll_tokenizer.vocab_size == VOCAB
        yield made


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(limits=Limits(context_tokens=4096, vocab_size=VOCAB))


@pytest.fixture
def door(
    engine: ScriptedEngine, tokenizer: Tokenizer, grammars: GrammarCompiler
) -> Iterator[httpx.Client]:
    source = tokenizer.chat_template
    assert source is not None
    with ChatTemplate(source, source="Qwen 3") as template:
        text = TextEngine(engine, tokenizer, template, grammars, choose_format(source))
        info = ModelInfo(name="qwen", model_digest="d", context_tokens=4096, vocab_size=VOCAB)
        server = ServerThread(text, info, ServerConfig(port=0), HttpConfig(port=0))
        server.start()
        try:
            with httpx.Client(base_url=f"http://{server.http_address}", timeout=20) as made:
                yield made
        finally:
            server.stop(0.0)


class Asked:
    """A chat that waits for its answer."""

    def __init__(
        self, engine: ScriptedEngine, door: httpx.Client, tokenizer: Tokenizer, body: dict[str, Any]
    ) -> None:
        self._asking = Asking(door, "/v1/chat/completions", {**CHAT, **body})
        self._engine, self._tokenizer = engine, tokenizer
        self._request = engine.wait_request()

    @property
    def constraint(self) -> Constraint | None:
        return self._request.constraint

    def allows(self, text: str) -> bool:
        """Whether an answer may be this text, token by token, and end behind it."""
        assert self.constraint is not None
        matcher = self.constraint.matcher()
        words = np.zeros(mask_words(VOCAB), np.int32)
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        for token in tokens:
            matcher.fill(words)
            if matcher.complete or not (words[token // 32] >> (token % 32)) & 1:
                return False
            assert matcher.accept(token)
        matcher.fill(words)
        ends = [(words[end // 32] >> (end % 32)) & 1 for end in self._tokenizer.eos_ids]
        return matcher.complete or any(ends)

    def message(self, text: str) -> dict[str, Any]:
        """Answers with a text; returns the message that the client gets."""
        name = self._request.request_id
        self._engine.start(name)
        self._engine.give(name, self._tokenizer.encode(text, add_special_tokens=False))
        self._engine.finish(name)
        return self._asking.body()["choices"][0]["message"]


@pytest.fixture
def ask(
    engine: ScriptedEngine, door: httpx.Client, tokenizer: Tokenizer
) -> Callable[[dict[str, Any]], Asked]:
    return lambda body: Asked(engine, door, tokenizer, body)


@pytest.mark.parametrize(
    ("body", "allowed", "refused"),
    [
        pytest.param(
            JSON,
            [PARIS, THOUGHT + PARIS, "<think></think>" + PARIS],
            ["", OSLO, THOUGHT, THOUGHT + OSLO, "Hm. " + PARIS, GO],
            id="a model thinks before JSON",
        ),
        pytest.param(
            JSON | NO_THOUGHTS,
            [PARIS],
            [THOUGHT + PARIS, OSLO],
            id="no thoughts behind those that the template has closed",
        ),
        pytest.param(
            tools() | {"tool_choice": "required"},
            [GO, SEE, f"{GO}\n{SEE}", THOUGHT + GO],
            ["", "Hi", PARIS, GO_WRONG, SEE_WRONG, THOUGHT, THOUGHT + GO_WRONG, "Hi " + GO],
            id="a call is required",
        ),
        pytest.param(
            tools() | {"tool_choice": {"type": "function", "function": {"name": "see"}}},
            [SEE, THOUGHT + SEE],
            [GO, f"{SEE}\n{SEE}", SEE_WRONG],
            id="a named one is required",
        ),
        pytest.param(
            tools(),
            ["", "Hi", "2 < 3 <b>", "{}", GO, SEE, SEE_WRONG, f"Hi {GO}\n{SEE}", THOUGHT + GO],
            [GO_WRONG, THOUGHT + GO_WRONG, f"Hi {GO} Hi", call("fly", PARIS), "Hi <tool_call>"],
            id="free answers call strict tools as they are described",
        ),
        pytest.param(
            tools(strict=False) | {"parallel_tool_calls": False},
            ["Hi", GO, SEE, GO_WRONG, "Hi " + GO],
            [f"{GO}\n{SEE}", call("fly", PARIS)],
            id="one call at most",
        ),
        pytest.param(
            tools(strict=False) | JSON,
            [PARIS, GO, SEE, f"{GO}\n{SEE}", GO_WRONG, THOUGHT + PARIS, THOUGHT + GO],
            ["", "Hi", OSLO, f"Hi {GO}", f"{PARIS}{GO}", call("fly", PARIS)],
            id="JSON, or calls of tools",
        ),
        pytest.param(
            tools() | JSON | {"tool_choice": "none"},
            [PARIS, THOUGHT + PARIS],
            [GO, OSLO],
            id="JSON, and no calls",
        ),
    ],
)
def test_an_answer_may_be_what_the_chat_says(
    ask: Callable[[dict[str, Any]], Asked],
    body: dict[str, Any],
    allowed: list[str],
    refused: list[str],
) -> None:
    asked = ask(body)
    for text in allowed:
        assert asked.allows(text), text
    for text in refused:
        assert not asked.allows(text), text
    asked.message(allowed[0])


@pytest.mark.parametrize("body", [{}, tools(strict=False), tools() | {"tool_choice": "none"}])
def test_other_answers_are_free(
    ask: Callable[[dict[str, Any]], Asked], body: dict[str, Any]
) -> None:
    asked = ask(body)
    assert asked.constraint is None
    assert asked.message("Hi")["content"] == "Hi"


def test_a_prompt_that_opens_thoughts_has_them_closed_first(
    ask: Callable[[dict[str, Any]], Asked],
) -> None:
    opened = [*CHAT["messages"], {"role": "assistant", "content": "<think>"}]
    asked = ask(JSON | {"messages": opened, "continue_final_message": True})
    assert asked.allows(f"Hm.\n</think>\n\n{PARIS}")
    assert not asked.allows(PARIS)
    message = asked.message(f"Hm.\n</think>\n\n{PARIS}")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", PARIS)


def test_a_message_that_is_gone_on_with_has_no_thoughts_in_it(
    ask: Callable[[dict[str, Any]], Asked],
) -> None:
    begun = [*CHAT["messages"], {"role": "assistant", "content": "So: "}]
    asked = ask(JSON | {"messages": begun, "continue_final_message": True})
    assert asked.allows(PARIS)
    assert not asked.allows(THOUGHT + PARIS)
    assert asked.message(PARIS)["content"] == PARIS


def test_markers_are_not_spelled_in_letters(
    ask: Callable[[dict[str, Any]], Asked], tokenizer: Tokenizer
) -> None:
    asked = ask(tools() | JSON)
    assert asked.constraint is not None
    for before, spelled in [(THOUGHT[:12], "</think>"), (THOUGHT + "", "<tool_call>")]:
        matcher = asked.constraint.matcher(tokenizer.encode(before, add_special_tokens=False))
        letters = [tokenizer.encode(char, add_special_tokens=False)[0] for char in spelled]
        assert not all(matcher.accept(token) for token in letters), spelled
    asked.message(PARIS)


def test_what_was_thought_and_called_comes_apart(ask: Callable[[dict[str, Any]], Asked]) -> None:
    message = ask(tools()).message(f"{THOUGHT}I go. {GO}")
    assert message["reasoning_content"] == "What is {a} city?"
    assert message["content"].strip() == "I go."
    (called,) = message["tool_calls"]
    assert json.loads(called["function"]["arguments"]) == {"city": "Paris"}


def test_a_schema_that_cannot_be_watched_is_refused(door: httpx.Client) -> None:
    hostile = {"type": "object", "properties": {"a": {"type": "HashMap"}}}
    function = {"name": "f", "strict": True, "parameters": hostile}
    body = {**CHAT, "tools": [{"type": "function", "function": function}]}
    response = door.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "HashMap" in response.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_arguments_are_an_object(door: httpx.Client, choice: str) -> None:
    function = {"name": "f", "parameters": {"type": "array"}}
    body = {**CHAT, "tools": [{"type": "function", "function": function}], "tool_choice": choice}
    response = door.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools[0].function.parameters"


def test_a_marker_inside_json_is_text(ask: Callable[[dict[str, Any]], Asked]) -> None:
    text = json.dumps({"city": "Paris <tool_call>\n" + call("go", PARIS)})
    assert ask(tools() | JSON).message(text)["content"] == text


def test_an_answer_that_stops_within_a_call_has_called_nothing(
    engine: ScriptedEngine, door: httpx.Client, tokenizer: Tokenizer
) -> None:
    body = {**CHAT, **tools(), "stop": ["Paris"], "request_id": "r"}
    asking = Asking(door, "/v1/chat/completions", body)
    engine.wait_request()
    engine.start("r")
    engine.give("r", tokenizer.encode(GO, add_special_tokens=False))
    engine.finish("r")
    (choice,) = asking.body()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_half_a_closing_marker_is_no_text(ask: Callable[[dict[str, Any]], Asked]) -> None:
    message = ask(tools()).message(GO[:-3])
    assert len(message["tool_calls"]) == 1
    assert not message["content"]
