"""The page count: arithmetic that can be done by hand, refusals with the numbers in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import MemoryPlanError
from jaxserve.runner.memory import (
    MemoryBudget,
    PageCountMemory,
    host_free_bytes,
    plan_memory,
    round_down,
)

MIB = 2**20
BUDGET = MemoryBudget(
    free_bytes=1000 * MIB,
    weight_bytes=300 * MIB,
    row_state_bytes=50 * MIB,
    temporary_bytes=150 * MIB,
    page_bytes=MIB,
    fraction=0.8,
    kv_bytes=None,
)


def test_a_fraction_is_of_what_weights_rows_and_temporaries_leave() -> None:
    """1000 - 300 - 50 - 150 = 500 left, 80 % of it are 400 pages; 400 keeps four leading bits as
    384."""
    assert plan_memory(BUDGET, least_pages=2, most_pages=10_000) == 384


def test_bytes_asked_for_override_the_fraction() -> None:
    budget = replace(BUDGET, kv_bytes=96 * MIB)
    assert plan_memory(budget, least_pages=2, most_pages=10_000) == 96


def test_a_fraction_can_have_a_bound_that_is_no_demand() -> None:
    """What is not there is not asked for: the default of a CPU must start on a small machine."""
    budget = replace(BUDGET, most_kv_bytes=96 * MIB)
    assert plan_memory(budget, least_pages=2, most_pages=10_000) == 96
    assert (
        plan_memory(replace(budget, most_kv_bytes=900 * MIB), least_pages=2, most_pages=999) == 384
    )


def test_more_pages_than_all_rows_could_use_are_not_taken() -> None:
    assert plan_memory(BUDGET, least_pages=2, most_pages=100) == 100


def test_rounding_never_goes_below_one_full_context() -> None:
    assert plan_memory(BUDGET, least_pages=399, most_pages=10_000) == 399


def test_too_little_for_one_full_context_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(MemoryPlanError, match=r"400 pages.*needs 401.*= 500 MiB left.*--context"):
        plan_memory(BUDGET, least_pages=401, most_pages=10_000)


def test_what_is_not_there_is_not_called_asked_for() -> None:
    budget = replace(BUDGET, weight_bytes=1200 * MIB)
    with pytest.raises(MemoryPlanError, match=r"^0 MiB make 0 pages .*= -400 MiB left.*--context"):
        plan_memory(budget, least_pages=2, most_pages=10_000)


def test_asking_for_more_than_is_left_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match=r"asks for 600 MiB and only 500 MiB are left"):
        plan_memory(replace(BUDGET, kv_bytes=600 * MIB), least_pages=2, most_pages=10_000)


@given(st.integers(2, 10**7))
def test_rounding_gives_up_at_most_an_eighth(pages: int) -> None:
    assert pages * 7 / 8 <= round_down(pages) <= pages


def test_a_count_is_recalled_and_damage_is_ignored(tmp_path: Path) -> None:
    memory = PageCountMemory(tmp_path, "key")
    assert memory.recall() is None
    memory.remember(384)
    assert PageCountMemory(tmp_path, "key").recall() == 384
    assert PageCountMemory(tmp_path, "other").recall() is None
    (tmp_path / "pages-key.json").write_text('{"num_pages": "many"}')
    assert memory.recall() is None
    (tmp_path / "pages-key.json").write_text("{")
    assert memory.recall() is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    PageCountMemory(tmp_path / "file", "key").remember(5)
    assert PageCountMemory(tmp_path / "file", "key").recall() is None


def test_the_host_has_some_memory() -> None:
    assert 16 * MIB < host_free_bytes() < 2**50
