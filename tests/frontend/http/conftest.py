"""The HTTP door over a scripted engine (see the gRPC door's ``conftest.py``), on a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx2 as httpx
import pytest

from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grammar_compiler import GrammarCompiler
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.parsing import FORMATS
from jaxserve.frontend.template import ChatTemplate
from tests.frontend.grpc.conftest import ScriptedEngine

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="session")
def template() -> Iterator[ChatTemplate]:
    assert TOKENIZER.chat_template is not None
    with ChatTemplate(TOKENIZER.chat_template, source="the byte tokenizer") as made:
        yield made


@pytest.fixture(scope="session")
def grammars() -> Iterator[GrammarCompiler]:
    with closing(GrammarCompiler(TOKENIZER, vocab_size=259)) as made:
        yield made


class Asking:
    """A request that runs in a thread while the test plays the engine."""

    def __init__(self, door: httpx.Client, route: str, body: dict[str, Any]) -> None:
        self._thread = threading.Thread(target=self._post, args=(door, route, body), daemon=True)
        self._thread.start()

    def response(self) -> httpx.Response:
        self._thread.join(20)
        return self._response

    def body(self) -> dict[str, Any]:
        response = self.response()
        assert response.status_code == 200, response.text
        return response.json()

    def chunks(self) -> list[dict[str, Any]]:
        lines = [line for line in self.response().text.split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def _post(self, door: httpx.Client, route: str, body: dict[str, Any]) -> None:
        self._response = door.post(route, json=body)


Open = Callable[..., httpx.Client]


@pytest.fixture
def open_door(template: ChatTemplate, grammars: GrammarCompiler) -> Iterator[Open]:
    """Starts a server and returns a client of its HTTP door; ends both after the test."""
    with ExitStack() as undo:

        def start(
            engine: Any, *, answer_format: str = "hermes", grace_s: float = 5.0, **settings: Any
        ) -> httpx.Client:
            info = ModelInfo(
                name="scripted",
                model_digest="d1",
                context_tokens=engine.limits.context_tokens,
                vocab_size=259,
                server_version="1.2.3",
            )
            text = TextEngine(engine, TOKENIZER, template, grammars, FORMATS[answer_format])
            server = ServerThread(
                text,
                info,
                ServerConfig(port=0, health_interval_s=0.01, stall_timeout_s=2.0, grace_s=grace_s),
                HttpConfig(port=0, **settings),
            )
            undo.callback(server.stop, 0.0)
            server.start()
            client = httpx.Client(base_url=f"http://{server.http_address}", timeout=20)
            return undo.enter_context(client)

        yield start


@pytest.fixture
def engine() -> ScriptedEngine:
    """Holds every request until the test says what happens to it."""
    return ScriptedEngine()


@pytest.fixture
def door(engine: ScriptedEngine, open_door: Open) -> httpx.Client:
    """A client of a door over ``engine``."""
    return open_door(engine)
