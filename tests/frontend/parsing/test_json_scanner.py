from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.parsing.json_scanner import (
    MAX_DEPTH,
    JsonScanner,
    NotJsonError,
    is_json,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
).filter(lambda value: "Infinity" not in json.dumps(value))


def refuse(constant: str) -> None:
    raise ValueError(constant)


def library_accepts(text: str) -> bool:
    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@given(value=VALUES, ascii=st.booleans(), indent=st.none() | st.integers(0, 2))
def test_json_is_json(value: Any, ascii: bool, indent: int | None) -> None:
    assert is_json(json.dumps(value, ensure_ascii=ascii, indent=indent))


@given(text=st.text(st.sampled_from('{}[]",:\\u0a1-+.eE tfn\n'), max_size=12))
def test_any_text_is_judged_as_the_library_judges_it(text: str) -> None:
    assert is_json(text) == library_accepts(text)


@given(value=VALUES, data=st.data())
def test_damaged_json_is_judged_as_the_library_judges_it(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    place = data.draw(st.integers(0, len(text)))
    damaged = (
        text[:place]
        + data.draw(st.sampled_from(['"', "\\", "}", ",", "1", ""]))
        + (text[place + 1 :])
    )
    assert is_json(damaged) == library_accepts(damaged)


def test_only_so_many_arrays_and_objects_may_be_open() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    scanner = JsonScanner()
    for _ in range(MAX_DEPTH):
        scanner.push("[")
    with pytest.raises(NotJsonError):
        scanner.push("{")


@pytest.mark.parametrize(
    "text",
    ["}", "]", "[}", "[1,]", '{"a":1,}', "{1:2}", '{"a" 1}', '"\n', '"\\x', '"\\u12g', "01", "-x",
     "1.", "trux", "nan", "1 2", "{} {}"],
)  # fmt: skip
def test_what_is_no_json_is_refused(text: str) -> None:
    scanner = JsonScanner()
    with pytest.raises(NotJsonError):  # noqa: PT012 - any of the characters may be the one
        for char in text + ("x" if text == "1." else ""):
            scanner.push(char)
