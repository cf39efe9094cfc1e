"""A model over several devices: the same tokens, and no exchange but those the source names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.engine.request import Request
from jaxserve.launch import Service
from tests.agreement.ways import STYLES, ask_together, engine_over, make_service, requests

pytestmark = pytest.mark.slow

MESHES = ["1x2", "1x3", "1x4", "1x8"]
"""Of tiny-llama's 2 groups of 2 query heads, ffn 128 and vocabulary 512: split evenly; padded in
every axis; with the keys copied; copied and padded."""
SETTINGS = {"max_rows": 8, "step_tokens": 32, "context_tokens": 256}
PROMPTS = 20


def batch(vocab_size: int) -> list[Request]:
    """20 prompts greedily and 20 with every filter and penalty, most with log-probabilities."""
    together: list[Request] = []
    for style, sampling in sorted(STYLES.items()):
        for number, request in enumerate(requests(vocab_size, sampling)[:PROMPTS]):
            changed = replace(request.sampling, max_tokens=24, logprobs=3 if number % 4 else None)
            together.append(replace(request, request_id=f"{style}{number}", sampling=changed))
    return together


def answers(service: Service) -> list[list[int]]:
    with engine_over(service) as engine:
        return ask_together(engine, batch(service.plan.model.vocab_size))


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gemma3"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(name: str, cache_dir: Path) -> list[list[int]]:
    """What one device answers."""
    with make_service(f"dummy:{name}", cache_dir, cache_dir, **SETTINGS) as service:
        return answers(service)


@pytest.fixture(scope="module", params=MESHES)
def service(request: pytest.FixtureRequest, name: str, cache_dir: Path) -> Iterator[Service]:
    settings = {**SETTINGS, "mesh": request.param}
    with make_service(f"dummy:{name}", cache_dir, cache_dir, **settings) as ready:
        yield ready


def test_a_mesh_answers_what_one_device_answers(service: Service, alone: list[list[int]]) -> None:
    assert answers(service) == alone


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
    r".*op_name=\"jit\(\w+\)/shard_map/([^\"]*)\""
)
OPTIONAL = Counter(
    {
        # Behind lax.cond: top_k and top_p (their thresholds take 32 turns each), log-probabilities.
        ("all-reduce", "sample/cond"): 7,
        ("all-gather", "sample/cond"): 1,
    }
)
ALWAYS = Counter({("all-reduce", "embed"): 1, ("all-gather", "sample"): 1})
SCORES = Counter({("all-reduce", "score"): 3, ("all-gather", "score"): 1})


def collectives(program: str) -> Counter[tuple[str, str]]:
    """Kind and scope of every exchange between devices in a compiled program."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, path in COLLECTIVE.findall(program):
        scopes = path.split("/")[:-1]
        known = [scope for scope in scopes if scope in ("embed", "o", "ffn", "sample", "score")]
        scope = known[0] if known else path
        found[kind, "sample/cond" if scope == "sample" and "cond" in scopes else scope] += 1
    return found


def test_programs_exchange_what_the_source_names_and_nothing_else(service: Service) -> None:
    if service.plan.model.architecture != "llama":
        pytest.skip("the programs of one model are enough")
    layers = service.plan.model.layers
    for (kind, rows, _), program in service.runner._compiled.items():
        here = collectives(program.as_text())
        if kind == "set_row":
            assert not here
            continue
        turns = layers if service.runner._is_unrolled(kind, rows) else 1
        expected = ALWAYS + OPTIONAL + (SCORES if kind == "score" else Counter())
        expected += Counter({("all-reduce", "o"): turns, ("all-reduce", "ffn"): turns})
        assert here == expected, (kind, rows)


def test_no_program_copies_transposes_or_gathers_a_pool(service: Service) -> None:
    state = service.runner._state
    assert state is not None
    pool = state.pools.k
    shape = ",".join(map(str, pool.sharding.shard_shape(pool.shape)))
    whole = ",".join(map(str, pool.shape))
    moved = re.compile(rf"f32\[(?:{shape}|{whole})\]\S* (?:copy|transpose|all-gather)\(")
    for name, program in service.runner._compiled.items():
        assert not moved.search(program.as_text()), name
