"""Measures the front end alone: the real server and engine over a runner that only keeps a pace.

    python -m bench.frontend [--door grpc|http] [--rows 64] [--steps-per-s 250] [--seconds 5]
        [--out FILE]

The clients are another process over loopback, one stream a row, and read bytes before they parse
them, to leave the server its share of the cores. Goals: 15,000 tokens a second delivered, and a
median of at most 2 tokens a message, so that nothing is gathered up for readers that keep up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from bench import common, machine
from bench.common import quantile
from bench.host import CONTEXT_TOKENS, instant_engine
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.client_wire import generate_request
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import generation_pb2 as pb

GOAL_TOKENS_PER_S = 15_000.0
GOAL_TOKENS_A_MESSAGE = 2
CONNECTIONS = 4
METHOD = "/jaxserve.v1.GenerationService/Generate"


def main(words: Sequence[str] | None = None) -> None:
    """Starts the server here and the clients beside it; prints one line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.frontend", description="Measures the front end alone."
    )
    parser.add_argument("--door", choices=("grpc", "http"), default="grpc", help="default grpc")
    parser.add_argument("--rows", type=int, default=64, help="streams at a time (default 64)")
    parser.add_argument("--steps-per-s", type=float, default=250.0, help="the pace (default 250)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long (default 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the line to this file")
    parser.add_argument("--client", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.client:
        read = read_all if arguments.door == "grpc" else read_all_http
        seen = asyncio.run(read(arguments.client, arguments.rows, arguments.tokens))
        print(json.dumps(seen))
        return
    tokens = round(arguments.seconds * arguments.steps_per_s)
    if not 2 <= tokens < CONTEXT_TOKENS:
        parser.error(
            f"--seconds x --steps-per-s is {tokens} tokens a stream; at most {CONTEXT_TOKENS - 2}"
        )
    line = measure(arguments.door, arguments.rows, arguments.steps_per_s, tokens)
    common.write(line, arguments.out)
    rate, median = line["delivered_tokens_per_s"], line["tokens_a_message"]["p50"]
    for what, value, met, goal in (
        ("delivered tokens/s", rate, rate >= GOAL_TOKENS_PER_S, f">= {GOAL_TOKENS_PER_S:g}"),
        ("median tokens a message", median, median <= GOAL_TOKENS_A_MESSAGE, "<= 2"),
    ):
        common.say(f"{what} {value:g}; goal {goal}: {'met' if met else 'MISSED'}")


def measure(door: str, rows: int, steps_per_s: float, tokens: int) -> dict[str, Any]:
    """Returns what the clients saw."""
    tokenizer = byte_tokenizer()
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    engine = instant_engine(
        max_rows=rows, vocab_size=tokenizer.vocab_size, token=letter, step_s=1 / steps_per_s
    )
    text = TextEngine(engine, tokenizer, None)
    info = ModelInfo(name="paced", model_digest="0" * 64, vocab_size=tokenizer.vocab_size)
    engine.start()
    try:
        server = ServerThread(text, info, ServerConfig(port=0), HttpConfig(port=0))
        with server as grpc_address:
            address = grpc_address if door == "grpc" else server.http_address
            assert address is not None
            other, before = machine.OtherLoad(), engine.stats()
            seen = run_clients(door, address, rows, tokens)
            after, cores = engine.stats(), other.cores()
    finally:
        engine.stop()
    sizes = [int(size) for size, count in seen["sizes"].items() for _ in range(count)]
    delivered = sum(sizes)
    if delivered != rows * tokens:
        raise RuntimeError(f"{delivered} of {rows * tokens} tokens were delivered")
    return {
        "bench": "frontend",
        "door": door,
        "rows": rows,
        "steps_per_s": steps_per_s,
        "delivered_tokens_per_s": round(delivered / seen["seconds"], 1),
        "messages": len(sizes),
        "tokens_a_message": {"p50": quantile(sizes, 0.5), "p99": quantile(sizes, 0.99)},
        "phases_ms": common.phases_ms(before, after),
        "commit": common.commit(),
        "versions": common.versions(),
        "other_cores": cores,
    }


def run_clients(door: str, address: str, rows: int, tokens: int) -> dict[str, Any]:
    """Asks for ``rows`` answers of ``tokens`` in a process of its own.

    Returns:
        ``seconds`` from the first message of all to the last, and ``sizes``: how many messages had
        how many tokens, where a token is a letter.
    """
    flags = ("--client", address, "--door", door, "--rows", str(rows), "--tokens", str(tokens))
    done = subprocess.run(
        [sys.executable, "-m", "bench.frontend", *flags],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return json.loads(done.stdout)


async def read_all(address: str, rows: int, tokens: int) -> dict[str, Any]:
    """Reads ``rows`` streams at a time; returns counts of message sizes and the seconds it took."""
    channels = [
        # Channels with equal options would share one connection.
        grpc.aio.insecure_channel(address, options=[("jaxserve.bench", number)])
        for number in range(min(CONNECTIONS, rows))
    ]
    methods = [channel.unary_stream(METHOD) for channel in channels]
    prompts = ([3 + number % 200] * 8 for number in range(rows))
    requests = [
        generate_request(
            None, prompt, None, {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        ).SerializeToString()
        for prompt in prompts
    ]
    streams = await asyncio.gather(
        *(_read(methods[number % len(methods)], sent) for number, sent in enumerate(requests))
    )
    for channel in channels:
        await channel.close()
    # From the first message of all to the last: the first and last steps are in it, where some
    # rows wait for others, so the pace itself is never quite reached.
    first_s = min(times[0] for times, _ in streams)
    last_s = max(times[-1] for times, _ in streams)
    sizes: dict[int, int] = {}
    for _, messages in streams:
        for message in messages:
            event = pb.GenerateResponse.FromString(message)
            if count := len(event.delta.token_ids):
                sizes[count] = sizes.get(count, 0) + 1
    return {"seconds": last_s - first_s, "sizes": sizes}


async def read_all_http(address: str, rows: int, tokens: int) -> dict[str, Any]:
    """The same over HTTP, one connection a stream, as OpenAI's client has it."""
    streams = await asyncio.gather(
        *(_read_http(address, [3 + number % 200] * 8, tokens) for number in range(rows))
    )
    first_s = min(times[0] for times, _ in streams)
    last_s = max(times[-1] for times, _ in streams)
    sizes: dict[int, int] = {}
    for _, events in streams:
        for event in events:
            # The paced model's tokens are letters.
            if count := len(json.loads(event)["choices"][0]["text"]):
                sizes[count] = sizes.get(count, 0) + 1
    return {"seconds": last_s - first_s, "sizes": sizes}


async def _read_http(
    address: str, prompt: list[int], tokens: int
) -> tuple[list[float], list[bytes]]:
    asked = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps(asked).encode()
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    times: list[float] = []
    events: list[bytes] = []
    while (line := await reader.readline()).strip() != b"data: [DONE]":
        if not line:
            raise RuntimeError("the server closed the connection")
        if line.startswith(b"data: "):
            times.append(time.perf_counter())
            events.append(line[6:])
    writer.close()
    return times, events


async def _read(method: Any, request: bytes) -> tuple[list[float], list[bytes]]:
    times: list[float] = []
    messages: list[bytes] = []
    call = method(request)
    while (message := await call.read()) is not grpc.aio.EOF:
        times.append(time.perf_counter())
        messages.append(message)
    return times, messages


if __name__ == "__main__":
    main()
