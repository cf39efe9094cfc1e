"""Parts that do not fit together are refused before the first request finds out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.engine.admission import EngineLimits
from jaxserve.engine.fit import check_fit
from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.step import StepShape
from jaxserve.testing import counting_engine

SCHEDULER = SchedulerConfig(max_rows=4, step_tokens=16, max_chunks=2, page_tokens=4, num_pages=20)
SHAPE = StepShape(
    max_rows=4,
    table_width=8,
    vocab_size=10,
    decode_buckets=(4,),
    prefill_buckets=((1, 16),),
    score_buckets=((1, 16),),
)
LIMITS = EngineLimits(context_tokens=32, vocab_size=10)


def test_parts_that_fit_are_accepted() -> None:
    check_fit(SCHEDULER, SHAPE, LIMITS, [0] * 8)
    check_fit(replace(SCHEDULER, step_tokens=100, chunk_tokens=16), SHAPE, LIMITS, [])
    unscored = replace(SHAPE, score_buckets=())
    check_fit(SCHEDULER, unscored, replace(LIMITS, prompt_logprobs=False), [])


@pytest.mark.parametrize(
    ("scheduler", "shape", "limits", "text"),
    [
        ({}, {"max_rows": 3}, {}, "4 rows are scheduled and 3 compiled"),
        ({"step_tokens": 17}, {}, {}, "may have 17 tokens and the longest prefill bucket has 16"),
        ({"chunk_tokens": 9}, {"prefill_buckets": ((2, 8),)}, {}, "9 tokens .* prefill .* has 8"),
        ({}, {"score_buckets": ()}, {}, "longest score bucket has 0; lower chunk_tokens or add"),
        ({}, {"decode_buckets": (1, 2)}, {}, "no decode bucket has max_rows = 4 rows"),
        ({}, {}, {"context_tokens": 33}, "context_tokens is 33, and a page table of 8 pages .* 32"),
        ({"num_pages": 5}, {}, {}, "context_tokens is 32, .* from a pool of 4 holds 16"),
    ],
)
def test_numbers_that_disagree_are_named(
    scheduler: dict[str, Any], shape: dict[str, Any], limits: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check_fit(
            replace(SCHEDULER, **scheduler), replace(SHAPE, **shape), replace(LIMITS, **limits), []
        )


def test_an_engine_takes_a_limited_number_of_end_tokens() -> None:
    with pytest.raises(ValueError, match="end_ids has 9 entries and the limit is 8"):
        counting_engine(end_ids=tuple(range(9)))
