"""The compiled programs, through a real service of a tiny model with random weights."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.publish import StepHandle
from jaxserve.engine.request import (
    FinishedEvent,
    FinishReason,
    Request,
    SamplingParams,
    StartedEvent,
)
from jaxserve.engine.step import StepInputs
from jaxserve.errors import CheckpointError
from jaxserve.launch import Service
from jaxserve.models.decoder import Model
from jaxserve.runner.compiling import CompileAfterReadyError, CompileCounter
from jaxserve.runner.runner import Runner
from pallas_kernels.paged_attention import apply_rope
from tests.agreement.ways import (
    GREEDY,
    ask_together,
    engine_over,
    events_of,
    make_service,
    requests,
    tokens_of,
)

pytestmark = pytest.mark.slow
MODEL = "dummy:tiny-llama"


@pytest.fixture(scope="module")
def service(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with make_service(MODEL, cache_dir, tmp_path_factory.mktemp("assets")) as ready:
        yield ready


def dense_logits(service: Service, tokens: list[int]) -> np.ndarray:
    """Logits of every position by one dense forward pass: no pages, no programs."""
    config = service.plan.model

    def attend(cache: None, layer: int, q: Any, k: Any, v: Any, rope: jax.Array, window: int):
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        group = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * config.attention_scale
        causal = jnp.tril(jnp.ones((1, 1, q.shape[1], q.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v), cache

    model = Model(config)
    params = service.runner.params
    assert params is not None
    ids = jnp.asarray([tokens], jnp.int32)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    hidden, _ = model.forward(params, ids, positions, None, attend, tensor_axis=None)
    return np.asarray(model.logits(params, hidden)[0])


@pytest.fixture
def lenient() -> None:
    """For tests that compile something of their own while a strict service lives."""
    CompileCounter.instance().strict = False


def fill_page(service: Service, page: int, value: float) -> None:
    """Overwrites one page of every layer, keys and values."""
    runner = service.runner
    state = runner._state
    assert state is not None
    pools = state.pools
    rows = np.arange(service.plan.model.layers) * pools.pages + page
    pools = replace(pools, k=pools.k.at[rows].set(value), v=pools.v.at[rows].set(value))
    runner._state = replace(state, pools=pools)


@pytest.mark.usefixtures("lenient")
def test_prompt_logprobs_are_those_of_a_dense_pass(service: Service) -> None:
    """In vocabulary chunks and prompt chunks of 64, over 150 tokens: value, rank and top 5."""
    tokens = np.random.default_rng(3).integers(3, 500, 150).tolist()
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=5)
    with engine_over(service) as engine:
        request = Request(request_id="p", prompt=tokens, sampling=sampling)
        started = events_of(engine, [request])[0][0]
    assert isinstance(started, StartedEvent)
    scored = started.prompt_logprobs
    assert scored is not None
    assert len(scored) == 150
    assert scored[0] is None
    logits = dense_logits(service, tokens)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, score in enumerate(scored[1:], start=1):
        assert score is not None
        before = expected[place - 1]
        assert score.logprob == pytest.approx(before[tokens[place]], abs=2e-4)
        assert abs(score.rank - 1 - int((before > before[tokens[place]]).sum())) <= 1
        np.testing.assert_allclose(score.top_logprobs, np.sort(before)[::-1][:5], atol=2e-4)


@pytest.mark.usefixtures("lenient")
def test_greedy_tokens_are_those_of_dense_passes(service: Service) -> None:
    """Paged, chunked, cached decoding against the definition: argmax of a whole forward pass."""
    prompt = np.random.default_rng(4).integers(3, 500, 70).tolist()
    sampling = replace(GREEDY, max_tokens=8)
    with engine_over(service) as engine:
        answer = ask_together(engine, [Request(request_id="g", prompt=prompt, sampling=sampling)])
    logits = dense_logits(service, prompt + answer[0])
    assert answer[0] == logits[69:77].argmax(-1).tolist()


def test_nothing_compiles_while_mixed_traffic_is_served(service: Service) -> None:
    counter = CompileCounter.instance()
    mixed = [
        replace(request, request_id=f"m{number}", sampling=sampling)
        for number, (request, sampling) in enumerate(
            zip(requests(500, GREEDY), _every_feature(), strict=False)
        )
    ]
    before = counter.compiles
    with engine_over(service) as engine:
        ask_together(engine, mixed)
    assert counter.compiles == before


def _every_feature() -> list[SamplingParams]:
    base = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    changes: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.3},
        {"logit_bias": {5: 2.0}},
        {"allowed_token_ids": (5, 6, 7)},
        {"banned_token_ids": (5,)},
        {"logprobs": 3},
        {"prompt_logprobs": 3},
        {"min_tokens": 4, "ignore_eos": False},
    ]
    return [replace(base, **change) for change in changes]  # pyright: ignore[reportArgumentType]


def test_strict_mode_raises_when_something_compiles(service: Service) -> None:
    counter = CompileCounter.instance()
    counter.strict = True
    try:
        with pytest.raises(CompileAfterReadyError, match="compiled after ready"):
            jax.jit(lambda x: x * 3 + 1.5)(np.float32(len(service.info.name)))
    finally:
        counter.strict = False


def test_an_unexpected_shape_is_an_error_that_names_the_argument(service: Service) -> None:
    runner = service.runner
    step = service.plan.step
    assert runner._blank is not None
    with pytest.raises(TypeError, match="packed"):
        runner._call(
            ("decode", 1, 1), runner._blank, np.zeros((1, step.line_columns + 1), np.int32)
        )


@pytest.mark.parametrize("has_native", [True, False])
@pytest.mark.parametrize(
    ("context_tokens", "kv_dtype"),
    [
        pytest.param(256, "auto", marks=pytest.mark.wide),
        (512, "auto"),
        pytest.param(256, "int8", marks=pytest.mark.wide),
        (512, "int8"),
    ],
)
def test_no_program_copies_the_pool(
    context_tokens: int, kv_dtype: str, has_native: bool, cache_dir: Path
) -> None:
    """Donated pools are written in place, also where a row's whole context is one block; by the
    native kernels, and by what other devices run."""
    bounds = {"context_tokens": context_tokens, "kv_dtype": kv_dtype, "strict_compile": False}
    with make_service(MODEL, cache_dir, cache_dir, **bounds) as service:
        runner = service.runner
        if not has_native:
            config = replace(runner.config, has_native=False)
            runner = Runner(runner.model, config, runner.mesh)
            list(runner.compile(runner.largest_keys()))
        cache = runner.config.cache
        pool_bytes = cache.page_bytes(service.plan.model) * cache.num_pages
        arrays = jax.tree.leaves(runner._abstract_state.pools)
        assert len(arrays) == (4 if kv_dtype == "int8" else 2)
        shapes = "|".join({",".join(map(str, array.shape)) for array in arrays})
        moved = re.compile(rf"\[({shapes})\]\S* (copy|transpose|convert)\(")
        for name, program in runner._compiled.items():
            assert not moved.search(program.as_text()), name
            if name[0] not in ("set_row", "set_masks"):
                assert program.memory_analysis().alias_size_in_bytes >= pool_bytes, name


@pytest.mark.usefixtures("lenient")
def test_what_the_null_page_holds_changes_no_answer(service: Service) -> None:
    batch = requests(500, replace(GREEDY, max_tokens=8))[:12]
    with engine_over(service) as engine:
        clean = ask_together(engine, batch)
    fill_page(service, 0, np.nan)
    with engine_over(service) as engine:
        assert ask_together(engine, batch) == clean


def test_a_reset_runner_serves_again(service: Service) -> None:
    batch = requests(500, replace(GREEDY, max_tokens=8))[:4]
    with engine_over(service) as engine:
        before = ask_together(engine, batch)
    service.runner.reset()
    with engine_over(service) as engine:
        assert ask_together(engine, batch) == before


@pytest.mark.usefixtures("lenient")
def test_a_request_whose_logits_are_not_finite_fails_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN planted in its own first page poisons one request; its neighbour is not touched."""
    sampling = replace(GREEDY, max_tokens=24)
    bad = Request(request_id="bad", prompt=list(range(3, 36)), sampling=sampling)
    good = Request(request_id="good", prompt=[5, 6, 7], sampling=sampling)
    with engine_over(service) as engine:
        expected = ask_together(engine, [good])[0]
    with engine_over(service) as engine:
        steps = 0

        def planted(inputs: StepInputs) -> StepHandle:
            nonlocal steps
            steps += 1
            if steps == 6:
                (victim,) = (one for one in engine.scheduler.running if one.live.request is bad)
                fill_page(service, victim.pages[0], np.nan)
            return dispatch(inputs)

        dispatch = service.runner.dispatch
        monkeypatch.setattr(service.runner, "dispatch", planted)
        failed, fine = events_of(engine, [bad, good])
        assert isinstance(failed[-1], FinishedEvent)
        assert failed[-1].reason is FinishReason.ERROR
        assert "not finite" in str(failed[-1].error)
        assert tokens_of(fine) == expected
        # Its pages are not offered to others: the same prompt is answered from scratch.
        again = ask_together(engine, [replace(bad, request_id="again")])[0]
    with engine_over(service) as engine:
        assert again == ask_together(engine, [bad])[0]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("mesh", ["1x1", "1x2", "1x3"])
def test_a_saved_model_serves_the_same_tokens(
    service: Service, cache_dir: Path, tmp_path: Path, mesh: str
) -> None:
    """Through orbax, also onto another mesh than it was saved from."""
    batch = requests(500, replace(GREEDY, max_tokens=8))[:6]
    with engine_over(service) as engine:
        expected = ask_together(engine, batch)
    saved = tmp_path / "saved"
    service.save(saved)
    with pytest.raises(CheckpointError, match="exists already"):
        service.save(saved)
    with make_service(str(saved), cache_dir, tmp_path, strict_compile=False, mesh=mesh) as again:
        assert again.info.model_digest == service.info.model_digest
        with engine_over(again) as engine:
            assert ask_together(engine, batch) == expected


SECOND_LAUNCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.agreement.ways import make_service
from jaxserve.runner.compiling import CompileCounter
from jaxserve.runner.runner import Runner
from pallas_kernels.paged_attention import apply_rope
traced, trace = [], Runner.trace
Runner.trace = lambda runner, key: traced.append(key) or trace(runner, key)
with make_service("dummy:tiny-llama", Path(sys.argv[1]), Path(sys.argv[1])) as service:
    counter = CompileCounter.instance()
    print("traced", len(traced), "misses", counter.cache_misses, "hits", counter.cache_hits)
"""


def test_a_second_launch_with_the_same_flags_misses_the_cache_never(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])

    def launch() -> list[str]:
        command = [sys.executable, "-c", SECOND_LAUNCH, str(tmp_path), root]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-6:]

    first = launch()
    second = launch()
    assert int(first[1]) > 0
    assert second[1::2][:2] == ["0", "0"]
    assert int(second[5]) > 0
