"""The agreements on two data shards of two devices each: greedy and seeded, float32, tiny model.

``make prove-mesh`` asks SmolLM2 on every mesh that pads, copies or divides it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.assets import default_directory
from jaxserve.engine.request import Event, Request
from jaxserve.engine.stream import ThreadWaker
from jaxserve.launch import Service
from jaxserve.runner.compiling import CompileCounter
from tests.agreement.ways import (
    GREEDY,
    PATIENCE_S,
    STYLES,
    ask_together,
    engine_over,
    make_service,
    requests,
    tokens_of,
)

pytestmark = pytest.mark.slow
SETTINGS: dict[str, object] = {"max_rows": 8, "step_tokens": 32, "context_tokens": 256}
"""Those of ``tests/runner/test_mesh.py``, so that both compile one device's programs once."""
OUTPUT_TOKENS = 24
MESHES = ("1x2", "1x3", "1x4", "2x1", "2x4", "4x2")
SMOLLM2: dict[str, object] = {
    "max_rows": 4,
    "context_tokens": 256,
    "prompt_logprobs": False,
    "kv_memory_bytes": 128 * 2**20,
}


def batch(vocab_size: int, count: int) -> list[Request]:
    """Requests in every style, half of which share a prefix."""
    return [
        replace(
            request,
            request_id=f"{style}{number}",
            sampling=replace(request.sampling, max_tokens=OUTPUT_TOKENS),
        )
        for style, sampling in sorted(STYLES.items())
        for number, request in enumerate(requests(vocab_size, sampling)[:count])
    ]


@pytest.fixture(scope="module")
def expected(cache_dir: Path) -> list[list[int]]:
    """What one device answers."""
    with (
        make_service("dummy:tiny-llama", cache_dir, cache_dir, **SETTINGS) as service,
        engine_over(service) as engine,
    ):
        return ask_together(engine, batch(service.plan.model.vocab_size, 24))


@pytest.fixture(scope="module")
def service(cache_dir: Path) -> Iterator[Service]:
    model = "dummy:tiny-llama"
    with make_service(model, cache_dir, cache_dir, mesh="2x2", **SETTINGS) as ready:
        yield ready


def test_the_prefix_cache_changes_no_token(service: Service, expected: list[list[int]]) -> None:
    asked = batch(service.plan.model.vocab_size, 24)
    with engine_over(service, prefix_cache=False) as engine:
        assert ask_together(engine, asked) == expected
    with engine_over(service, prefix_cache=True) as engine:
        assert ask_together(engine, asked) == expected
        assert ask_together(engine, asked) == expected
        shards = engine.stats().data_shards
    assert all(shard.prefix_hit_tokens > 0 for shard in shards), "both shards know prompts"


def test_preempted_requests_get_the_tokens_of_uninterrupted_ones(
    service: Service, expected: list[list[int]]
) -> None:
    with engine_over(service, num_pages=17) as engine:
        assert ask_together(engine, batch(service.plan.model.vocab_size, 24)) == expected
        assert engine.stats().preemptions_total > 2


def test_a_storm_of_cancellations_leaves_no_page_and_changes_no_token(
    service: Service, expected: list[list[int]]
) -> None:
    """Two thirds are cancelled at random moments; the others answer as if alone."""
    rng = random.Random(5)
    left: set[int] = set()
    asked = batch(service.plan.model.vocab_size, 24)
    waker = ThreadWaker()
    with engine_over(service, num_pages=33) as engine:
        streams = [engine.submit(request, waker) for request in asked]
        doomed = {
            number: rng.randrange(OUTPUT_TOKENS) for number in range(len(asked)) if number % 3
        }
        events: list[list[Event]] = [[] for _ in asked]
        while any(
            number not in left and (stream.pending or not stream.finished)
            for number, stream in enumerate(streams)
        ):
            assert waker.wait(PATIENCE_S), "no answer"
            for number, stream in enumerate(streams):
                events[number] += stream.take()
                if number in doomed and len(events[number]) > doomed[number]:
                    del doomed[number]
                    stream.close()
                    left.add(number)
    assert all(shard.pages_used == 0 for shard in engine.stats().data_shards)
    assert len(left) > 10
    for number in set(range(len(asked))) - left:
        assert tokens_of(events[number]) == expected[number]


@pytest.mark.prove
@pytest.mark.parametrize("mesh", MESHES)
def test_smollm2_answers_alike_on_every_mesh(mesh: str, cache_dir: Path) -> None:
    """20 prompts, greedy: 3 groups of 3 heads padded to 4 and 8, divided by 3, and data shards."""
    CompileCounter.instance().strict = False
    answers = {}
    for each in ("1x1", mesh):
        with (
            make_service(
                "smollm2", cache_dir, default_directory(os.environ), mesh=each, **SMOLLM2
            ) as ready,
            engine_over(ready) as engine,
        ):
            asked = [
                replace(request, sampling=replace(GREEDY, max_tokens=OUTPUT_TOKENS))
                for request in requests(ready.plan.model.vocab_size, GREEDY)[:20]
            ]
            answers[each] = ask_together(engine, asked)
            print(f"\n{each}: {ready.info.sharding_summary}")
    assert answers[mesh] == answers["1x1"]
