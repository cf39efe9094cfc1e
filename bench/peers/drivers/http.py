"""A server with a streaming completion route, asked over HTTP with prompts as token ids.

The client is a few lines over a socket rather than a library, because its CPU time is the server's
loss. Each request has a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.peers.drivers import server
from bench.peers.protocol import Question, Reply

LINE_BYTES = 2**22
RETRY_S = 0.2
PROBE = Question([1], 1)
DATA = b"data: "


@dataclass(frozen=True)
class Dialect:
    """How a server is asked for tokens and says them."""

    path: str
    body: Callable[[Question, str], dict[str, Any]]
    ids: Callable[[Mapping[str, Any]], list[int]]
    """Of one event."""


def _llama_body(question: Question, model: str) -> dict[str, Any]:
    return {
        "prompt": question.prompt,
        "n_predict": question.output_tokens,
        "temperature": 0,
        "samplers": ["temperature"],
        "ignore_eos": True,
        "cache_prompt": True,
        "return_tokens": True,
        "stream": True,
    }


def _openai_body(question: Question, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": question.prompt,
        "max_tokens": question.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


def _openai_ids(event: Mapping[str, Any]) -> list[int]:
    return [one for choice in event.get("choices", ()) for one in choice.get("token_ids") or ()]


DIALECTS = {
    "llama.cpp": Dialect("/completion", _llama_body, lambda event: event.get("tokens") or []),
    "openai": Dialect("/v1/completions", _openai_body, _openai_ids),
}


class Http:
    """A server of this child, whose command gets the port in place of ``{port}``."""

    def __init__(self, command: Sequence[str], dialect: str, model: str, version: str) -> None:
        self._dialect, self._model, self.version = DIALECTS[dialect], model, version
        self._port = server.free_port()
        self._process = server.start([word.format(port=self._port) for word in command])
        self.process_id = self._process.pid
        server.wait_for_port(self._process, self._port)
        self._wait_for_answers()

    def _wait_for_answers(self) -> None:
        """Asks until it answers: some listen while they load. The parent bounds how long."""
        while self._process.poll() is None:
            try:
                asyncio.run(self._ask(PROBE, Reply(0.0)))
            except (OSError, RuntimeError):
                time.sleep(RETRY_S)
            else:
                return
        raise RuntimeError(f"the server ended with exit code {self._process.returncode}")

    def ask(self, questions: Sequence[Question], clients: int | None) -> list[Reply]:
        """As ``Driver.ask``."""
        return server.run(server.ask_all(questions, clients, self._ask))

    async def _ask(self, question: Question, reply: Reply) -> None:
        body = json.dumps(self._dialect.body(question, self._model)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=LINE_BYTES)
        try:
            writer.write(
                f"POST {self._dialect.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            status = await reader.readline()
            if b" 200 " not in status:
                said = (await reader.read(LINE_BYTES))[-300:]
                raise RuntimeError(f"HTTP answered {status.decode()!r} {said.decode()!r}")
            # Chunk sizes and headers stand on lines of their own, which do not begin as data.
            while line := await reader.readline():
                if line.startswith(DATA) and not line.startswith(DATA + b"[DONE]"):
                    event = json.loads(line[len(DATA) :])
                    if "error" in event:
                        raise RuntimeError(str(event["error"]))
                    reply.note(self._dialect.ids(event), time.perf_counter())
        finally:
            writer.close()

    def close(self) -> None:
        """Ends the server."""
        server.stop(self._process)


make = Http
