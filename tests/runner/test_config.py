"""Which programs there are, and which of them serving can begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ServeConfig
from jaxserve.engine.admission import EngineLimits
from jaxserve.engine.fit import check_fit
from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.step import StepShape
from jaxserve.models.presets import preset
from jaxserve.resolve import resolve_sizes
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import ProgramKey, RunnerConfig

TINY = replace(preset("tiny-llama"), context_tokens=4096)


def runner_config(
    max_rows: int = 64, step_tokens: int = 256, *, prompt_logprobs: bool = True
) -> RunnerConfig:
    """What a launch on a CPU would compile."""
    asked = ServeConfig(
        max_rows=max_rows,
        step_tokens=step_tokens,
        prompt_logprobs=prompt_logprobs,
        assets_dir=Path("none"),
        cache_dir=Path("none"),
    )
    return of_step(resolve_sizes(asked, TINY, "cpu", data_shards=1).step)


def of_step(step: StepShape) -> RunnerConfig:
    dtype = jnp.dtype(jnp.float32)
    cache = CacheShape(num_pages=200, page_tokens=32, max_rows=step.max_rows, dtype=dtype)
    return RunnerConfig(step=step, cache=cache, dtype=dtype)


def shape_of(step: StepShape, keys: list[ProgramKey]) -> StepShape:
    """The shape of which only these programs are there."""
    there = {(key.kind, key.rows, key.tokens) for key in keys}
    return replace(
        step,
        decode_buckets=tuple(rows for rows in step.decode_buckets if ("decode", rows, 1) in there),
        prefill_buckets=tuple(each for each in step.prefill_buckets if ("prefill", *each) in there),
        score_buckets=tuple(each for each in step.score_buckets if ("score", *each) in there),
    )


def test_the_first_programs_are_few_rows_a_short_prompt_and_the_largest_of_each_kind() -> None:
    keys = runner_config().first_keys()
    assert {(key.kind, key.rows, key.tokens) for key in keys} == {
        ("set_row", 1, 0),
        ("set_masks", 16, 0),
        ("decode", 1, 1),
        ("decode", 16, 1),
        ("decode", 64, 1),
        ("prefill", 16, 64),
        ("prefill", 16, 256),
        ("score", 1, 256),
    }
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("decode", "first"),
    [
        ((1, 4), (1, 4)),
        ((1, 4, 10), (1, 10)),
        ((16, 24, 32), (16, 32)),
        ((1, 4, 24, 32), (1, 24, 32)),
        ((2,), (2,)),
    ],
)
def test_the_first_decode_programs_are_the_smallest_that_of_few_rows_and_the_largest(
    decode: tuple[int, ...], first: tuple[int, ...]
) -> None:
    step = StepShape(
        max_rows=decode[-1],
        table_width=4,
        vocab_size=512,
        decode_buckets=decode,
        prefill_buckets=(),
    )
    keys = of_step(step).first_keys()
    assert [key.rows for key in keys if key.kind == "decode"] == list(first)
    assert {key.kind for key in keys} == {"set_row", "set_masks", "decode"}


@given(
    max_rows=st.integers(1, 4096),
    step_tokens=st.integers(16, 4096),
    prompt_logprobs=st.booleans(),
)
def test_whatever_may_be_planned_fits_the_first_programs(
    max_rows: int, step_tokens: int, prompt_logprobs: bool
) -> None:
    config = runner_config(max_rows, step_tokens, prompt_logprobs=prompt_logprobs)
    step, keys = config.step, config.first_keys()
    assert set(keys) <= set(config.program_keys())
    assert len(keys) <= 8
    longest = max(tokens for _, tokens in step.prefill_buckets)
    scheduler = SchedulerConfig(
        max_rows=max_rows,
        step_tokens=longest + max_rows,
        chunk_tokens=longest,
        max_chunks=16,
        page_tokens=32,
        num_pages=200,
    )
    limits = EngineLimits(context_tokens=4096, vocab_size=512, prompt_logprobs=prompt_logprobs)
    check_fit(scheduler, shape_of(step, keys), limits, [])
