"""Ways of asking the same questions, over one set of compiled programs.

An ``Oracle`` holds one ready runner. Every way puts a fresh engine (scheduler, pool, prefix cache)
over it, with its own bounds: a smaller pool, a smaller step or one row at a time need no new
programs, because they only use less of what was compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from jaxserve.config import ServeConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.request import Event, FinishedEvent, Request, SamplingParams, TokenEvent
from jaxserve.engine.stream import ThreadWaker
from jaxserve.launch import Service, build
from jaxserve.models.layers import rms_norm

OUTPUT_TOKENS = 64
PROMPTS = 50
PATIENCE_S = 600.0

GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(
    max_tokens=OUTPUT_TOKENS,
    temperature=0.9,
    top_p=0.95,
    top_k=40,
    min_p=0.01,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    seed=0,
    ignore_eos=True,
)
STYLES = {"greedy": GREEDY, "seeded": SEEDED}


def service_config(model: str, cache_dir: Path, assets_dir: Path, **options: object) -> ServeConfig:
    """A small bucket grid."""
    settings: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "max_rows": 16,
        "step_tokens": 64,
        "page_tokens": 16,
        "kv_memory_bytes": 64 * 2**20,
        "ready_with": "all",
        "strict_compile": True,
        **options,
    }
    return ServeConfig(model=model, cache_dir=cache_dir, assets_dir=assets_dir, **settings)  # pyright: ignore[reportArgumentType]


def make_service(model: str, cache_dir: Path, assets_dir: Path, **options: object) -> Service:
    """A ready service with a small bucket grid."""
    return build(service_config(model, cache_dir, assets_dir, **options))


def prompts(vocab_size: int, count: int = PROMPTS) -> list[list[int]]:
    """Random prompts of 1 to 180 tokens; every third starts with a prefix that others share."""
    rng = np.random.default_rng(7)
    shared = rng.integers(3, vocab_size, 90).tolist()
    result = []
    for number in range(count):
        own = rng.integers(3, vocab_size, int(rng.integers(1, 90))).tolist()
        result.append([*shared, *own] if number % 3 == 0 else own)
    return result


def requests(vocab_size: int, sampling: SamplingParams) -> list[Request]:
    """One request per prompt, each with a seed of its own when it samples."""
    return [
        Request(
            request_id=f"r{number}",
            prompt=prompt,
            sampling=sampling if sampling.seed is None else replace(sampling, seed=1000 + number),
        )
        for number, prompt in enumerate(prompts(vocab_size))
    ]


@contextmanager
def engine_over(service: Service, **bounds: object) -> Iterator[Engine]:
    """A fresh engine over the service's compiled programs, with some bounds changed."""
    original = service.engine
    engine = Engine(
        service.runner,
        scheduler=replace(original.scheduler.config, **bounds),  # pyright: ignore[reportArgumentType]
        shape=service.runner.loaded_shape,
        limits=original.limits,
        end_ids=service.info.eos_token_ids,
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
    engine.check_integrity()
    assert engine.dead is None


def events_of(engine: Engine, batch: Sequence[Request]) -> list[list[Event]]:
    """Submits everything at once; all events of each request, in order of the requests."""
    waker = ThreadWaker()
    streams = [engine.submit(request, waker) for request in batch]
    events: list[list[Event]] = [[] for _ in batch]
    while not all(stream.finished and not stream.pending for stream in streams):
        assert waker.wait(PATIENCE_S), "no answer"
        for stream, seen in zip(streams, events, strict=True):
            seen += stream.take()
    return events


def tokens_of(events: Sequence[Event]) -> list[int]:
    """The output tokens of a request with one choice."""
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.index for event in tokens] == list(range(len(tokens)))
    return [event.token_id for event in tokens]


def ask_together(engine: Engine, batch: Sequence[Request]) -> list[list[int]]:
    """Submits everything at once; the output tokens in order of the requests."""
    answers = events_of(engine, batch)
    for events in answers:
        assert isinstance(events[-1], FinishedEvent)
        assert events[-1].error is None, events[-1].error
    return [tokens_of(events) for events in answers]


def ask_alone(engine: Engine, batch: Sequence[Request]) -> list[list[int]]:
    """One request at a time: every step has one row."""
    return [ask_together(engine, [request])[0] for request in batch]


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Position of the first token that differs; None when there is none."""
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@cache
def norms_feel_company() -> bool:
    """Whether a row's norm has other bits among 16 rows than among 64, on this machine.

    To be asked before a service is ready, as it compiles; later it remembers.
    """
    rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weight = np.ones(64, np.float32)
    norm = jax.jit(partial(rms_norm, eps=1e-5, offset=False))
    return not np.array_equal(norm(rows[:16], weight), norm(rows, weight)[:16])
