"""The whole engine under load: prompts, closed-loop clients, and recorded traffic in an open loop.

Each part launches as ``jaxserve launch`` does, with random weights of a model of 8B parameters, and
asks where a notebook does. A load is cut off when its time is up: a slow engine gives worse numbers
here, not none.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.asking import Asking
from bench.common import Answer, quantile
from bench.gpu.limits import decode_limit_s, prefill_limit_s
from bench.gpu.model import serve_config
from bench.gpu.part import Number, Setting
from bench.gpu.traces import asks_of, read_trace, scale_to, trace_files, window, write_examples
from bench.workloads import Ask, word_range
from jaxserve.engine.stats import EngineStats
from jaxserve.launch import Service, build

MODEL = "llama-3.1-8b"
PROMPTS = (1024, 8192, 32768)
STEP_TOKENS = 2048
"""Prompt tokens of one step: enough to reach a GPU's matrix rate."""
ANSWER_TOKENS = 1000
"""Prompt and answer of the closed loop."""
CLIENTS = 32
FULL_ROWS = 256
END_S = 4.0
"""Left of a budget for closing what was opened."""
WINDOW_S = 15.0
"""Of one measurement at most, but for saturation, which takes what is left."""
LEAST_S = 1.0
"""A shorter measurement says nothing."""


def _launch(setting: Setting, **sizes: int) -> Service:
    return build(serve_config(setting, MODEL, step_tokens=STEP_TOKENS, **sizes))


def _random_prompt(rng: np.random.Generator, count: int, service: Service) -> list[int]:
    return rng.integers(*word_range(service.info.vocab_size), count).tolist()


def prefill(setting: Setting) -> Iterator[Number]:
    """Seconds to the first token of one prompt on an idle engine, and prompt tokens a second."""
    sizes = setting.pick(PROMPTS, (32, 64, 200))
    rng = np.random.default_rng(0)
    with _launch(setting, context_tokens=max(PROMPTS) + 256, max_rows=4) as service:
        yield Number("launch", service.ready_seconds, "s")
        for count in sizes:
            # The second one finds every program's first run behind it.
            seconds = min(
                _first_token_s(service, _random_prompt(rng, count, service)) for _ in "ab"
            )
            limit = None
            if setting.facts is not None:
                plan = service.plan
                limit = prefill_limit_s(plan.model, count, plan.dtype, setting.facts) * 1e3
            yield Number(f"prompt of {count}", seconds * 1e3, "ms", limit)
            yield Number(f"rate at {count}", count / seconds, "tokens/s")


def _first_token_s(service: Service, prompt: list[int]) -> float:
    (answer,) = Asking(service.text, [Ask(prompt, 1)], uuid.uuid4().hex, arrivals_s=[0.0]).run()
    return answer.arrivals_s[0] - answer.sent_s


def serving(setting: Setting) -> Iterator[Number]:
    """1000 tokens in and 1000 out: 32 clients, then as many as there are rows and pages for."""
    context = setting.pick(8192, 256)
    with _launch(setting, context_tokens=context, max_rows=FULL_ROWS) as service:
        yield Number("launch", service.ready_seconds, "s")
        tokens = setting.pick(ANSWER_TOKENS, 24)
        stats = service.engine.stats()
        fitting = stats.pages_total * stats.page_tokens // (2 * tokens)
        most = min(stats.rows_max, fitting)
        few_s = min(_seconds_of(setting, loads=2), WINDOW_S)
        yield from _closed_loop(setting, service, "32 clients", min(CLIENTS, most), tokens, few_s)
        # What is left, because the prompts of so many take longest.
        all_s = _seconds_of(setting, loads=1)
        yield from _closed_loop(setting, service, "saturation", most, tokens, all_s)


def _seconds_of(setting: Setting, *, loads: int) -> float:
    """Shares out what is left of the budget.

    Raises:
        TimeoutError: launching has used it up.
    """
    seconds = (setting.left_s - END_S) / loads
    if seconds < LEAST_S:
        raise TimeoutError(f"{setting.left_s:.1f} s of the budget are left for {loads} loads")
    return seconds


def _closed_loop(
    setting: Setting, service: Service, name: str, clients: int, tokens: int, seconds: float
) -> Iterator[Number]:
    """Measures from when every client has had a token, or from half of the time at the latest."""
    asks = _steady_asks(service, clients, tokens)
    seconds = setting.pick(seconds, min(seconds, 1.0))
    asking = Asking(
        service.text,
        asks,
        uuid.uuid4().hex,
        arrivals_s=[0.0] * len(asks),
        clients=clients,
        seconds=seconds,
    )
    start_s = time.perf_counter()
    answers = asking.run()
    end_s = time.perf_counter()
    firsts = [answer.arrivals_s[0] for answer in answers[:clients] if answer.arrivals_s]
    begun_s = max(firsts) if len(firsts) == clients else end_s
    from_s = min(begun_s, (start_s + end_s) / 2)
    delivered = sum(count for when, count in asking.delivered if when >= from_s)
    limit = _rate_limit(setting, service, clients, tokens)
    yield Number(f"{name}: rows", clients, "rows")
    yield Number(f"{name}: output", delivered / (end_s - from_s), "tokens/s", limit)
    yield from _latencies(name, answers, from_s)


def _steady_asks(service: Service, clients: int, tokens: int) -> list[Ask]:
    """Requests of a load that has run forever: the first ones are as far along as it would be.

    Client k of n begins with k/n of its answer behind it, as part of its prompt, so that answers
    end evenly from the start and not all at once.
    """
    rng = np.random.default_rng(1)
    asks = []
    for number in range(3 * clients):
        done = tokens * number // clients if number < clients else 0
        asks.append(Ask(_random_prompt(rng, tokens + done, service), tokens - done))
    return asks


def _rate_limit(setting: Setting, service: Service, rows: int, tokens: int) -> float | None:
    """Output tokens a second if steps and prompts took what the data sheet allows."""
    if setting.facts is None:
        return None
    plan = service.plan
    step_s = decode_limit_s(service.runner, rows, 3 * tokens // 2, setting.facts)
    prompt_s = prefill_limit_s(plan.model, tokens, plan.dtype, setting.facts)
    return 1 / (step_s / rows + prompt_s / tokens)


def _latencies(name: str, answers: Sequence[Answer], from_s: float) -> Iterator[Number]:
    """Quantiles after a time: first tokens of requests sent since, gaps of all that go on then."""
    first = [a.arrivals_s[0] - a.sent_s for a in answers if a.arrivals_s and a.sent_s >= from_s]
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in pairwise(answer.arrivals_s)
        if earlier >= from_s
    ]
    for what, values in {"first token": first, "between tokens": gaps}.items():
        for quantile_name, share in {"p50": 0.5, "p99": 0.99}.items():
            if values:
                value = quantile(values, share) * 1e3
                yield Number(f"{name}: {what} {quantile_name}", value, "ms")


def replay(setting: Setting) -> Iterator[Number]:
    """Recorded requests at their recorded times, whether or not the engine keeps up."""
    context = setting.pick(8192, 256)
    with (
        tempfile.TemporaryDirectory() as folder,
        _launch(setting, context_tokens=context, max_rows=FULL_ROWS) as service,
    ):
        if setting.traces is None:
            write_examples(Path(folder))
        files = trace_files(setting.traces or Path(folder))
        yield Number("launch", service.ready_seconds, "s")
        for left, path in zip(range(len(files), 0, -1), files, strict=True):
            seconds = min(_seconds_of(setting, loads=left), setting.pick(WINDOW_S, 2.0))
            yield from _replay_one(service, path, seconds)


def _replay_one(service: Service, path: Path, seconds: float) -> Iterator[Number]:
    # The last quarter of the time is for answers to what came before.
    arrivals = window(read_trace(path), 0.75 * seconds)
    scale = scale_to(arrivals, service.info.context_tokens)
    asks = asks_of(arrivals, scale, service.info.vocab_size, seed=1)
    before = service.engine.stats()
    asking = Asking(
        service.text,
        asks,
        uuid.uuid4().hex,
        arrivals_s=[arrival.at_s for arrival in arrivals],
        seconds=seconds,
    )
    start_s = time.perf_counter()
    answers = asking.run()
    wall_s = time.perf_counter() - start_s
    name, asked = path.name, sum(ask.output_tokens for ask in asks)
    yield Number(f"{name}: length scale", scale, "of recorded")
    yield Number(f"{name}: requests", len(asks), "requests")
    yield Number(f"{name}: answered", sum(a.end_s > 0 for a in answers) / len(asks), "of requests")
    yield Number(f"{name}: output", sum(a.tokens for a in answers) / wall_s, "tokens/s")
    yield Number(f"{name}: output of asked", sum(a.tokens for a in answers) / asked, "of tokens")
    yield Number(f"{name}: prefix hits", _hits(before, service.engine.stats()), "of tokens")
    yield from _latencies(name, answers, start_s)


def _hits(before: EngineStats, after: EngineStats) -> float:
    """Share of prompt tokens that were in the prefix cache."""

    def total(stats: EngineStats, field: str) -> int:
        return sum(getattr(shard, field) for shard in stats.data_shards)

    looked_up = total(after, "prefix_lookup_tokens") - total(before, "prefix_lookup_tokens")
    hits = total(after, "prefix_hit_tokens") - total(before, "prefix_hit_tokens")
    return hits / max(1, looked_up)
