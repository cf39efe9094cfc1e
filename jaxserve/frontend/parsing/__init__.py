"""Splits an answer's text into content, reasoning and tool calls, and writes grammars for these.

``choose_format`` finds out how a model writes; ``AnswerParser`` reads that as it streams in,
``tool_grammar`` makes the model write it. Nothing here knows of tokens, requests or protocols.
"""

from jaxserve.frontend.parsing.families import FORMATS, PLAIN, choose_format
from jaxserve.frontend.parsing.formats import AnswerFormat, JsonCalls, NamedCalls, TaggedCalls
from jaxserve.frontend.parsing.grammar import Tool, tool_grammar
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
    "FORMATS",
    "PLAIN",
    "AnswerFormat",
    "AnswerParser",
    "Content",
    "JsonCalls",
    "NamedCalls",
    "Part",
    "Reasoning",
    "TaggedCalls",
    "Tool",
    "ToolCallArguments",
    "ToolCallEnded",
    "ToolCallStarted",
    "choose_format",
    "tool_grammar",
]
