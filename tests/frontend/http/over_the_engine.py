"""Both doors over a real engine whose runner counts, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2 as httpx

from jaxserve.engine.engine import Engine
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.template import ChatTemplate

INFO = ModelInfo(
    name="counting",
    model_digest="d1",
    architecture="sums",
    context_tokens=64,
    vocab_size=259,
    dtype="int32",
    server_version="1.2.3",
    platform="cpu",
)


@contextmanager
def served(engine: Engine, *, chats: bool = False) -> Iterator[httpx.Client]:
    """Starts ``engine`` and a server over it; gives a client of its HTTP door."""
    with ExitStack() as undo:
        tokenizer = byte_tokenizer()
        template = None
        if chats:
            assert tokenizer.chat_template is not None
            made = ChatTemplate(tokenizer.chat_template, source="the byte tokenizer")
            template = undo.enter_context(made)
        engine.start()
        undo.callback(engine.check_integrity)
        undo.callback(engine.stop)
        text = TextEngine(engine, tokenizer, template)
        server = ServerThread(text, INFO, ServerConfig(port=0), HttpConfig(port=0))
        undo.callback(server.stop, 0.0)
        server.start()
        yield undo.enter_context(httpx.Client(base_url=f"http://{server.http_address}", timeout=20))
