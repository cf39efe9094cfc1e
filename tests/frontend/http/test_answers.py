"""What answers over HTTP hold beside their text: scores of prompts, counts, what was held back."""

from __future__ import annotations

import threading

import httpx2 as httpx
import pytest

from jaxserve.engine.request import TokenLogprobs
from jaxserve.frontend import grammar_compiler
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grammar_compiler import COMPILE_THREADS
from tests.frontend.grpc.conftest import Limits, ScriptedEngine
from tests.frontend.http.conftest import Asking, Open

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "request_id": "r"}
TEXT = {"prompt": "Hi", "request_id": "r"}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


def scores(engine: ScriptedEngine) -> tuple[TokenLogprobs | None, ...]:
    """Of the prompt that waits: none for its first token, then one that is third likeliest."""
    prompt = engine.wait_request().prompt
    entry = TokenLogprobs(-1.5, 3, tuple(engine.ids("xy")), (-0.25, -0.5))
    return (None, *[entry] * (len(prompt) - 1))


@pytest.mark.parametrize("route", ROUTES)
def test_scores_of_a_prompt_come_apart_from_those_of_the_answer(
    engine: ScriptedEngine, door: httpx.Client, route: str
) -> None:
    logprobs = {"logprobs": True} if "chat" in route else {"logprobs": 0}
    asking = Asking(door, route, {**ROUTES[route], "prompt_logprobs": 1, **logprobs})
    engine.start("r", prompt_logprobs=scores(engine))
    engine.give("r", "ok", logprobs=TokenLogprobs(-2.0, 1))
    engine.finish("r", tokens=2)
    body = asking.body()

    choice = body["choices"][0]
    shown = body if "chat" in route else choice
    first, second, *_ = shown["prompt_logprobs"]
    token = engine.wait_request().prompt[1]
    assert first is None
    assert second == {
        str(token): {
            "logprob": -1.5,
            "rank": 3,
            "decoded_token": engine.tokenizer.token_text(token),
        },
        str(engine.ids("x")[0]): {"logprob": -0.25, "rank": 1, "decoded_token": "x"},
    }
    assert len(shown["prompt_logprobs"]) == len(engine.wait_request().prompt)
    if "chat" in route:
        assert [each["token"] for each in choice["logprobs"]["content"]] == ["o", "k"]
    else:
        assert choice["logprobs"]["tokens"] == ["o", "k"]
        assert choice["text"] == "ok"


@pytest.mark.parametrize("route", ROUTES)
def test_scores_of_a_prompt_do_not_stream(door: httpx.Client, route: str) -> None:
    response = door.post(route, json={**ROUTES[route], "prompt_logprobs": 1, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"
    assert "whole answers" in response.json()["error"]["message"]


def test_a_prompt_is_echoed_with_as_many_scores_as_the_answer(door: httpx.Client) -> None:
    response = door.post(
        "/v1/completions", json={**TEXT, "echo": True, "logprobs": 2, "prompt_logprobs": 1}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"
    assert "as often as the answer" in response.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_every_choice_shows_the_prompt_that_was_scored_once(
    engine: ScriptedEngine, door: httpx.Client, route: str
) -> None:
    asking = Asking(door, route, {**ROUTES[route], "prompt_logprobs": 0, "n": 2})
    engine.start("r", prompt_logprobs=scores(engine))
    for choice in range(2):
        engine.give("r", "ab"[choice], choice=choice)
        engine.finish("r", tokens=1, choice=choice)
    body = asking.body()
    texts = [c["message"]["content"] if "chat" in route else c["text"] for c in body["choices"]]
    assert texts == ["a", "b"]
    shown = [body] if "chat" in route else body["choices"]
    assert [len(each["prompt_logprobs"]) for each in shown] == [
        len(engine.wait_request().prompt)
    ] * len(shown)


@pytest.mark.parametrize("route", ROUTES)
def test_usage_of_every_chunk_counts_the_tokens_until_there(
    engine: ScriptedEngine, door: httpx.Client, route: str
) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    body = {**ROUTES[route], "n": 2, "stream": True, "stream_options": options}
    asking = Asking(door, route, body)
    engine.wait_request()
    engine.start("r")
    for first, choice, text in ((0, 0, "abc"), (0, 1, "xy"), (3, 0, "d")):
        engine.give("r", text, first=first, choice=choice)
        engine.wait_taken("r")
    engine.finish("r", tokens=4, choice=0)
    engine.finish("r", tokens=2, choice=1)
    counts = [chunk["usage"]["completion_tokens"] for chunk in asking.chunks()]
    starts = 2 if "chat" in route else 0
    assert counts == [0] * starts + [3, 5, 6, 6, 6, 6]


def test_thoughts_that_are_not_wanted_leave_no_empty_chunks(
    engine: ScriptedEngine, open_door: Open
) -> None:
    door = open_door(engine, answer_format="thinking")
    body = {**CHAT, "stream": True, "include_reasoning": False}
    asking = Asking(door, "/v1/chat/completions", body)
    engine.wait_request()
    engine.start("r")
    text = "<think>Well.</think>Yes."
    for place, char in enumerate(text):
        engine.give("r", char, first=place)
        engine.wait_taken("r")
    engine.finish("r", tokens=len(text))
    deltas = [chunk["choices"][0]["delta"] for chunk in asking.chunks()]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta.get("content") for delta in deltas[1:-1]), deltas
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "Yes."


def test_log_probabilities_of_text_that_is_held_back_come_with_it(open_door: Open) -> None:
    engine = ScriptedEngine(limits=Limits(context_tokens=1024))  # Tools make a long prompt.
    door = open_door(engine)
    include = ["message.output_text.logprobs"]
    body = {"input": "Hi", "request_id": "r", "include": include, "tools": [FUNCTION]}
    asking = Asking(door, "/v1/responses", body)
    engine.wait_request()
    engine.start("r")
    for place, char in enumerate("a<b"):  # "<" may begin a tool call.
        engine.give("r", char, first=place, logprobs=TokenLogprobs(-1.0, 1))
        engine.wait_taken("r")
    engine.finish("r", tokens=3)
    part = asking.body()["output"][0]["content"][0]
    assert part["text"] == "a<b"
    assert [each["token"] for each in part["logprobs"]] == ["a", "<", "b"]


def test_grammars_that_take_their_time_hold_up_no_chats(
    open_door: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, go = threading.Semaphore(0), threading.Event()

    def wait(grammar: Grammar) -> str:
        compiling.release()
        go.wait(20)
        return source_of(grammar)

    source_of = grammar_compiler.source_of
    monkeypatch.setattr(grammar_compiler, "source_of", wait)
    monkeypatch.setattr(grammar_compiler, "COMPILE_TIMEOUT_S", 20.0)
    door = open_door(ScriptedEngine("a"))
    chat = {"messages": CHAT["messages"]}
    slow = [
        Asking(door, "/v1/chat/completions", {**chat, "guided_regex": f"slow{number}"})
        for number in range(4)
    ]
    try:
        for _ in range(COMPILE_THREADS):
            assert compiling.acquire(timeout=10)
        answered = door.post("/v1/chat/completions", json=chat, timeout=5)
        assert answered.status_code == 200
    finally:
        go.set()
    assert [each.response().status_code for each in slow] == [200] * 4
