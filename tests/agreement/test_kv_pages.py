"""Pages of each precision: every way of asking gives one answer, close to that of float32 pages.

A token's keys and values are rounded by themselves when they are written, so that what a page holds
depends neither on what stood beside the token in its step nor on who computed the page. Rounding is
a cliff, though: where two programs differ in a last bit of float32, a number on its edge falls to
another side, which moves it by as much as an eighth of the token's largest. Native products have
the same bits in every program; plain XLA's do not, so there only the same steps are held to each
other. Norms are XLA's everywhere, and on some machines their last bits depend on a program's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine.request import Event, Request, SamplingParams, StartedEvent
from jaxserve.engine.stream import ThreadWaker
from jaxserve.launch import Service
from jaxserve.runner.compiling import CompileCounter
from tests.agreement.ways import (
    PATIENCE_S,
    PROMPTS,
    STYLES,
    ask_alone,
    ask_together,
    engine_over,
    events_of,
    first_difference,
    make_service,
    norms_feel_company,
    prompts,
    requests,
    tokens_of,
)
from tests.pallas_kernels.native_here import needs_native

pytestmark = pytest.mark.slow
MODEL = "dummy:tiny-llama"
BOUNDS: dict[str, object] = {"context_tokens": 256}
STORED = {
    "bfloat16": ("bfloat16", None, 256),
    "int8": ("int8", "bfloat16", 144),
    "fp8": ("float8_e4m3fn", "bfloat16", 144),
    "int4": ("uint8", "bfloat16", 80),
}
"""What holds numbers and scales, and the bytes of a token: keys and values of 2 layers and 2 heads
of 16, and a scale of 2 bytes."""


@pytest.fixture(
    scope="module",
    # bf16 has the code of float32, which test_agreement.py has, and fp8 that of int8.
    params=[
        name if name in ("int8", "int4") else pytest.param(name, marks=pytest.mark.wide)
        for name in STORED
    ],
)
def service(request: pytest.FixtureRequest, cache_dir: Path) -> Iterator[Service]:
    CompileCounter.instance().strict = False
    norms_feel_company()
    options = {**BOUNDS, "kv_dtype": request.param}
    with make_service(MODEL, cache_dir, cache_dir, **options) as ready:
        yield ready


@pytest.fixture(scope="module")
def batch(service: Service) -> list[Request]:
    """Every other prompt greedily, the others with every filter and penalty."""
    styles = [requests(service.plan.model.vocab_size, STYLES[name]) for name in sorted(STYLES)]
    return [styles[number % 2][number] for number in range(PROMPTS)]


@pytest.fixture(scope="module")
def batched(service: Service, batch: list[Request]) -> list[list[int]]:
    """The answers that every other way is held to: all requests at once, 16 rows."""
    with engine_over(service) as engine:
        return ask_together(engine, batch)


def differing(left: list[list[int]], right: list[list[int]]) -> list[str]:
    assert len(left) == len(right) == PROMPTS
    return [
        f"request {number} differs from token {place}"
        for number, (a, b) in enumerate(zip(left, right, strict=True))
        if (place := first_difference(a, b)) is not None
    ]


def hold_alike(left: list[list[int]], right: list[list[int]]) -> None:
    """Fails when answers differ; where this machine's norms may be why, of one or two, says so."""
    different = differing(left, right)
    if 0 < len(different) <= 2 and norms_feel_company():
        pytest.xfail(
            f"{different}: XLA sums a row in an order that depends on how many rows there are, on "
            "this machine, also for norms (ARCHITECTURE.md, Not yet)"
        )
    assert not different


def test_the_pool_holds_what_was_asked_for(service: Service) -> None:
    state = service.runner._state
    assert state is not None
    pools = state.pools
    numbers, scales, token_bytes = STORED[service.info.kv_dtype]
    assert pools.k.dtype.name == pools.v.dtype.name == numbers
    arrays = [pools.k, pools.v]
    if scales is None:
        assert pools.k_scale is None
    else:
        assert pools.k_scale.dtype.name == pools.v_scale.dtype.name == scales
        assert pools.k_scale.shape == pools.v_scale.shape == pools.k.shape[:-1]
        arrays += [pools.k_scale, pools.v_scale]
    cache, model = service.runner.config.cache, service.plan.model
    held = sum(array.nbytes for array in arrays)
    assert held == cache.num_pages * cache.page_bytes(model)
    assert cache.token_bytes(model) == token_bytes


def test_the_same_requests_get_the_same_tokens_again(
    service: Service, batch: list[Request], batched: list[list[int]]
) -> None:
    with engine_over(service) as engine:
        assert not differing(ask_together(engine, batch), batched)


@needs_native
def test_a_request_alone_gets_the_tokens_that_it_gets_in_company(
    service: Service, batch: list[Request], batched: list[list[int]]
) -> None:
    with engine_over(service) as engine:
        hold_alike(ask_alone(engine, batch), batched)


@needs_native
def test_the_prefix_cache_changes_no_token(
    service: Service, batch: list[Request], batched: list[list[int]]
) -> None:
    """Scales travel with their pages."""
    with engine_over(service, prefix_cache=False) as engine:
        without = ask_together(engine, batch)
    with engine_over(service, prefix_cache=True) as engine:
        ask_together(engine, batch)
        warm = ask_together(engine, batch)
        assert engine.stats().prefix_hit_rate > 0.3
    hold_alike(without, batched)
    hold_alike(warm, batched)


@needs_native
def test_a_prompt_in_chunks_gets_the_tokens_of_a_whole_one(
    service: Service, batch: list[Request], batched: list[list[int]]
) -> None:
    with engine_over(service, step_tokens=23, prefix_cache=False) as engine:
        hold_alike(ask_together(engine, batch), batched)


@needs_native
def test_preempted_requests_get_the_tokens_of_uninterrupted_ones(
    service: Service, batch: list[Request], batched: list[list[int]]
) -> None:
    with engine_over(service, num_pages=33) as engine:
        preempted = ask_together(engine, batch)
        assert engine.stats().preemptions_total > 10
    hold_alike(preempted, batched)


@needs_native
def test_requests_that_leave_change_no_token_of_those_that_stay(
    service: Service, batch: list[Request], batched: list[list[int]]
) -> None:
    """Their pages are written by others, scales and all, while they may still be in a step."""
    waker = ThreadWaker()
    with engine_over(service, num_pages=65) as engine:
        streams = [engine.submit(request, waker) for request in batch]
        events: list[list[Event]] = [[] for _ in batch]
        while not all(stream.finished and not stream.pending for stream in streams):
            assert waker.wait(PATIENCE_S), "no answer"
            for number, stream in enumerate(streams):
                events[number] += stream.take()
                if number % 3 == 1 and len(events[number]) > 1 + number % 20:
                    stream.close()
    stayed = [number for number in range(PROMPTS) if number % 3 != 1]
    for number in stayed:
        assert tokens_of(events[number]) == batched[number], f"request {number}"
    assert any(len(tokens_of(events[n])) < len(batched[n]) for n in range(1, PROMPTS, 3))


SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)


def scores(service: Service) -> np.ndarray:
    """Log-probability of every prompt token after the first, prompt after prompt."""
    batch = [
        Request(request_id=f"s{number}", prompt=prompt, sampling=SCORED)
        for number, prompt in enumerate(prompts(service.plan.model.vocab_size, 12))
    ]
    found: list[float] = []
    with engine_over(service) as engine:
        for events in events_of(engine, batch):
            started = events[0]
            assert isinstance(started, StartedEvent)
            assert started.prompt_logprobs is not None
            found += [score.logprob for score in started.prompt_logprobs if score is not None]
    return np.array(found)


@pytest.fixture(scope="module")
def exact(cache_dir: Path) -> np.ndarray:
    """The scores of pages of float32."""
    CompileCounter.instance().strict = False
    options = {**BOUNDS, "kv_dtype": "float32"}
    with make_service(MODEL, cache_dir, cache_dir, **options) as other:
        return scores(other)


MOST_OFF = {"bfloat16": 0.02, "int8": 0.05, "fp8": 0.13, "int4": 0.6}


def test_rounding_costs_what_it_is_known_to(
    service: Service, exact: np.ndarray, record_property: Callable[[str, object], None]
) -> None:
    """What moves a token's log-probability against float32 pages, root mean square."""
    found = scores(service)
    off = float(np.sqrt(np.mean((found - exact) ** 2)))
    more = float(exact.mean() - found.mean())
    stated = f"{service.info.kv_dtype}: {len(found)} tokens, off by {off:.4f}, loss {more:+.5f}"
    record_property("quality", stated)
    print(f"\n{stated}")
    most = MOST_OFF[service.info.kv_dtype]
    assert off < most, stated
    assert abs(more) < most / 10, stated
