"""Dispatch: the first implementation that accepts, and every reason when none does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels.dispatch import dispatch, forced, recorded
from pallas_kernels.families import FAMILIES, parse_choices


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


def test_what_was_chosen_is_recorded_with_the_reasons_of_the_others():
    with recorded() as choices:
        dispatch("add", ADDERS, "auto", 1, 2)
        dispatch("add", ADDERS, "auto", 1, 2, 3)
        dispatch("add", ADDERS, "auto", 3, 4)
    dispatch("multiply", ADDERS, "auto", 1, 2)
    assert choices.taken == {"add": ["pairs", "positive"]}
    assert choices.declined == {"add": {"pairs": "takes 2 numbers, got 3"}}


def test_a_forced_implementation_is_taken_where_the_choice_is_free():
    with forced({"add": "positive"}):
        assert dispatch("add", ADDERS, "auto", 1, 2) == "positive"
        assert dispatch("add", ADDERS, "pairs", 1, 2) == "pairs"
        with pytest.raises(ExceptionGroup, match="tried positive"):
            dispatch("add", ADDERS, "auto", 1, 2, 3, 4)
    assert dispatch("add", ADDERS, "auto", 1, 2) == "pairs"


def test_choices_are_read_by_family():
    assert parse_choices("auto") == parse_choices("") == {}
    text = "paged_attention=reference,quantized_matmul=xla"
    assert parse_choices(text) == {"paged_attention": "reference", "quantized_matmul": "xla"}
    assert all(FAMILIES.values())


def _dispatched(tree: ast.AST) -> list[ast.expr]:
    """The first argument of every call of ``dispatch``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call.args[0]
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "dispatch"
    ]


def test_every_family_that_is_dispatched_may_be_chosen_for():
    """By the source: a call's first argument is the family's name, as it is written."""
    names: set[str] = set()
    for path in Path(*pallas_kernels.__path__).rglob("*.py"):
        for name in _dispatched(ast.parse(path.read_text())):
            assert isinstance(name, ast.Constant), f"{path}:{name.lineno}"
            names.add(str(name.value))
    assert names == set(FAMILIES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("attention=xla", "'attention=xla' chooses for no family; give FAMILY=NAME with a family"),
        (
            "paged_attention",
            "'paged_attention' names no implementation; paged_attention has mosaic",
        ),
        ("paged_attention=fast", "'paged_attention=fast' names no implementation"),
        (
            "append=native,append=scatter",
            "append is chosen for twice; name one implementation of it",
        ),
    ],
)
def test_a_choice_of_what_there_is_not_is_refused(text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        parse_choices(text)
