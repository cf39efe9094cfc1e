from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.parsing import FORMATS, ToolCallArguments
from tests.frontend.parsing.golden import GOLDEN, Golden, joined, read


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_an_answer_in_one_piece_is_split_as_expected(golden: Golden) -> None:
    assert read(golden.parser(), golden.text) == golden.parts


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_every_cut_into_two_gives_the_same(golden: Golden) -> None:
    for cut in range(len(golden.text) + 1):
        parts = read(golden.parser(), golden.text[:cut], golden.text[cut:])
        assert parts == golden.parts, golden.text[:cut]


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_single_characters_give_the_same(golden: Golden) -> None:
    assert read(golden.parser(), *golden.text) == golden.parts


@given(golden=st.sampled_from(GOLDEN), data=st.data())
def test_any_cuts_give_the_same(golden: Golden, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(golden.text)), max_size=12).map(sorted))
    bounds = [0, *cuts, len(golden.text)]
    pieces = [golden.text[a:b] for a, b in pairwise(bounds)]
    assert read(golden.parser(), *pieces) == golden.parts


@given(golden=st.sampled_from(GOLDEN), data=st.data())
def test_a_damaged_answer_depends_on_its_text_alone(golden: Golden, data: st.DataObject) -> None:
    """Cut off, with a piece left out or doubled: one piece and single characters agree."""
    first = data.draw(st.integers(0, len(golden.text)))
    last = data.draw(st.integers(0, len(golden.text)))
    text = golden.text[:first] + golden.text[last:]
    assert read(golden.parser(), text) == read(golden.parser(), *text)


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_what_was_given_before_a_cut_off_is_kept(golden: Golden) -> None:
    """An answer that ends early has given a beginning of the whole one's parts by then."""
    for cut in range(len(golden.text)):
        given_so_far = joined(golden.parser().push(golden.text[:cut]))
        for early, whole in zip(given_so_far[:-1], golden.parts, strict=False):
            assert early == whole
        if given_so_far:
            last, whole = given_so_far[-1], golden.parts[len(given_so_far) - 1]
            assert type(last) is type(whole)
            assert str(getattr(whole, "text", "")).startswith(str(getattr(last, "text", "")))


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_arguments_are_json_objects(golden: Golden) -> None:
    for part in golden.parts:
        if isinstance(part, ToolCallArguments):
            assert isinstance(json.loads(part.text), dict)


def test_every_family_has_a_golden_answer() -> None:
    assert {golden.family for golden in GOLDEN} == set(FORMATS)
