"""Everything around an answer over HTTP: what is refused and how, and who ends what when."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest

from jaxserve.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    EngineDeadError,
    ModelNotFoundError,
    PromptTooLongError,
    QueueFullError,
    RequestFailedError,
    ShuttingDownError,
)
from jaxserve.frontend.http.errors import TABLE, body_of, row_of
from tests.frontend.grpc.conftest import Limits, ScriptedEngine
from tests.frontend.http.conftest import Open

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "Hi"}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which has to have OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# -- what no route sees ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_a_local_door_answers_to_this_machines_names_alone(
    door: httpx.Client, host: str, status: int
) -> None:
    response = door.get("/health", headers={"host": host})
    assert response.status_code == status
    if status == 421:
        assert "not called" in error_of(response)["message"]


def test_names_that_are_allowed_are_all_that_there_are(open_door: Open) -> None:
    door = open_door(ScriptedEngine(), allowed_hosts=("Models.example",))
    assert door.get("/health", headers={"host": "models.example:80"}).status_code == 200
    assert door.get("/health", headers={"host": "localhost"}).status_code == 421


def test_no_other_site_may_read_or_ask(door: httpx.Client) -> None:
    response = door.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    simple = door.post(
        "/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"}
    )
    assert simple.status_code == 415
    assert door.options("/v1/completions").status_code == 405


def test_a_body_that_is_too_large_is_refused_told_or_untold(open_door: Open) -> None:
    door = open_door(ScriptedEngine("x"), max_body_bytes=1000)
    large = json.dumps({"prompt": "x" * 1000}).encode()
    kind = {"content-type": "application/json"}
    assert door.post("/v1/completions", content=large, headers=kind).status_code == 413

    def pieces() -> Any:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    response = door.post("/v1/completions", content=pieces(), headers=kind)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert door.post("/v1/completions", json={"prompt": "Hi"}).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: loc"]
)
def test_a_connection_that_begins_no_request_is_closed(open_door: Open, sent: bytes) -> None:
    door = open_door(ScriptedEngine(), receive_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", door.base_url.port), 10) as half_open:
        half_open.sendall(sent)
        assert half_open.recv(100) == b""
    assert door.get("/health").status_code == 200


def test_a_later_request_that_is_not_finished_is_closed_too(open_door: Open) -> None:
    door = open_door(ScriptedEngine(), receive_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", door.base_url.port), 10) as kept:
        kept.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(0.4)  # Idle connections are kept for longer.
        kept.sendall(b"GET /version HTTP/1.1\r\nHost: loc")
        assert kept.recv(100) == b""


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kibibytes", [65, 3000])
def test_a_head_without_end_is_refused(door: httpx.Client, kibibytes: int, ends: bool) -> None:
    sent = b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * kibibytes * 1024
    with socket.create_connection(("127.0.0.1", door.base_url.port), 10) as long:
        with suppress(ConnectionError):  # It may be closed before all has been sent.
            long.sendall(sent + (b"\r\n\r\n" if ends else b""))
        answer = b""
        with suppress(ConnectionError):
            answer = long.recv(4096)
        if kibibytes < 100:
            assert answer.startswith(b"HTTP/1.1 431")
            assert b"at most 65536 bytes" in answer
    assert door.get("/version").status_code == 200


def test_what_is_no_http_is_told_so(door: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", door.base_url.port), 10) as wrong:
        wrong.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = wrong.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_body_that_does_not_come_is_given_up(open_door: Open) -> None:
    door = open_door(ScriptedEngine(), receive_timeout_s=0.2)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 100\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", door.base_url.port), 10) as slow:
        slow.sendall(head.encode())
        begun = time.monotonic()
        slow.recv(100)
        assert time.monotonic() - begun < 5
    assert door.get("/health").status_code == 200


def test_more_connections_than_are_allowed_are_told_so(open_door: Open) -> None:
    door = open_door(ScriptedEngine(), max_connections=3)
    port = door.base_url.port
    held = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(3)]
    try:
        deadline = time.monotonic() + 10
        while (status := httpx.get(f"http://127.0.0.1:{port}/health").status_code) != 503:
            assert time.monotonic() < deadline, status
    finally:
        for each in held:
            each.close()
    deadline = time.monotonic() + 10
    while httpx.get(f"http://127.0.0.1:{port}/health").status_code != 200:
        assert time.monotonic() < deadline


# -- types and names ----------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("more", "param", "match"),
    [
        ({"foo": 1}, "foo", "unknown parameter: 'foo'"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5"),
        ({"temperature": True}, "temperature", "temperature is True"),
        ({"stream": "yes"}, "stream", "stream is 'yes'"),
        ({"stop": [1]}, "stop", "stop"),
        ({"temperature": 101}, "temperature", "temperature must be a finite number, 0 to 100"),
        ({"top_p": 0}, "top_p", "top_p must be"),
        ({"n": 65}, "n", "n must be 1 to 64"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 1"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "keys are token ids"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "this model's ids are 0 to 258"),
        ({"use_beam_search": True}, "use_beam_search", "not offered"),
        ({"length_penalty": 2.0}, "length_penalty", "not offered"),
        ({"response_format": {"type": "xml"}}, "response_format", "choose text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex cannot be used: .*unclosed"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "obeys one of them"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"xml": "("}}, "structured_outputs.xml", "unknown parameter"),
        ({"priority": 10**9}, "priority", "priority must be"),
        ({"cache_salt": "x" * 129}, "cache_salt", "129 characters"),
        ({"request_id": "x" * 129}, "request_id", "129 characters"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"logprobs": None, "prompt_logprobs": 21}, "prompt_logprobs", "0 to 20"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(
    door: httpx.Client, route: str, more: dict[str, Any], param: str, match: str
) -> None:
    response = door.post(route, json={**ROUTES[route], **more})
    error = error_of(response)
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(match, error["message"])


@pytest.mark.parametrize(
    ("route", "body", "param", "match"),
    [
        ("/v1/completions", {}, "prompt", "missing required parameter: 'prompt'"),
        ("/v1/completions", {"prompt": ""}, "prompt", "prompt is empty"),
        ("/v1/completions", {"prompt": []}, "prompt", "prompt is empty"),
        ("/v1/completions", {"prompt": [[]]}, "prompt", "prompt is empty"),
        ("/v1/completions", {"prompt": [300]}, "prompt", "token id 300"),
        ("/v1/completions", {"prompt": ["a"] * 257}, "prompt", "257 prompts"),
        ("/v1/completions", {**TEXT, "suffix": "x"}, "suffix", "not offered"),
        ("/v1/completions", {**TEXT, "best_of": 2}, "best_of", "not offered"),
        ("/v1/completions", {**TEXT, "max_tokens": 0}, "max_tokens", "asks for nothing"),
        ("/v1/completions", {**TEXT, "logprobs": 21}, "logprobs", "0 to 20"),
        ("/v1/chat/completions", {}, "messages", "no messages"),
        ("/v1/chat/completions", {"messages": [{}]}, "messages[0].role", "missing"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "king", "content": "x"}]},
            "messages[0].role",
            "'king'",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "text only",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user"}]},
            "messages[0].content",
            "no text",
        ),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "without logprobs"),
        (
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "0 to 20",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "max_tokens": 1, "max_completion_tokens": 2},
            "max_completion_tokens",
            "different things",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "max_completion_tokens": 0},
            "max_completion_tokens",
            "max_completion_tokens must be",
        ),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens", "max_tokens must be"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 0}, "max_output_tokens", "must be"),
        ("/v1/embeddings", {"input": ""}, "input", "prompt is empty"),
        ("/v1/chat/completions", {**CHAT, "modalities": ["audio"]}, "modalities", "not offered"),
        ("/v1/chat/completions", {**CHAT, "functions": [{}]}, "functions", "send tools"),
        ("/v1/chat/completions", {**CHAT, "chat_template": "x"}, "chat_template", "operator's"),
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs",
            "no request decides",
        ),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "maybe"}, "tool_choice", "choose auto"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "is empty"),
        ("/tokenize", {}, "prompt", "exactly one of prompt and messages"),
        ("/detokenize", {"tokens": [300]}, "token_ids", "token id 300"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "tokens"),
    ],
)
def test_what_one_route_does_not_take_is_named(
    door: httpx.Client, route: str, body: dict[str, Any], param: str, match: str
) -> None:
    response = door.post(route, json=body)
    error = error_of(response)
    assert response.status_code == 400, error
    assert error["param"] == param
    assert match in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"\xff", b"null", b'"x"', b"[" * 100_000, b'{"a":' * 5000]
)
def test_a_body_that_is_no_request_is_refused(door: httpx.Client, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    response = door.post("/v1/completions", content=body, headers=kind)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_routes_and_methods_that_are_not_there_say_so(door: httpx.Client) -> None:
    assert "there is no GET /v2" in error_of(door.get("/v2"))["message"]
    response = door.get("/v1/completions")
    assert response.status_code == 405
    assert "GET is not what" in error_of(response)["message"]


def test_every_other_route_says_what_it_is_for(door: httpx.Client) -> None:
    assert [model["id"] for model in door.get("/v1/models").json()["data"]] == ["scripted"]
    assert door.get("/v1/models/scripted").json()["max_model_len"] == 64
    assert door.get("/v1/models/other").status_code == 404
    assert door.get("/version").json() == {"version": "1.2.3"}
    tokens = door.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    text = door.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert text.endswith("Hé")
    chat = door.post("/tokenize", json=CHAT).json()
    assert chat["count"] > 5
    assert "/v1/chat/completions" in door.get("/openapi.json").json()["paths"]


# -- the engine's errors ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLongError(70, 64), 400, "context_length_exceeded"),
        (DuplicateRequestError("a"), 409, "duplicate_request_id"),
        (QueueFullError("requests", 5, 5, retry_after_s=2.5), 429, "rate_limit_exceeded"),
        (ShuttingDownError("a"), 503, None),
        (DeadlineExceededError("a", 3), 504, None),
        (RequestFailedError("a", "logits"), 500, "request_failed"),
        (EngineDeadError("fire"), 503, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_request_is_refused_with_is_told_in_the_form_of_the_door(
    engine: ScriptedEngine,
    door: httpx.Client,
    error: Exception,
    status: int,
    code: str | None,
    stream: bool,
) -> None:
    engine.refusals.append(error)
    response = door.post("/v1/completions", json={**TEXT, "stream": stream})
    assert response.status_code == status
    assert error_of(response)["message"] == str(error)
    assert error_of(response)["code"] == code
    if isinstance(error, QueueFullError):
        assert response.headers["retry-after"] == "3"


def test_another_model_is_not_found(door: httpx.Client) -> None:
    response = door.post("/v1/completions", json={**TEXT, "model": "gpt-9"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert row_of(ModelNotFoundError("a", "b")) is TABLE[ModelNotFoundError]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_nobody_meant_is_logged_and_tells_nothing(
    engine: ScriptedEngine, door: httpx.Client, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refusals.append(ZeroDivisionError("secret"))
    response = door.post("/v1/completions", json={**TEXT, "stream": stream, "request_id": "r7"})
    assert response.status_code == 500
    assert error_of(response)["message"] == "internal error; tell the operator request id r7"
    assert "request r7 failed unexpectedly" in caplog.text


def test_a_request_that_fails_in_mid_stream_says_so_as_its_last_event(
    engine: ScriptedEngine, door: httpx.Client
) -> None:
    with door.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
        name = engine.wait_request().request_id
        engine.start(name)
        engine.give(name, "ab")
        engine.finish(name, error=RequestFailedError(name, "the logits are not finite"))
        events = [line for line in response.iter_lines() if line]
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == "ab"
    last = json.loads(events[-1].removeprefix("data: "))
    assert "logits are not finite" in last["error"]["message"]


def test_long_messages_are_clipped_and_hidden_errors_have_no_field() -> None:
    body = body_of(RequestFailedError("a", "x" * 5000))
    assert len(body["error"]["message"]) == 1000
    assert body_of(RuntimeError("x"))["error"]["message"].endswith("request id unknown")


# -- ends ----------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_ends_its_request(
    engine: ScriptedEngine, door: httpx.Client, route: str, stream: bool, begun: bool
) -> None:
    body = json.dumps({**ROUTES[route], "stream": stream}).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", door.base_url.port), 10) as client:
        client.sendall(head + body)
        name = engine.wait_request().request_id
        if begun:
            engine.start(name)
            engine.give(name, "ab")
            engine.wait_taken(name)
    engine.wait(lambda: engine.closed == [name])
    assert door.get("/health").status_code == 200


def test_one_of_several_prompts_that_fails_ends_the_others(
    engine: ScriptedEngine, door: httpx.Client
) -> None:
    with door.stream("POST", "/v1/completions", json={"prompt": ["a", "b"], "stream": True}) as got:
        first, second = (engine.wait_request(number).request_id for number in (0, 1))
        engine.start(first)
        engine.finish(first, error=RequestFailedError(first, "why"))
        assert "why" in got.read().decode()
    engine.wait(lambda: engine.closed == [second])


def test_a_prompt_that_is_refused_leaves_none_of_its_neighbours_running(
    engine: ScriptedEngine, door: httpx.Client
) -> None:
    engine.refusals = []
    response = door.post("/v1/completions", json={"prompt": ["ok", "x" * 100]})
    assert response.status_code == 400
    assert engine.live == {}


def test_draining_turns_health_and_refuses_new_requests(
    engine: ScriptedEngine, door: httpx.Client
) -> None:
    assert door.get("/ready").json() == {"status": "serving", "detail": ""}
    engine.drain()
    for path in ("/health", "/healthz", "/ready", "/readyz"):
        response = door.get(path)
        assert (response.status_code, response.json()["detail"]) == (503, "draining")
        assert (door.head(path).status_code, door.head(path).content) == (503, b"")
    assert door.post("/v1/completions", json=TEXT).status_code == 503


def test_a_client_that_reads_nothing_is_given_up(engine: ScriptedEngine, open_door: Open) -> None:
    engine = ScriptedEngine(limits=Limits(context_tokens=100_000))
    door = open_door(engine)
    body = json.dumps({**TEXT, "stream": True, "max_tokens": 90_000, "logprobs": 0}).encode()
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", door.base_url.port))
        stuck.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        name = engine.wait_request().request_id
        engine.start(name)
        deadline = time.monotonic() + 90
        first = 0
        with suppress(KeyError):  # It is given up between two looks.
            while name in engine.live:
                assert time.monotonic() < deadline, "the reader was never given up"
                if not engine.live[name].pending:  # Until the server waits for its client.
                    engine.give(name, "x" * 2000, first=first)
                    first += 2000
                time.sleep(0.01)
    assert engine.closed == [name]


def test_a_server_that_stops_lets_an_answer_finish_and_then_closes(
    engine: ScriptedEngine, open_door: Open
) -> None:
    door = open_door(engine)
    with door.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
        name = engine.wait_request().request_id
        engine.start(name)
        engine.give(name, "ab")
        assert response.status_code == 200
        engine.drain()
        engine.give(name, "cd", first=2)
        engine.finish(name, tokens=4)
        text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n")
