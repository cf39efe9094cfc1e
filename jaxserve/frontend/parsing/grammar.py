"""Grammars that make a model call tools, in its own format: Lark, in the dialect of llguidance.

The same ``AnswerFormat`` that ``AnswerParser`` reads is written out here, so what a grammar allows
the parser understands. Compiling and following a grammar is left to whoever samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.parsing.formats import AnswerFormat, JsonCalls, NamedCalls, TaggedCalls
from jaxserve.frontend.parsing.values import STRING, parameter_types, resolve

MAX_CALLS = 32
"""Calls in one forced answer, so that a model that repeats itself comes to an end."""
SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""White space of JSON: as templates write it, or none. Weak models never leave a free choice."""
CALL_NUMBER = "/[0-9]{1,2}/"
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
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


def tool_grammar(
    format: AnswerFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    special_tokens: Mapping[str, int] | None = None,
) -> str:
    """Returns a grammar whose texts are calls of the given tools, and nothing else.

    Arguments obey the tool's schema, as far as llguidance supports it. Between tags
    (``TaggedCalls``) a string obeys its ``enum`` or ``const`` and no other keyword, and members are
    those that the schema names.

    Args:
        format: of the model.
        tools: those that may be called; at least one.
        parallel: up to ``MAX_CALLS`` calls instead of exactly one.
        special_tokens: ids of added tokens by text; markers among these are written as the token.
            All that the tokenizer has belong here, whether marked as special or not: llguidance
            takes most of both for special, and does not allow these where letters are asked for.

    Raises:
        InvalidRequestError: the format has no tool calls, or there are no tools.
    """
    if not format.tools:
        raise InvalidRequestError(
            f"this model's answer format, {format.name!r}, has no tool calls; send the request "
            "without tools",
            field="tools",
        )
    if not tools:
        raise InvalidRequestError("tools is empty; name at least one to be called", field="tools")
    shape = format.tools[0]
    writer = _Writer(special_tokens or {})
    if isinstance(shape, JsonCalls):
        writer.write_json_calls(shape, tools, parallel)
    elif isinstance(shape, NamedCalls):
        writer.write_named_calls(shape, tools, parallel)
    else:
        writer.write_tagged_calls(shape, tools, parallel)
    return "\n".join(writer.rules) + "\n"


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self._ids = special_tokens
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def write_json_calls(self, shape: JsonCalls, tools: Sequence[Tool], parallel: bool) -> None:
        before, behind = shape.begin + shape.padding, shape.padding + shape.end
        if shape.bare:
            before = behind = ""
        if shape.is_list:
            calls = self._repeat("call", ", ", parallel)
            self._rule("start", self._text(before + "["), calls, self._text("]" + behind))
        else:
            self._rule("start", self._repeat("unit", shape.between, parallel))
            self._rule("unit", self._text(before), "call", self._text(behind))
        self._calls(tools, lambda number, tool: self._json_call(shape, number, tool))

    def write_named_calls(self, shape: NamedCalls, tools: Sequence[Tool], parallel: bool) -> None:
        calls = self._repeat("call", shape.between, parallel)
        self._rule("start", self._text(shape.begin), calls, self._text(shape.end))

        def call(number: int, tool: Tool) -> None:
            before, behind = shape.written_head
            self._rule(
                f"call_{number}",
                self._text(f"{shape.call_begin}{before}{tool.name}{behind}"),
                CALL_NUMBER if shape.is_numbered else "",
                self._text(shape.separator + shape.padding),
                self._json(_arguments_schema(tool)),
                self._text(shape.padding + "".join(shape.call_end)),
            )

        self._calls(tools, call)

    def write_tagged_calls(self, shape: TaggedCalls, tools: Sequence[Tool], parallel: bool) -> None:
        self._rule("start", self._repeat("call", shape.between, parallel))

        def call(number: int, tool: Tool) -> None:
            head = shape.begin + shape.padding if shape.name_open else shape.begin
            name = shape.name_open + tool.name + shape.name_close
            end = shape.padding + shape.end if shape.end else ""
            self._rule(
                f"call_{number}",
                self._text(head + name + shape.padding),
                *self._parameters(shape, number, tool.parameters or NO_PARAMETERS),
                self._text(shape.call_end + end),
            )

        self._calls(tools, call)

    def _calls(self, tools: Sequence[Tool], write: Callable[[int, Tool], None]) -> None:
        """Writes ``call`` as one of the tools, each by a rule of its own."""
        self._rule("call", " | ".join(f"call_{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            write(number, tool)

    def _json_call(self, shape: JsonCalls, number: int, tool: Tool) -> None:
        name = f'"{shape.name_key}": {_dumps(tool.name)}, "{shape.argument_keys[0]}": '
        identity = f'{{"{shape.id_key}": "'
        self._rule(
            f"call_{number}",
            *((self._text(identity), CALL_NUMBER) if shape.id_key else ()),
            self._text(('", ' if shape.id_key else "{") + name),
            self._json(_arguments_schema(tool)),
            self._text("}"),
        )

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
            self._rule(name, self._text(opening + line), value, self._text(shape.padding))
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
            return f"{self._json({**schema, **definitions})} {end}"
        choices = _choices(schema, root)
        if choices is not None:
            return f"({' | '.join(self._text(choice) or '""' for choice in choices)}) {end}"
        if tag in self._ids:
            return f"/(?s:.*){_pattern(line)}/ {self._text(tag)}"
        # Lazy: the value ends with the first closing tag.
        self.rules.append(f"{name}_text[lazy]: /(?s:.*){_pattern(line + tag)}/")
        return f"{name}_text"

    def _rule(self, name: str, *pieces: str) -> None:
        self.rules.append(f"{name}: {' '.join(filter(None, pieces))}")

    def _repeat(self, rule: str, between: str, parallel: bool) -> str:
        if not parallel:
            return rule
        following = " ".join(filter(None, (self._text(between), rule)))
        return f"{rule} ({following}){{0,{MAX_CALLS - 1}}}"

    def _text(self, text: str) -> str:
        """Writes a literal; special tokens in it are tokens."""
        pieces = self._special.split(text) if self._ids else [text]
        return " ".join(
            f"<[{self._ids[piece]}]>" if piece in self._ids else _dumps(piece)
            for piece in pieces
            if piece
        )

    def _json(self, schema: Mapping[str, Any]) -> str:
        return f"%json {_dumps({**schema, 'x-guidance': SPACING})}"


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _pattern(text: str) -> str:
    """Writes a literal inside a regular expression between slashes."""
    # Not re.escape: an escaped angle bracket is a word's edge in llguidance.
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", r"\n")


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
