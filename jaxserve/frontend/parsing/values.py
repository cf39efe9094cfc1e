"""JSON values out of the text between tags, by the tool's schema.

Tags say nothing about types: ``5`` may be a number or a string. The schema's types decide; where it
gives none, text that is JSON is taken as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxserve.frontend.parsing.json_scanner import is_json

MAX_SCHEMA_DEPTH = 8
"""References and alternatives that are followed to find a parameter's types."""
STRING = frozenset({"string"})
# Templates print these as Python does.
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def json_string(text: str) -> str:
    """Returns ``text`` as it stands inside a JSON string; pieces can be joined."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def parameter_types(schema: Mapping[str, Any] | None, name: str) -> frozenset[str]:
    """Returns the JSON types that a tool's schema allows for a parameter; empty for any."""
    properties = (schema or {}).get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return _types(found, schema or {}, MAX_SCHEMA_DEPTH)


def typed_json(text: str, types: frozenset[str]) -> str:
    """Returns the text between two tags as JSON: as it is where that fits, else as a string."""
    value = text.strip()
    if types != STRING:
        value = PYTHON_WORDS.get(value, value)
        if is_json(value) and (not types or types & _types_of_json(value)):
            return value
    return f'"{json_string(text)}"'


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    """Finds the types of one schema; empty when anything is allowed or nothing is known."""
    if not isinstance(schema, Mapping) or depth == 0:
        return frozenset()
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(kind for kind in declared if isinstance(kind, str))
    if isinstance(schema.get("enum"), list):
        return frozenset().union(*map(_types_of, schema["enum"]))
    if "const" in schema:
        return _types_of(schema["const"])
    if isinstance(schema.get("$ref"), str):
        return _types(resolve(schema["$ref"], root), root, depth - 1)
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(word), list):
            options = [_types(option, root, depth - 1) for option in schema[word]]
            known = [option for option in options if option]
            if word == "allOf" or len(known) == len(options):
                return frozenset().union(*known)
    return frozenset()


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """Returns what a reference inside the same schema points at; None when that is nothing."""
    found: Any = root
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _types_of_json(text: str) -> frozenset[str]:
    """Finds the types of a JSON text, by how it begins: a number may be too long to be made."""
    match text[0]:
        case '"':
            return STRING
        case "{":
            return frozenset({"object"})
        case "[":
            return frozenset({"array"})
        case "t" | "f":
            return frozenset({"boolean"})
        case "n":
            return frozenset({"null"})
    return _types_of(float(text)) if {"e", "E", "."} & set(text) else _types_of(0)


def _types_of(value: Any) -> frozenset[str]:
    match value:
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            # 5.0 is an integer to JSON Schema.
            return frozenset({"integer", "number"} if value.is_integer() else {"number"})
        case str():
            return STRING
        case list():
            return frozenset({"array"})
        case Mapping():
            return frozenset({"object"})
        case _:
            return frozenset({"null"})
