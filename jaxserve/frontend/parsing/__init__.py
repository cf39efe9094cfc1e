"""Splits an answer's text into content, reasoning and tool calls, and writes grammars for these.

``choose_format`` finds out how a model writes; ``AnswerParser`` reads that as it streams in,
``answer_grammar`` makes the model write it. Nothing here knows of tokens, requests or protocols.
"""

from jaxserve.frontend.parsing.call_grammar import Tool
from jaxserve.frontend.parsing.families import FORMATS, PLAIN, choose_format
from jaxserve.frontend.parsing.formats import AnswerFormat, JsonCalls, NamedCalls, TaggedCalls
from jaxserve.frontend.parsing.grammar import ANSWER, Otherwise, Thoughts, answer_grammar
from jaxserve.frontend.parsing.parser import AnswerParser
from jaxserve.frontend.parsing.parts import (
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallEnded,
    ToolCallStarted,
)

__all__ = [
    "ANSWER",
    "FORMATS",
    "PLAIN",
    "AnswerFormat",
    "AnswerParser",
    "Content",
    "JsonCalls",
    "NamedCalls",
    "Otherwise",
    "Part",
    "Reasoning",
    "TaggedCalls",
    "Thoughts",
    "Tool",
    "ToolCallArguments",
    "ToolCallEnded",
    "ToolCallStarted",
    "answer_grammar",
    "choose_format",
]
