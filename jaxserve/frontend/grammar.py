"""What an answer has to be, as clients say it. Compiling is ``grammar_compiler.py``'s business."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.errors import InvalidRequestError

GrammarKind = Literal["json_schema", "json_object", "regex", "grammar", "choices"]
GRAMMAR_OPTIONS = ("json_schema", "json_object", "regex", "grammar", "choices")
"""Options of ``generate`` that make one; at most one of them may be given."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to be, in the words of a client."""

    kind: GrammarKind
    text: str = ""
    """A JSON schema; nothing for ``json_object``; a regular expression of the whole answer; a
    grammar in Lark's form or, where it has ``::=``, in GBNF; a JSON list of strings."""
    field: str = field(default="grammar", compare=False)
    """What the client calls it, for errors."""
    frame: str = ""
    """Lark around it, in which ``@answer`` stands for it: see ``parsing.answer_grammar``."""


def take_grammar(options: dict[str, Any]) -> Grammar | None:
    """Takes ``GRAMMAR_OPTIONS`` out of options and makes a grammar of the one that is given.

    Args:
        options: ``json_schema`` is a schema as a mapping or as JSON, ``json_object`` True,
            ``choices`` strings; the others are texts.

    Raises:
        InvalidRequestError: several are given, or one is of another type.
    """
    given = {name: options.pop(name) for name in GRAMMAR_OPTIONS if name in options}
    if len(given) > 1:
        raise InvalidRequestError(
            f"{' and '.join(given)} are given, and an answer obeys one of them; choose one",
            field=next(iter(given)),
        )
    for name, value in given.items():
        return Grammar(name, _text(name, value), name)  # pyright: ignore[reportArgumentType]
    return None


def _text(name: str, value: object) -> str:
    match name, value:
        case "json_object", True:
            return ""
        case (("json_schema" | "regex" | "grammar"), str()):
            return value
        case "json_schema", Mapping():
            return _json(name, value)
        case "choices", Sequence() if not isinstance(value, str):
            return _json(name, list(value))
    wanted = {
        "json_schema": "a mapping or JSON text",
        "json_object": "True",
        "choices": "a list of strings",
    }
    raise InvalidRequestError(
        f"{name} is {str(value)[:80]!r}; give {wanted.get(name, 'a text')}", field=name
    )


def _json(name: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{name} cannot be written as JSON ({error}); send plain values", field=name
        ) from None
