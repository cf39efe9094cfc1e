"""What reads text that is sent one character at a time, and holds what is not accounted for.

The tools of ``calls.py``: generators that read one small thing, and writing to the answer's parts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import lru_cache
from typing import Any

from jaxserve.frontend.parsing.json_scanner import SPACE, JsonScanner
from jaxserve.frontend.parsing.parts import PartList, ToolCallArguments
from jaxserve.frontend.text import StopAutomaton

MAX_NAME_CHARS = 256
"""Names of tools and parameters, with what stands around these. APIs allow 64."""
MAX_HELD_CHARS = 262_144
"""Arguments in front of their name and values that are no strings are held; this bounds that."""

type Reader[T] = Generator[None, str, T]
type Tools = Mapping[str, Mapping[str, Any] | None]


class NotACallError(ValueError):
    """The last character makes this no tool call, or ends it. Never leaves the parser."""


class Reading:
    """Characters that are held, and the parts that account for them."""

    def __init__(self, opening: str, tools: Tools, parts: PartList) -> None:
        self.held: list[str] = list(opening)
        """Characters that are not accounted for in the parts, the last one among them."""
        self._tools = tools
        self._parts = parts

    def _check(self, name: str) -> None:
        # Half a character, which JSON can write, could not be sent on.
        if not name or not name.isprintable() or (self._tools and name not in self._tools):
            raise NotACallError

    def _start(self, name: str) -> None:
        self._parts.start_call(name)
        self.held.clear()

    def _argument(self, text: str) -> None:
        """Writes a piece of the arguments, which accounts for all that was read."""
        self._parts.write(ToolCallArguments, text)
        self.held.clear()

    def _whole_call(self, name: str, arguments: str) -> None:
        self._start(name)
        self._argument(arguments)
        self._parts.end_call()

    def _arguments(self, scanner: JsonScanner, *, depth: int = 1) -> Reader[None]:
        """Passes on a JSON object behind its brace, until it is only ``depth`` deep again."""
        self._argument("{")
        while scanner.depth > depth:
            char = yield
            scanner.push(char)
            self._argument(char)
        self._parts.end_call()

    def _skip_space(self) -> Reader[str]:
        while True:
            char = yield
            if char not in SPACE:
                return char

    def _choice(self, options: tuple[str, ...], text: str = "") -> Reader[str]:
        """Reads one of some texts, behind white space; ``text`` of it has been read."""
        text = text or (yield from self._skip_space())
        while text not in options:
            if not any(option.startswith(text) for option in options):
                raise NotACallError
            text += yield
        return text

    def _until(self, ends: tuple[str, ...], text: str = "") -> Reader[tuple[str, str]]:
        """Reads a short text and what ends it; ``text`` of it has been read."""
        states = automaton(ends)
        state = 0
        for char in text:
            state = states.step(state, char)
        while not states.found[state]:
            if len(text) - states.depth[state] > MAX_NAME_CHARS:
                raise NotACallError
            char = yield
            state = states.step(state, char)
            text += char
        length = len(text) - states.found[state]
        return text[:length], text[length:]


@lru_cache(maxsize=64)
def automaton(texts: tuple[str, ...]) -> StopAutomaton:
    """Returns what finds any of some texts; shared, and never written once built."""
    return StopAutomaton(texts)
