"""Everything at once for minutes, with clients that leave: what is left behind?

    python -m bench.load [--model smollm2] [--seconds 600] [--clients 24] [--seed 1] [--out FILE]

Starts ``jaxserve launch`` in a process of its own and asks it over HTTP and gRPC: chats,
completions, structured output, tools, embeddings, bad requests, watchers of the page, and clients
that leave in the head, in the body, before the answer and in its middle. Memory, threads,
descriptors and pages are read when the server is idle, behind a minute of the same load and at the
end. The exit status is 1 when a request failed by the server's fault, pages, threads or descriptors
are left, or memory still grows in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import common
from jaxserve.errors import JaxserveError
from jaxserve.frontend.client import AsyncClient, Client

WARM_S = 60.0
READY_S = 240.0
IDLE_S = 60.0
MOST_GROWTH_BYTES = 32 << 20
"""Of the second half. Grammars that are kept and the allocator's own reserves take some."""
TEXTS = ("Why is the sky blue?", "Tell me about Rome. " * 20, "List ten rivers and their lengths.")
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "travel", "parameters": CITY, "strict": True}}]


def main(words: Sequence[str] | None = None) -> int:
    """Serves, asks, compares; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="default smollm2")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the load (default 600)")
    parser.add_argument("--clients", type=int, default=24, help="at a time (default 24)")
    parser.add_argument("--seed", type=int, default=1, help="of what they do (default 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the line to this file")
    options = parser.parse_args(words)
    with Server(options.model) as server:
        seconds = (min(WARM_S, options.seconds), options.seconds / 2, options.seconds / 2)
        crowd = Crowd(server, options.clients, options.seed)
        states = []
        for duration in seconds:
            asyncio.run(crowd.ask_for(duration))
            states.append(server.wait_idle())
            common.say(f"{states[-1]}")
    before, middle, after = states
    line = {
        "bench": "load",
        "model": options.model,
        "seconds": options.seconds,
        "clients": options.clients,
        "seed": options.seed,
        "before": before,
        "middle": middle,
        "after": after,
        "answers": dict(sorted(crowd.answers.items())),
        "failures": crowd.failures[:10],
        "commit": common.commit(),
    }
    common.write(line, options.out)
    return int(bool(crowd.failures or crowd.left_behind(before, middle, after)))


class Server:
    """``jaxserve launch``, and what its process holds."""

    def __init__(self, model: str) -> None:
        """Starts it and waits until it is ready."""
        flags = ("--port", "0", "--http-port", "0", "--embeddings", "--max-rows", "8")
        flags += ("--context-tokens", "1024", "--ready-with", "all")
        command = [sys.executable, "-m", "jaxserve", "launch", model, *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        if not words:
            raise RuntimeError("the server did not start")
        facts = dict(word.split("=", 1) for word in words[1:])
        self.grpc = facts["address"]
        self.host, _, port = facts["http"].rpartition(":")
        self.port = int(port)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def wait_idle(self) -> dict[str, int]:
        """Waits until nothing runs; returns what the process holds then."""
        until = time.monotonic() + IDLE_S
        with Client(self.grpc) as client:
            while True:
                stats = client.stats()
                if not stats.rows_running + stats.requests_waiting:
                    break
                if time.monotonic() > until:
                    raise RuntimeError(f"not idle after {IDLE_S:g} s: {stats}")
                time.sleep(0.2)
        time.sleep(2.0)  # Connections that were left are closed.
        folder = Path(f"/proc/{self._process.pid}")
        status = dict(
            line.split(":", 1)
            for line in (folder / "status").read_text().splitlines()
            if ":" in line
        )
        return {
            "rss_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "threads": int(status["Threads"]),
            "descriptors": len(list((folder / "fd").iterdir())),
            "pages_used": stats.pages_used,
        }


class Crowd:
    """Clients that each do one thing after the other, drawn at random."""

    def __init__(self, server: Server, clients: int, seed: int) -> None:
        """Asks nothing yet."""
        self._server = server
        self._clients = clients
        self._random = random.Random(seed)
        self.answers: Counter[str] = Counter()
        """How requests ended: the status, or what the client did."""
        self.failures: list[str] = []
        self._things: list[tuple[int, Callable[[], Awaitable[str]]]] = [
            (8, self._answer),
            (6, self._leave),
            (3, self._bad),
            (2, self._half),
            (1, self._say_nothing),
            (1, self._watch),
            (3, self._grpc),
        ]

    async def ask_for(self, seconds: float) -> None:
        """Keeps all clients busy for a time."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._one(until) for _ in range(self._clients)))

    def left_behind(
        self, before: dict[str, int], middle: dict[str, int], after: dict[str, int]
    ) -> bool:
        """Whether something grew that should not; says what."""
        grown = {
            "pages": after["pages_used"],
            # A thread of a pool may come at any time.
            "threads": max(0, after["threads"] - before["threads"] - 2),
            "descriptors": max(0, after["descriptors"] - before["descriptors"] - 2),
            "bytes": max(0, after["rss_bytes"] - middle["rss_bytes"] - MOST_GROWTH_BYTES),
        }
        left = {name: count for name, count in grown.items() if count}
        common.say(f"left behind: {left or 'nothing'}")
        return bool(left)

    async def _one(self, until: float) -> None:
        weights = [weight for weight, _ in self._things]
        while time.monotonic() < until:
            ((_, thing),) = self._random.choices(self._things, weights)
            try:
                ended = await asyncio.wait_for(thing(), 120.0)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                ended = f"{thing.__name__}: {type(error).__name__}"
                self.failures.append(ended)
            self.answers[ended] += 1
            if ended.startswith("5"):
                self.failures.append(ended)

    # -- what a client does --------------------------------------------------------------------

    async def _answer(self) -> str:
        reader, writer = await self._send(*self._good())
        try:
            answer = await reader.read()
        finally:
            writer.close()
        return _status(answer)

    async def _leave(self) -> str:
        reader, writer = await self._send(*self._good())
        after_s = self._random.choice((0.0, 0.05, 0.3, 1.0, 3.0))
        with suppress(TimeoutError):
            async with asyncio.timeout(after_s):
                while await reader.read(self._random.choice((1, 100, 4096))):
                    pass
        _cut(writer)
        return "left"

    async def _bad(self) -> str:
        route, body = self._good()
        change: Any = self._random.choice(
            (
                {"max_tokens": -1},
                {"no_such": 1},
                {"model": "gpt-9"},
                {"structured_outputs": {"regex": "("}},
                {"structured_outputs": {"regex": "((a{1,999}){1,999}){1,999}b"}},
                {"messages": [], "prompt": "x" * 100_000},
            )
        )
        reader, writer = await self._send(route, {**body, **change})
        try:
            answer = await reader.read()
        finally:
            writer.close()
        return _status(answer)

    async def _half(self) -> str:
        reader, writer = await asyncio.open_connection(self._server.host, self._server.port)
        sent = _request(*self._good())
        writer.write(sent[: self._random.randrange(1, len(sent))])
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._random.choice((0.0, 1.0))):
                await reader.read()
        _cut(writer)
        return "half a request"

    async def _say_nothing(self) -> str:
        _, writer = await asyncio.open_connection(self._server.host, self._server.port)
        await asyncio.sleep(self._random.uniform(1.0, 10.0))
        _cut(writer)
        return "nothing said"

    async def _watch(self) -> str:
        route = self._random.choice(("/live", "/metrics", "/", "/v1/models"))
        reader, writer = await asyncio.open_connection(self._server.host, self._server.port)
        writer.write(
            f"GET {route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0.5, 5.0)):
                await reader.read()
        _cut(writer)
        return "watched"

    async def _grpc(self) -> str:
        leaves = self._random.random() < 0.5
        async with AsyncClient(self._server.grpc) as client:
            count = 0
            try:
                async with client.stream(self._random.choice(TEXTS), max_tokens=24) as stream:
                    async for _ in stream:
                        count += 1
                        if leaves and count == 4:
                            break
            except JaxserveError as error:
                return f"grpc: {type(error).__name__}"
        return "grpc: left" if leaves else "grpc: whole"

    def _good(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        text, tokens = draw.choice(TEXTS), draw.choice((1, 16, 48))
        chat: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "stream": draw.random() < 0.5,
            "n": draw.choice((1, 1, 1, 3)),
        }
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": CITY}}
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 3}),
            ("/v1/chat/completions", {**chat, "response_format": schema}),
            ("/v1/chat/completions", {**chat, "tools": TOOLS}),
            ("/v1/chat/completions", {**chat, "tools": TOOLS, "tool_choice": "required"}),
            (
                "/v1/completions",
                {
                    "prompt": [text, text[:40]],
                    "max_tokens": tokens,
                    "structured_outputs": {"regex": f"[a-z]{{1,{draw.randrange(1, 400)}}}"},
                },
            ),
            (
                "/v1/completions",
                {"prompt": text, "max_tokens": tokens, "stream": chat["stream"], "seed": 1},
            ),
            (
                "/v1/responses",
                {"input": text, "max_output_tokens": tokens, "stream": chat["stream"]},
            ),
            ("/v1/embeddings", {"input": [text, "a"]}),
            ("/tokenize", {"prompt": text}),
        ]
        return draw.choice(kinds)

    async def _send(
        self, route: str, body: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._server.host, self._server.port)
        writer.write(_request(route, body))
        return reader, writer


def _request(route: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def _status(answer: bytes) -> str:
    """The status of an answer; of a stream that failed behind its head, what it failed with."""
    if not answer:
        return "500: no answer"
    status = answer[9:12].decode()
    if status == "200" and (place := answer.find(b'"error": {')) >= 0:
        # A hostile expression may pass its limit in the middle of an answer.
        is_asked_for = b'"type": "invalid_request_error"' in answer[place:]
        return "400 in a stream" if is_asked_for else f"500: {answer[place:][:200]!r}"
    return status


def _cut(writer: asyncio.StreamWriter) -> None:
    """Leaves without a word: the connection is reset."""
    writer.transport.abort()


if __name__ == "__main__":
    sys.exit(main())
