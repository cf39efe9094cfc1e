"""Measures a running server over gRPC, under a number of clients or an arrival rate.

    python -m bench.serving --server 127.0.0.1:50051 --concurrency 32 --requests 96 \\
        --prompt-tokens 128:128 --output-tokens 64:64 --seed 1 --out FILE

Run it on the server's machine: what ``machine`` says is measured here, and the server's own CPU
time is told from that of others by the port it listens on.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from bench import common, machine, workloads
from bench.common import Answer, Door
from bench.workloads import Ask, Workload
from jaxserve.frontend.client import AsyncClient, Client, RetryPolicy


def main(words: Sequence[str] | None = None) -> None:
    """Runs the workloads that the arguments select."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description="Measures a running server over gRPC."
    )
    parser.add_argument("--server", required=True, metavar="ADDRESS", help="HOST:PORT")
    workloads.add_flags(parser)
    common.add_run_flags(parser)
    arguments = parser.parse_args(words)
    chosen = workloads.chosen(arguments, parser.error, needs_load=True)

    with Client(arguments.server) as client:
        door = make_door(arguments.server, client)
        facts = machine.measured()
        for workload in chosen:
            found = common.runs(
                door, workload, facts, count=arguments.runs, retries=arguments.retries
            )
            for run in found:
                common.write(run.line, arguments.out)


def make_door(address: str, client: Client) -> Door:
    """Returns the way to a server; ``client`` is for questions between runs."""
    info = client.model()
    process_id = machine.listener_pid(address)
    if process_id is None:
        common.say(f"the process behind {address} is not found: it counts among other_cores")
    return Door(
        name="grpc",
        ask=lambda workload, asks, salt: _run(_ask_all(address, workload, asks, salt)),
        stats=client.stats,
        model=info.name,
        precision=info.precision,
        vocab_size=info.vocab_size,
        process_ids=[] if process_id is None else [process_id],
        versions={"server": info.server_version},
    )


def _run(work: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
    """Runs on uvloop where it is installed, because the client's CPU time is the server's loss."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


async def _ask_all(
    address: str, workload: Workload, asks: Sequence[Ask], salt: str
) -> list[Answer]:
    """Asks as the load says; answers in the order of the requests."""
    answers: list[Answer] = []
    places = asyncio.Semaphore(workload.load.clients or len(asks))
    # A failure is a finding: it ends the run instead of being tried again.
    async with (
        AsyncClient(address, retry=RetryPolicy(attempts=1)) as client,
        asyncio.TaskGroup() as group,
    ):
        start_s = time.perf_counter()
        arrivals = workload.load.arrivals_s(len(asks), workload.seed)
        for ask, arrival_s in zip(asks, arrivals, strict=True):
            await places.acquire()
            await asyncio.sleep(max(0.0, start_s + arrival_s - time.perf_counter()))
            answer = Answer(time.perf_counter())
            answers.append(answer)
            group.create_task(_ask(client, ask, salt, answer, places))
    return answers


async def _ask(
    client: AsyncClient, ask: Ask, salt: str, answer: Answer, places: asyncio.Semaphore
) -> None:
    stream = client.stream(
        token_ids=ask.prompt,
        max_tokens=ask.output_tokens,
        temperature=0.0,
        ignore_eos=True,
        cache_salt=salt,
    )
    async with stream:
        async for chunk in stream:
            if chunk.token_ids:
                answer.tokens += len(chunk.token_ids)
                answer.arrivals_s.append(time.perf_counter())
    answer.end_s = time.perf_counter()
    places.release()


if __name__ == "__main__":
    main()
