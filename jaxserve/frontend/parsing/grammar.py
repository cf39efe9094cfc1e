"""Grammars of whole answers: thoughts, then calls of tools or what else the answer may be.

    start -> thoughts? ( calls | text | text calls | @answer )

Written in Lark, in the dialect of llguidance, from the same ``AnswerFormat`` that ``AnswerParser``
reads: what a grammar allows, the parser understands. Compiling and following a grammar is left to
whoever samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.parsing.call_grammar import CallWriter, Tool
from jaxserve.frontend.parsing.calls import BARE_KEYS
from jaxserve.frontend.parsing.formats import AnswerFormat, CallShape, JsonCalls
from jaxserve.frontend.parsing.lark import Rules, joined

ANSWER = "answer"
"""What ``answer_grammar`` calls the grammar that it is put around."""
BEHIND_THOUGHTS = "/[ \\n]{0,2}/"


class Thoughts(Enum):
    """What may stand in front of an answer that obeys."""

    NONE = auto()
    POSSIBLE = auto()
    """The answer may begin with the marker that opens the model's thoughts."""
    OPEN = auto()
    """The prompt ends with that marker."""


class Otherwise(Enum):
    """What an answer may be instead of tool calls."""

    NOTHING = auto()
    TEXT = auto()
    """Any text, and calls behind it; what begins like a call has to be one."""
    ANSWER = auto()
    """Another grammar, by the name of ``ANSWER``."""


def answer_grammar(
    format: AnswerFormat,
    *,
    tools: Sequence[Tool] = (),
    otherwise: Otherwise = Otherwise.NOTHING,
    parallel: bool = True,
    thoughts: Thoughts = Thoughts.NONE,
    special_tokens: Mapping[str, int] | None = None,
) -> str:
    """Returns a grammar of whole answers.

    Arguments obey the tool's schema, as far as llguidance supports it. Between tags
    (``TaggedCalls``) a string obeys its ``enum`` or ``const`` and no other keyword, and members are
    those that the schema names.

    Args:
        format: of the model.
        tools: those that may be called.
        otherwise: what an answer without calls may be.
        parallel: up to ``MAX_CALLS`` calls instead of exactly one.
        thoughts: what may stand before all that; NONE in a format that has no reasoning.
        special_tokens: ids of added tokens by text; markers among these are written as the token.
            All that the tokenizer has belong here, whether marked as special or not: those that are
            marked are not allowed where letters are asked for.

    Raises:
        InvalidRequestError: there are tools and the format has no calls, or there is nothing that
            an answer may be.
    """
    if tools and not format.tools:
        raise InvalidRequestError(
            f"this model's answer format, {format.name!r}, has no tool calls; send the request "
            "without tools",
            field="tools",
        )
    if not tools and otherwise is Otherwise.NOTHING:
        raise InvalidRequestError("tools is empty; name at least one to be called", field="tools")
    rules = Rules(special_tokens or {})
    before = _thoughts(rules, format, thoughts)
    choices = [f"@{ANSWER}"] if otherwise is Otherwise.ANSWER else []
    if tools:
        choices += _calls(rules, format.tools[0], tools, otherwise, parallel)
    rules.add("start", before, f"({' | '.join(choices)})")
    return str(rules)


def _thoughts(rules: Rules, format: AnswerFormat, thoughts: Thoughts) -> str:
    """Adds what may stand in front; returns how it is referred to."""
    if thoughts is Thoughts.NONE or format.reasoning is None:
        return ""
    opening, closing = format.reasoning
    is_open = thoughts is Thoughts.OPEN
    first = "" if is_open else rules.text(opening)
    name = rules.add("thoughts", first, rules.up_to("thought", closing), BEHIND_THOUGHTS)
    return name if is_open else f"{name}?"


def _calls(
    rules: Rules, shape: CallShape, tools: Sequence[Tool], otherwise: Otherwise, parallel: bool
) -> list[str]:
    """Adds calls, and text where it is allowed; returns what an answer may be."""
    writer = CallWriter(
        rules,
        tools,
        parallel=parallel,
        only_strict=otherwise is not Otherwise.NOTHING,
        beside_text=otherwise is Otherwise.TEXT,
    )
    writer.write(shape)
    marker = shape.markers[0]
    bare = shape if isinstance(shape, JsonCalls) and shape.bare else None
    opening = "" if bare else rules.text(marker)
    calls = joined("block", writer.more(opening))
    if otherwise is not Otherwise.TEXT:
        return [joined(opening, calls)]
    # What begins like a call has to be one, also for the lexer, which takes the longest lexeme.
    beginnings = [_bare_beginning(bare)] if bare else []
    text = rules.without("TEXT", marker, beginnings=beginnings)
    led = rules.up_to("text_and_marker", marker, beginnings=beginnings)
    return [text, joined(f"({led})?" if bare else led, calls)]


def _bare_beginning(shape: JsonCalls) -> str:
    """Returns a pattern of how calls without a marker begin."""
    keys = "|".join((shape.name_key, *shape.argument_keys, *BARE_KEYS))
    return rf'\s*(?:\[\s*)?\{{\s*"(?:{keys})"'
