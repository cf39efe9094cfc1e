from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.parsing.values import json_string, parameter_types, resolve, typed_json

SCHEMA = {
    "$defs": {
        "Unit": {"enum": ["C", "F"]},
        "Loop": {"$ref": "#/$defs/Loop"},
        "Point": {"type": "object"},
    },
    "properties": {
        "text": {"type": "string"},
        "both": {"type": ["string", "null"]},
        "unit": {"$ref": "#/$defs/Unit"},
        "loop": {"$ref": "#/$defs/Loop"},
        "lost": {"$ref": "#/$defs/Nothing/at/all"},
        "some": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
        "open": {"anyOf": [{"type": "null"}, {}]},
        "all": {"allOf": [{"$ref": "#/$defs/Unit"}, {"minLength": 1}]},
        "only": {"const": 1},
        "kinds": {"enum": [True, 1.5, 2.0, "x", [1], {"a": 1}, None]},
        "odd": True,
    },
}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("text", {"string"}),
        ("both", {"string", "null"}),
        ("unit", {"string"}),
        ("loop", set()),
        ("lost", set()),
        ("some", {"object", "null"}),
        ("open", set()),
        ("all", {"string"}),
        ("only", {"integer", "number"}),
        ("kinds", {"boolean", "number", "integer", "string", "array", "object", "null"}),
        ("odd", set()),
        ("absent", set()),
    ],
)
def test_types_are_found_in_schemas(name: str, types: set[str]) -> None:
    assert parameter_types(SCHEMA, name) == types


def test_a_schema_without_properties_allows_any_type() -> None:
    assert parameter_types(None, "a") == parameter_types({"properties": []}, "a") == set()
    assert resolve("#/a/b", {"a": {"b": 5}}) == 5


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", ["integer"], 5),
        (" 5\n", ["integer"], 5),
        ("5.0", ["integer"], 5.0),
        ("5.5", ["integer"], "5.5"),
        ("5", ["string"], "5"),
        ("five", ["integer"], "five"),
        ("True", ["boolean"], True),
        ("None", ["null", "string"], None),
        ("null", ["string", "null"], None),
        ("x", ["string", "null"], "x"),
        ('["a"]', ["array"], ["a"]),
        ('{"a": 1}', ["object"], {"a": 1}),
        ("[1", ["array"], "[1"),
        ("[1]", ["object"], "[1]"),
        ("5", [], 5),
        ("five", [], "five"),
        ("NaN", ["number"], "NaN"),
        ("", ["integer"], ""),
        (" x ", [], " x "),
        ("1e999", ["integer"], "1e999"),
        ("-1.5E1", ["integer"], -15.0),
        ('"5"', ["string", "null"], "5"),
        ("false", ["boolean"], False),
    ],
)
def test_text_becomes_json_by_its_types(text: str, types: list[str], value: Any) -> None:
    assert json.loads(typed_json(text, frozenset(types))) == value


def test_a_number_of_any_length_is_a_number() -> None:
    """Python refuses to make integers of more than 4300 digits."""
    assert typed_json("1" * 5000, frozenset({"integer"})) == "1" * 5000


@given(pieces=st.lists(st.text()))
def test_pieces_of_a_string_can_be_joined(pieces: list[str]) -> None:
    assert json.loads(f'"{"".join(map(json_string, pieces))}"') == "".join(pieces)
