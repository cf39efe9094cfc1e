"""A model over several devices: the same tokens, and no exchange but those the source names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.engine.request import Request
from jaxserve.launch import Service
from jaxserve.models.decoder import Model
from jaxserve.runner.compiling import CompileCounter
from jaxserve.runner.dense import DenseForward
from jaxserve.weights.load import axis_names
from tests.agreement.ways import STYLES, ask_together, engine_over, make_service, requests
from tests.models.shrinking import shrink

pytestmark = pytest.mark.slow

CASES = [
    # Two groups of two query heads: divided; padded like ffn and vocabulary; copied and padded.
    ("tiny-llama", "1x2"),
    ("tiny-llama", "1x3"),
    pytest.param(("tiny-llama", "1x8"), marks=pytest.mark.wide),
    # One group of four: a copy for each device, with a query head each.
    ("tiny-gemma3", "1x4"),
    # Pools and rows of their own for each half.
    ("tiny-llama", "2x1"),
    ("tiny-llama", "2x4"),
    # Pages with scales: a token's are on the shards of their heads.
    ("tiny-llama", "1x2", "int8"),
    pytest.param(("tiny-llama", "2x1", "int8"), marks=pytest.mark.wide),
    pytest.param(("tiny-llama", "1x2", "fp8"), marks=pytest.mark.wide),
    ("tiny-llama", "1x2", "int4"),
]
"""Model, mesh, and pages other than float32."""
SETTINGS: dict[str, object] = {"max_rows": 8, "step_tokens": 32, "context_tokens": 256}
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


@pytest.fixture(scope="module")
def alone(cache_dir: Path) -> Callable[[str, str], list[list[int]]]:
    """What one device answers."""

    @cache
    def ask(name: str, kv_dtype: str) -> list[list[int]]:
        settings = {**SETTINGS, "kv_dtype": kv_dtype}
        with make_service(f"dummy:{name}", cache_dir, cache_dir, **settings) as service:
            return answers(service)

    return ask


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def service(request: pytest.FixtureRequest, cache_dir: Path) -> Iterator[Service]:
    name, mesh, *kv_dtype = request.param
    settings = {**SETTINGS, "mesh": mesh, "kv_dtype": kv_dtype[0] if kv_dtype else "auto"}
    with make_service(f"dummy:{name}", cache_dir, cache_dir, **settings) as ready:
        yield ready


def test_a_mesh_answers_what_one_device_answers(
    service: Service, alone: Callable[[str, str], list[list[int]]]
) -> None:
    name = service.plan.name.removeprefix("dummy:")
    assert answers(service) == alone(name, service.plan.kv_name)


def test_dense_logits_are_those_of_one_device(service: Service) -> None:
    """The same weights with their true shapes; sums over shards have another order."""
    CompileCounter.instance().strict = False
    laid_out, one_device = service.runner.model, Model(service.plan.model)
    params = service.runner.params
    assert params is not None
    true = jax.tree.map(
        lambda axes, array: jax.device_put(
            shrink(laid_out.layout, array, axes.words), jax.devices()[0]
        ),
        axis_names(laid_out, stacked=True),
        params,
    )
    tokens = list(range(3, 40))
    expected = DenseForward(one_device)(true, tokens)
    logits = DenseForward(laid_out)(params, tokens)
    assert logits.shape == (len(tokens), service.plan.model.vocab_size)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * expected.std())


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
    r".*op_name=\"jit\(\w+\)/shard_map/([^\"]*)\""
)
GROUPS = re.compile(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}")
"""The mesh axes that an exchange runs along."""
MOST_OPTIONAL = 9
"""All-reduces behind ``lax.cond``: 5 for filters, 4 for log-probabilities. XLA merges some."""
ALWAYS = Counter({("all-reduce", "embed"): 1, ("all-gather", "sample/cond"): 3})
"""The gathers: of the best tokens, in a greedy step or in another, and for log-probabilities."""
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
    layers = service.plan.model.layers
    for (kind, rows, _), program in service.runner._compiled.items():
        text = program.as_text()
        here = collectives(text)
        assert set(GROUPS.findall(text)) <= {"'tensor'"}, "nothing crosses the data axis"
        if kind in ("set_row", "set_masks"):
            assert not here
            continue
        assert text.count("replica_groups=") == len(GROUPS.findall(text)) == here.total()
        if service.plan.mesh.shape["tensor"] == 1:
            assert not here, "data shards have nothing to say to each other"
            continue
        turns = layers if service.runner._is_unrolled(kind, rows) else 1
        assert here.pop(("all-reduce", "sample/cond")) <= MOST_OPTIONAL
        expected = ALWAYS + (SCORES if kind == "score" else Counter())
        expected += Counter({("all-reduce", "o"): turns, ("all-reduce", "ffn"): turns})
        assert here == expected, (kind, rows)


VALUE = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")
MOVE = re.compile(
    r"(%[\w.-]+) = .* (?:copy|transpose|all-gather)(?:-start)?\((%[\w.-]+(?:, %[\w.-]+)*)\)"
)


def moves(program: str, *shapes: tuple[int, ...]) -> list[str]:
    """Copies, transposes and gathers, in a compiled program, to or from a value of such a shape."""
    sizes = {",".join(map(str, shape)) for shape in shapes}
    names = {name for name, size in VALUE.findall(program) if size in sizes}
    return [move[0] for move in MOVE.finditer(program) if names & {move[1], *move[2].split(", ")}]


def test_no_program_copies_transposes_or_gathers_a_pool(service: Service) -> None:
    state = service.runner._state
    assert state is not None
    pools = jax.tree.leaves(state.pools)
    local = [pool.sharding.shard_shape(pool.shape) for pool in pools]
    for name, program in service.runner._compiled.items():
        text = program.as_text()
        sizes = {size for _, size in VALUE.findall(text)}
        assert {",".join(map(str, shape)) for shape in local} <= sizes, name
        assert not moves(text, *local, *(pool.shape for pool in pools)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_that_transposes_a_pool_is_seen(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompileCounter.instance(), "strict", False)
    pool = jax.ShapeDtypeStruct((2, 16, 32, 33), dtype)
    program = jax.jit(lambda pool: pool.transpose(2, 3, 0, 1)).lower(pool).compile().as_text()
    assert program is not None
    assert moves(program, pool.shape)
    assert not moves(program, (2, 16, 32))


@pytest.mark.parametrize(
    "line",
    [
        "%c = (f32[2,16]{1,0}, f32[2,16]{1,0}, u32[]) copy-start(%pool)",
        "%g = (f32[3]{0}, f32[2,16]{1,0}) all-gather-start(%x.1, %pool), channel_id=1",
        "ROOT %t = f32[16,2]{1,0} transpose(%pool), dimensions={1,0}",
        "%c.2 = f32[2,16]{0,1} copy(%fusion)",
    ],
)
def test_every_way_to_move_a_pool_is_seen(line: str) -> None:
    first = "  %pool = f32[2,16]{1,0} parameter(0)\n"
    assert len(moves(f"{first}  {line}\n", (2, 16))) == 1
    assert not moves(f"{first}  {line}\n", (16,))
