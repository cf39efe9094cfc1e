"""Dispatch: the first implementation that accepts, and every reason when none does."""

from __future__ import annotations

import pytest

from pallas_kernels.dispatch import dispatch


def _wants_pairs(*numbers: int) -> str:
    if len(numbers) != 2:
        raise NotImplementedError(f"takes 2 numbers, got {len(numbers)}")
    return "pairs"


def _wants_positive(*numbers: int) -> str:
    if min(numbers) < 0:
        raise ValueError(f"numbers must be positive, got {min(numbers)}")
    if len(numbers) > 3:
        raise NotImplementedError(f"takes at most 3 numbers, got {len(numbers)}")
    return "positive"


ADDERS = {"pairs": _wants_pairs, "positive": _wants_positive}


def test_auto_takes_the_first_that_accepts():
    assert dispatch("add", ADDERS, "auto", 1, 2) == "pairs"
    assert dispatch("add", ADDERS, "auto", 1, 2, 3) == "positive"


def test_a_name_takes_that_one_and_no_other():
    assert dispatch("add", ADDERS, "positive", 1, 2) == "positive"
    with pytest.raises(ExceptionGroup, match=r"no implementation of add .*tried pairs\)") as caught:
        dispatch("add", ADDERS, "pairs", 1)
    assert len(caught.value.exceptions) == 1


def test_wrong_arguments_stop_the_search():
    with pytest.raises(ValueError, match="numbers must be positive, got -1"):
        dispatch("add", {"positive": _wants_positive, "pairs": _wants_pairs}, "auto", -1, 2)


def test_when_all_decline_every_reason_is_told():
    with pytest.raises(ExceptionGroup, match=r"add accepts .*tried pairs, positive") as caught:
        dispatch("add", ADDERS, "auto", 1, 2, 3, 4)
    assert [str(reason) for reason in caught.value.exceptions] == [
        "takes 2 numbers, got 4",
        "takes at most 3 numbers, got 4",
    ]
    assert [reason.__notes__ for reason in caught.value.exceptions] == [
        ["said by add implementation 'pairs'"],
        ["said by add implementation 'positive'"],
    ]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="add has no implementation 'mosaic'; choose 'auto' or one"
    ):
        dispatch("add", ADDERS, "mosaic", 1, 2)
