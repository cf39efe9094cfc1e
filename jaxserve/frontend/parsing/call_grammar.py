"""Grammars of tool calls, in each of the three shapes of ``formats.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.frontend.parsing.formats import CallShape, JsonCalls, NamedCalls, TaggedCalls
from jaxserve.frontend.parsing.lark import (
    ITEM_SEPARATOR,
    KEY_SEPARATOR,
    Rules,
    as_json,
    dumps,
    joined,
)
from jaxserve.frontend.parsing.values import STRING, parameter_types, resolve

MAX_CALLS = 32
"""Calls in one answer, so that a model that repeats itself comes to an end."""
CALL_NUMBER = "/[0-9]{1,2}/"
CALL_ID = '/"[0-9]{1,2}"/'
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS = {"type": "object"}
COMBINERS = frozenset({"patternProperties", "anyOf", "oneOf", "allOf", "$ref"})


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON schema of the arguments object; None takes no arguments."""
    strict: bool = False
    """Members that the schema does not name are refused at every depth, not only at the top."""


class CallWriter:
    """Adds the rule ``block``: what follows the marker that opens calls, one call or all."""

    def __init__(
        self,
        rules: Rules,
        tools: Sequence[Tool],
        *,
        parallel: bool,
        only_strict: bool,
        beside_text: bool,
    ) -> None:
        """Adds nothing yet.

        Args:
            rules: are added to.
            tools: those that may be called.
            parallel: up to ``MAX_CALLS`` calls instead of exactly one.
            only_strict: arguments of a tool that is not strict are any JSON object, where the shape
                has JSON.
            beside_text: text may stand where calls do. The lexer takes the longest lexeme: the
                first of a call in JSON is then as long as it takes to be no text, and one of JSON
                otherwise, as another JSON may be the answer.
        """
        self._rules = rules
        self._tools = tools
        self._parallel = parallel
        self._only_strict = only_strict
        self._beside_text = beside_text
        self._between: str | None = None
        """What stands between blocks; None where a block holds all calls."""

    def write(self, shape: CallShape) -> None:
        """Adds ``block`` and what it needs. Once."""
        if isinstance(shape, JsonCalls):
            self._write_json_calls(shape)
        elif isinstance(shape, NamedCalls):
            self._write_named_calls(shape)
        else:
            self._write_tagged_calls(shape)

    def more(self, opening: str) -> str:
        """Returns what stands for further blocks, each behind ``opening``."""
        if self._between is None or not self._parallel:
            return ""
        between = self._rules.text(self._between)
        return f"({joined(between, opening, 'block')}){{0,{MAX_CALLS - 1}}}"

    def _write_json_calls(self, shape: JsonCalls) -> None:
        before, behind = shape.padding, shape.padding + shape.end
        if shape.bare:
            before = behind = ""
        if shape.is_list:
            calls = self._repeat("call", ", ")
            self._rules.add("block", self._text(before + "["), calls, self._text("]" + behind))
        else:
            self._between = shape.between
            self._rules.add("block", self._text(before), "call", self._text(behind))
        self._each(lambda number, tool: self._json_call(shape, number, tool))

    def _write_named_calls(self, shape: NamedCalls) -> None:
        if shape.begin:
            self._rules.add("block", self._repeat("call", shape.between), self._text(shape.end))
        else:
            self._between = shape.between
            self._rules.add("block", "call")

        def call(number: int, tool: Tool) -> None:
            before, behind = shape.written_head
            opening = shape.call_begin if shape.begin else ""
            self._rules.add(
                f"call_{number}",
                self._text(f"{opening}{before}{tool.name}{behind}"),
                CALL_NUMBER if shape.is_numbered else "",
                self._text(shape.separator + shape.padding),
                self._arguments(tool),
                self._text(shape.padding + "".join(shape.call_end)),
            )

        self._each(call)

    def _write_tagged_calls(self, shape: TaggedCalls) -> None:
        self._between = shape.between
        self._rules.add("block", "call")

        def call(number: int, tool: Tool) -> None:
            head = shape.padding if shape.name_open else ""
            name = shape.name_open + tool.name + shape.name_close
            end = shape.padding + shape.end if shape.end else ""
            self._rules.add(
                f"call_{number}",
                self._text(head + name + shape.padding),
                *self._parameters(shape, number, tool.parameters or NO_PARAMETERS),
                self._text(shape.call_end + end),
            )

        self._each(call)

    def _each(self, write: Callable[[int, Tool], None]) -> None:
        """Writes ``call`` as one of the tools, each by a rule of its own."""
        self._rules.add("call", " | ".join(f"call_{place}" for place in range(len(self._tools))))
        for number, tool in enumerate(self._tools):
            write(number, tool)

    def _json_call(self, shape: JsonCalls, number: int, tool: Tool) -> None:
        members = [(shape.id_key, CALL_ID)] if shape.id_key else []
        members.append((shape.name_key, dumps(dumps(tool.name))))
        members.append((shape.argument_keys[0], self._arguments(tool)))
        texts = [f"{dumps(dumps(key))} /{KEY_SEPARATOR}/ {value}" for key, value in members]
        call = f" /{ITEM_SEPARATOR}/ ".join(texts)
        # One literal of brace and key, or two.
        opened = '"{' + call.removeprefix('"') if self._beside_text else f'"{{" {call}'
        self._rules.add(f"call_{number}", opened, '"}"')

    def _parameters(self, shape: TaggedCalls, number: int, schema: Mapping[str, Any]) -> list[str]:
        """Writes a rule for each parameter; returns how the call refers to them, in order."""
        declared = schema.get("properties")
        properties = dict(declared) if isinstance(declared, Mapping) else {}
        required = schema.get("required")
        required = required if isinstance(required, Sequence) else ()
        references = []
        for place, key in enumerate(dict.fromkeys([*properties, *required])):
            name = f"parameter_{number}_{place}"
            opening = shape.key_open + key + shape.key_close
            if shape.value_open:
                opening += shape.padding + shape.value_open
            line = "\n" if shape.value_lines else ""
            value = self._value(name, properties.get(key), key, schema, (line, shape.value_close))
            self._rules.add(name, self._text(opening + line), value, self._text(shape.padding))
            references.append(name if key in required else f"{name}?")
        return references

    def _value(
        self, name: str, schema: Any, key: str, root: Mapping[str, Any], closing: tuple[str, str]
    ) -> str:
        """Returns what stands for a value and the tag that closes it."""
        line, tag = closing
        end = self._text(line + tag)
        if parameter_types(root, key) != STRING:
            definitions = {word: root[word] for word in ("$defs", "definitions") if word in root}
            schema = schema if isinstance(schema, Mapping) else {}
            return joined(as_json({**schema, **definitions}), end)
        choices = _choices(schema, root)
        if choices is not None:
            return f"({' | '.join(self._text(choice) or '""' for choice in choices)}) {end}"
        return self._rules.up_to(f"{name}_text", tag, line=line)

    def _arguments(self, tool: Tool) -> str:
        is_any = self._only_strict and not tool.strict
        return as_json(ANY_ARGUMENTS if is_any else _arguments_schema(tool))

    def _repeat(self, rule: str, between: str) -> str:
        if not self._parallel:
            return rule
        return f"{rule} ({joined(self._text(between), rule)}){{0,{MAX_CALLS - 1}}}"

    def _text(self, text: str) -> str:
        return self._rules.text(text)


def _choices(schema: Any, root: Mapping[str, Any]) -> list[str] | None:
    """Returns the strings that a schema lists; None when any string is allowed."""
    if not isinstance(schema, Mapping):
        return None
    if isinstance(schema.get("$ref"), str):
        schema = resolve(schema["$ref"], root) or {}
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, Sequence):
        return None
    return [text for text in listed if isinstance(text, str)]


def _arguments_schema(tool: Tool) -> Mapping[str, Any]:
    """Returns the schema of a tool's arguments: an object, with no members but the named ones."""
    schema = tool.parameters if tool.parameters is not None else NO_PARAMETERS
    schema = {"type": "object", **schema}
    return _close_all(schema) if tool.strict else _close(schema)


def _close(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuses unnamed members of one object, unless the schema speaks of these itself."""
    if "properties" in schema and not COMBINERS & schema.keys():
        return {"additionalProperties": False, **schema}
    return schema


def _close_all(schema: Any) -> Any:
    """Closes an object and all in it."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(_close(schema))
    for word in ("properties", "$defs", "definitions"):
        if isinstance(closed.get(word), Mapping):
            closed[word] = {name: _close_all(inner) for name, inner in closed[word].items()}
    for word in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(closed.get(word), list):
            closed[word] = [_close_all(inner) for inner in closed[word]]
    if isinstance(closed.get("items"), Mapping):
        closed["items"] = _close_all(closed["items"])
    return closed
