"""The door and the real engine together, over a runner whose answers are one line of arithmetic."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    QueueFullError,
    RequestCancelledError,
)
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.client import Client, RetryPolicy
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.testing import counting_engine, expected_tokens, paced_engine

ONCE = RetryPolicy(attempts=1)


@pytest.fixture
def serve() -> Iterator[Callable[[Engine], Client]]:
    """Starts an engine and a server over it, and returns a client."""
    engines: list[Engine] = []
    servers: list[ServerThread] = []
    clients: list[Client] = []

    def serve(engine: Engine) -> Client:
        text = TextEngine(engine, byte_tokenizer(), None)
        servers.append(
            ServerThread(text, ModelInfo(name="m", model_digest="d"), ServerConfig(port=0))
        )
        engine.start()
        engines.append(engine)
        clients.append(Client(servers[-1].start(), retry=ONCE))
        return clients[-1]

    yield serve
    for client in clients:
        client.close()
    for server in servers:
        server.stop(grace_s=0.0)
    for engine in engines:
        engine.stop()
        engine.check_integrity()


def answer(client: Client, prompt: list[int], **options: Any) -> tuple[int, ...]:
    return client.generate(token_ids=prompt, ignore_eos=True, **options).token_ids


def test_many_clients_get_the_answers_that_arithmetic_says(serve):
    engine, _ = counting_engine()
    client = serve(engine)
    draw = random.Random(7)
    asked = [
        ([draw.randrange(259) for _ in range(draw.randint(1, 30))], draw.randint(1, 20))
        for _ in range(40)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda item: answer(client, item[0], max_tokens=item[1], temperature=0.0), asked
        )
        received = list(answers)

    assert received == [
        tuple(expected_tokens(prompt, count, vocab_size=259)) for prompt, count in asked
    ]
    stats = client.stats()
    assert stats.output_tokens_total == sum(count for _, count in asked)
    assert stats.pages_total == stats.pages_free + stats.pages_used + stats.pages_cached


def test_streams_are_gap_free_and_say_their_seed(serve):
    engine, _ = counting_engine()
    stream = serve(engine).stream(token_ids=[5, 6], max_tokens=20, seed=3, n=2, ignore_eos=True)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for chunk in stream:
        tokens[chunk.choice] += chunk.token_ids

    assert stream.seed == 3
    for choice, received in tokens.items():
        expected = expected_tokens([5, 6], 20, vocab_size=259, seed=3, choice=choice)
        assert received == expected


def test_an_answer_can_be_taken_up_by_another_server(serve):
    first, second = (serve(counting_engine()[0]) for _ in range(2))
    options: dict[str, Any] = {"max_tokens": 12, "seed": 9}
    whole = answer(first, [5, 6], **options)
    rest = answer(second, [5, 6], **options, resume_token_ids=whole[:5])

    assert whole[5:] == rest


def test_scores_are_those_of_the_runner(serve):
    engine, _ = counting_engine()
    score = serve(engine).score(token_ids=[5, 6, 7], top_logprobs=2)

    assert [token.token_id for token in score.tokens] == [5, 6, 7]
    assert score.tokens[0].logprob is None
    assert all(token.logprob is not None for token in score.tokens[1:])
    assert [len(token.top) for token in score.tokens] == [0, 2, 2]


def test_closing_aborting_and_deadlines_free_every_page(serve):
    engine, _ = paced_engine(step_s=0.002, context_tokens=4096, num_pages=4096)
    client = serve(engine)
    with client.stream(token_ids=[5], max_tokens=4000, ignore_eos=True) as closed:
        next(closed)
    aborted = client.stream(token_ids=[6], max_tokens=4000, request_id="a", ignore_eos=True)
    next(aborted)
    with pytest.raises(DuplicateRequestError):
        answer(client, [6], request_id="a")
    client.abort("a")
    with pytest.raises(RequestCancelledError):
        list(aborted)
    with pytest.raises(DeadlineExceededError):
        answer(client, [7], max_tokens=4000, timeout_s=0.1)

    assert client.drain(wait_s=10.0).idle
    assert client.stats().pages_used == 0


def test_a_full_queue_refuses_with_a_time_to_come_back(serve):
    engine, _ = paced_engine(
        step_s=0.002, max_rows=1, context_tokens=4096, num_pages=4096, max_waiting_requests=1
    )
    client = serve(engine)
    running = client.stream(token_ids=[5], max_tokens=4000, ignore_eos=True)
    next(running)
    waiting = client.stream(token_ids=[5], max_tokens=4000, ignore_eos=True)
    for stats in client.watch_stats(0.05):
        if stats.requests_waiting == 1:
            break
    with pytest.raises(QueueFullError, match=r"the queue is full \(1 requests, limit 1\)") as e:
        answer(client, [5])

    assert e.value.retry_after_s > 0
    running.close()
    waiting.close()
