"""A server that a driver starts beside itself, and the clients' loop in front of it."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from bench.peers.child import die_with_parent
from bench.peers.protocol import Question, Reply

STOP_S = 10.0
POLL_S = 0.05


def start(command: Sequence[str], **pipes: Any) -> subprocess.Popen[str]:
    """Starts a server that ends with this process, in the same process group."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=sys.stderr,
        text=True,
        preexec_fn=die_with_parent,  # No thread is started before this.
        **{"stdout": sys.stderr, **pipes},
    )


def stop(process: subprocess.Popen[str]) -> None:
    """Asks it to end, and ends it if it does not."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
        return
    process.kill()
    process.wait()


def free_port() -> int:
    """Returns a port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_port(process: subprocess.Popen[str], port: int) -> None:
    """Waits until somebody listens; the parent of this child bounds how long.

    Raises:
        RuntimeError: the server has ended instead.
    """
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(POLL_S)
    raise RuntimeError(f"the server ended with exit code {process.returncode}")


async def ask_all(
    questions: Sequence[Question],
    clients: int | None,
    ask: Callable[[Question, Reply], Coroutine[Any, Any, None]],
) -> list[Reply]:
    """Asks all at once or by closed-loop clients; the first failure ends all of it."""
    places = asyncio.Semaphore(clients or len(questions))
    replies: list[Reply] = []

    async def one(question: Question, reply: Reply) -> None:
        await ask(question, reply)
        reply.end_s = time.perf_counter()
        places.release()

    async with asyncio.TaskGroup() as group:
        for question in questions:
            await places.acquire()
            reply = Reply(time.perf_counter())
            replies.append(reply)
            group.create_task(one(question, reply))
    return replies


def run(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """Runs on uvloop where it is installed: a client's CPU time is the server's loss."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)
