"""Anything at all, to every route: no 5xx, no hang, no leaked page, and the next request works.

Half of the cases are schemathesis's, from the served description; half are made of values that
clients send, good and bad, put together at random, and some leave in the middle. A few hundred run
in ``make test``, 20,000 in ``make prove-fuzz`` (``JAXSERVE_FUZZ_CASES``).
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from jaxserve.engine.engine import Engine
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grammar_compiler import GrammarCompiler
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.parsing import FORMATS
from jaxserve.frontend.template import ChatTemplate
from jaxserve.testing import counting_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    # Threads of the server draw random numbers, too, which hypothesis takes for the test's.
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]

CASES = int(os.environ.get("JAXSERVE_FUZZ_CASES", "400"))
QUIETLY: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "phases": [Phase.generate],
    "verbosity": Verbosity.quiet,
}


@dataclass(frozen=True)
class Served:
    """A server over an engine that answers at once."""

    engine: Engine
    url: str
    client: httpx.Client
    statuses: Counter[tuple[str, int]]

    def ask(self, route: str, body: Any) -> None:
        """Sends a body; counts what comes back."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"content-type": "application/json"}
        self.count(route, self.client.post(route, content=raw, headers=kind))

    def count(self, route: str, response: Any) -> None:
        """Notes a response, which must be no failure of the server."""
        self.statuses[route, response.status_code] += 1
        assert response.status_code < 500, f"{route}: {response.text[:500]}"
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    tokenizer = byte_tokenizer()
    engine, _ = counting_engine(
        max_rows=8, num_pages=400, context_tokens=256, embeddings=True, end_ids=(0, 2)
    )
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, source="the byte tokenizer")
    grammars = GrammarCompiler(tokenizer, vocab_size=259)
    text = TextEngine(engine, tokenizer, template, grammars, FORMATS["hermes"])
    info = ModelInfo(name="m", model_digest="d", context_tokens=256, vocab_size=259)
    server = ServerThread(text, info, ServerConfig(port=0), HttpConfig(port=0))
    engine.start()
    server.start()
    before = threading.active_count()
    url = f"http://{server.http_address}"
    with httpx.Client(base_url=url, timeout=60) as client:
        made = Served(engine, url, client, Counter())
        yield made
        for key, count in sorted(made.statuses.items()):
            print(f"\n{key[0]} {key[1]}: {count}", end="")
        assert client.post("/v1/completions", json={"prompt": "Hi"}).status_code == 200
    # A stream that its client has left ends by the next step.
    for _ in range(500):
        if engine.idle:
            break
        threading.Event().wait(0.02)
    assert engine.idle
    assert threading.active_count() <= before + 4, "threads are left"
    server.stop(0.0)
    engine.stop()
    engine.check_integrity()
    grammars.close()
    template.close()


def test_whatever_the_description_allows_or_forbids_is_answered(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]  # type: ignore[union-attr]
    posts = [each for each in operations if each.method == "post"]
    for operation in posts:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=max(5, CASES // 4 // len(posts)), **QUIETLY)
            @given(case=operation.as_strategy(generation_mode=mode), named=st.booleans())
            def ask(case: Any, named: bool) -> None:
                if named and isinstance(case.body, dict):
                    case.body["model"] = "m"  # Otherwise nearly all ask for another one.
                served.count(case.path, case.call())

            ask()


TEXTS = st.sampled_from(["", "Hi", "é\u0000\ud83d\ude00", "<|im_end|>", "x" * 300, "{", "\\"])
NUMBERS = st.sampled_from(
    [None, 0, 1, -1, 2, 20, 21, 64, 65, 255, 256, 0.5, 1.0, 1e308, -1e308, 2**31, 2**63, 2**64, 1e3]
)
SCHEMAS = st.sampled_from(
    [
        {"type": "object"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        {"enum": ["a", 1, None]},
        {"type": "objekt"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "https://example.com/schema"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"not": {}},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "minLength": 10**9},
        {"properties": {f"p{n}": {"type": "string"} for n in range(200)}},
        {},
    ]
)
REGEXES = st.sampled_from(
    ["a+", "(", "(a|aa)+", "(.*a){40}", "[^\\x00-\\xff]", "a{1,99999}", "", "\\"]
)
GRAMMARS = st.sampled_from(["start: A", 'start: "a" start', "root ::= (", 'a: "b"', "start: start"])
TOOL = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["function", "web_search"]),
        "function": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["f", "g", "", "a b", "x" * 100]),
                "parameters": SCHEMAS,
                "strict": st.booleans(),
            }
        ),
    }
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "king"])},
    optional={
        "content": st.one_of(
            TEXTS,
            st.none(),
            st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=2),
            st.just([{"type": "image_url", "image_url": {"url": "http://x"}}]),
        ),
        "tool_calls": st.just(
            [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        ),
        "tool_call_id": st.just("1"),
    },
)
COMMON: dict[str, Any] = {
    "max_tokens": st.sampled_from([1, 5, 50, 0, -1, 10**9, None]),
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": NUMBERS,
    "min_p": NUMBERS,
    "n": st.sampled_from([1, 2, 8, 0, 65]),
    "seed": NUMBERS,
    "presence_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=3)),
    "stop_token_ids": st.lists(st.integers(-1, 300), max_size=3),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "300", "a", "-1"]), NUMBERS, max_size=2),
    "allowed_token_ids": st.lists(st.integers(0, 260), max_size=4),
    "ignore_eos": st.booleans(),
    "min_tokens": NUMBERS,
    "truncate_prompt_tokens": NUMBERS,
    "stream": st.booleans(),
    "prompt_logprobs": NUMBERS,
    "cache_salt": TEXTS,
    "priority": NUMBERS,
    "skip_special_tokens": st.booleans(),
    "guided_regex": REGEXES,
    "guided_grammar": GRAMMARS,
    "guided_choice": st.lists(TEXTS, max_size=3),
    "guided_json": SCHEMAS,
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema"])},
        optional={"json_schema": st.fixed_dictionaries({"name": TEXTS, "schema": SCHEMAS})},
    ),
}


def some(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Bodies with at most four of the optional fields: with more, one is nearly always refused."""

    def of(names: list[str]) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries({**required, **{name: optional[name] for name in names}})

    return st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True).flatmap(of)


PROMPT = st.one_of(
    TEXTS,
    st.lists(TEXTS, max_size=3),
    st.lists(st.integers(-1, 300), max_size=5),
    st.lists(st.lists(st.integers(0, 258), max_size=3), max_size=2),
)
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/v1/completions": some(
        {"prompt": PROMPT},
        {**COMMON, "echo": st.booleans(), "logprobs": st.sampled_from([0, 1, 20, 21, None])},
    ),
    "/v1/chat/completions": some(
        {"messages": st.lists(MESSAGE, max_size=3)},
        {
            **COMMON,
            "logprobs": st.booleans(),
            "top_logprobs": NUMBERS,
            "tools": st.lists(TOOL, max_size=3),
            "tool_choice": st.sampled_from(["auto", "none", "required", "maybe"]),
            "parallel_tool_calls": st.booleans(),
            "continue_final_message": st.booleans(),
            "chat_template_kwargs": st.sampled_from([{}, {"a": 1}, {"messages": []}]),
        },
    ),
    "/v1/responses": some(
        {"input": st.one_of(TEXTS, st.lists(MESSAGE, max_size=2))},
        {
            "max_output_tokens": NUMBERS,
            "temperature": NUMBERS,
            "stream": st.booleans(),
            "instructions": TEXTS,
            "include": st.sampled_from([["message.output_text.logprobs"], ["x"], []]),
            "text": st.fixed_dictionaries(
                {"format": st.fixed_dictionaries({"type": TEXTS, "schema": SCHEMAS})}
            ),
            "tools": st.lists(
                st.fixed_dictionaries({"type": st.just("function"), "name": TEXTS}), max_size=2
            ),
        },
    ),
    "/v1/embeddings": some(
        {"input": PROMPT},
        {"dimensions": NUMBERS, "encoding_format": st.sampled_from(["float", "base64", "x"])},
    ),
    "/tokenize": some(
        {}, {"prompt": TEXTS, "messages": st.lists(MESSAGE, max_size=2), "model": TEXTS}
    ),
    "/detokenize": some({"tokens": st.lists(st.integers(-1, 300), max_size=5)}, {"model": TEXTS}),
}


@pytest.mark.parametrize("route", BODIES)
def test_whatever_clients_put_together_is_answered(served: Served, route: str) -> None:
    @settings(max_examples=max(5, CASES // 2 // len(BODIES)), **QUIETLY)
    @given(BODIES[route])
    def ask(body: Any) -> None:
        served.ask(route, body)

    ask()


@settings(max_examples=max(5, CASES // 8), **QUIETLY)
@given(st.sampled_from(sorted(BODIES)), st.data(), st.integers(0, 400))
def leave(served: Served, route: str, data: Any, after: int) -> None:
    """Sends a request, or a part of one, reads a little and leaves."""
    body = json.dumps({**data.draw(BODIES[route]), "stream": True}).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall((head + body)[: after if after < 300 else None])
        if after >= 300:
            client.settimeout(0.002 * (after - 299))
            with suppress(TimeoutError):
                client.recv(after)
    served.statuses[route, 0] += 1


def test_clients_that_leave_at_any_moment_leave_nothing_behind(served: Served) -> None:
    leave(served)


@settings(max_examples=max(5, CASES // 8), **QUIETLY)
@given(st.sampled_from(sorted(BODIES)), st.binary(max_size=200))
def raw(served: Served, route: str, body: bytes) -> None:
    """Sends bytes that are hardly ever JSON."""
    served.ask(route, body)


def test_bytes_that_are_no_json_are_refused(served: Served) -> None:
    raw(served)
