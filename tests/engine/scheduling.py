"""Drives a scheduler by hand in tests: makes sequences, plans steps and publishes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jaxserve.engine.plan import SchedulerConfig, StepPlan
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.scheduler import PRIORITY_SECONDS, Scheduler
from jaxserve.engine.sequence import LiveRequest, LiveSequence
from jaxserve.engine.stream import ThreadWaker, TokenStream

NUMBERS = itertools.count()


def make(**values: Any) -> Scheduler:
    """Returns a scheduler with three rows and five pages of four tokens, unless told otherwise."""
    sizes = {"max_rows": 3, "step_tokens": 16, "max_chunks": 4, "page_tokens": 4, "num_pages": 6}
    return Scheduler(SchedulerConfig(**{**sizes, **values}))


def sequence(
    prompt: Sequence[int],
    *,
    now: float = 0.0,
    priority: int = 0,
    salt: str = "",
    resume: Sequence[int] = (),
    max_tokens: int = 100,
    n: int = 1,
    prompt_logprobs: int | None = None,
) -> LiveSequence:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, prompt_logprobs=prompt_logprobs)
    request = Request(request_id="r", prompt=prompt, sampling=sampling, resume=resume)
    stream = TokenStream("r", n, ThreadWaker(), on_close=print, on_stop=print)
    live = LiveRequest(
        number=next(NUMBERS),
        request=request,
        stream=stream,
        seed=0,
        accepted_s=float(now),
        salt=salt,
        stop_ids=frozenset(),
        open_choices=n,
    )
    live.make_choices(float(now) + priority * PRIORITY_SECONDS, 1000)
    return live.sequences[0]


def enqueue(scheduler: Scheduler, *sequences: LiveSequence) -> None:
    for each in sequences:
        scheduler.enqueue(each)


def publish(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> None:
    """Does what the publisher does: commits, then appends the sampled tokens."""
    for chunk in plan.chunks:
        if chunk.sequence.row == chunk.row:
            scheduler.commit(chunk.sequence, chunk.start + chunk.count)
        if chunk.last:
            chunk.sequence.tokens.append(token)
    for each, row, position in zip(
        plan.decode, plan.decode_rows, plan.decode_positions, strict=True
    ):
        if each.row == row:
            scheduler.commit(each, position + 1)
        each.tokens.append(token)


def advance(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    """Plans a step and publishes it at once."""
    plan = scheduler.plan(now)
    publish(scheduler, plan)
    scheduler.check_integrity()
    return plan


def chunks(plan: StepPlan) -> list[tuple[LiveSequence, int, int, bool]]:
    return [(chunk.sequence, chunk.start, chunk.count, chunk.last) for chunk in plan.chunks]
