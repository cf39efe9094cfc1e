"""Splits an answer that arrives in pieces into content, reasoning and tool calls.

                    +--> reasoning --+
    beginning ------+--> calls ------+--> beginning
                    +--> text --> calls

An answer begins, and so does what follows reasoning or calls: reasoning, and calls that have no
marker, are recognised only there, so that text may speak of them. One engine for every family: an
``AnswerFormat`` says what to look for, ``CallReader`` reads what is behind a tool marker. What is
held back is exactly what could still become a marker, so the result depends on the text alone and
not on its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any

from jaxserve.frontend.parsing.calls import CallReader, Progress
from jaxserve.frontend.parsing.formats import AnswerFormat, CallShape, JsonCalls
from jaxserve.frontend.parsing.json_scanner import SPACE
from jaxserve.frontend.parsing.parts import Content, Part, PartList, Reasoning
from jaxserve.frontend.parsing.reading import automaton


class _Since(Enum):
    """What a beginning stands behind."""

    START = auto()
    REASONING = auto()
    CALLS = auto()


class AnswerParser:
    """One choice's answer. Constant work a character.

    White space between calls, and around markers of reasoning, is dropped; everything else that is
    not a call's own punctuation comes back in some part.
    """

    def __init__(
        self,
        format: AnswerFormat,
        *,
        tools: Mapping[str, Mapping[str, Any] | None] | None = None,
        parses_tools: bool = True,
        parses_reasoning: bool = True,
        in_reasoning: bool = False,
        text_or_calls: bool = False,
    ) -> None:
        """Starts at the beginning of an answer.

        Args:
            format: of the model.
            tools: schema of the parameters (or None) by name. Calls of others are content; with
                none given, every name is a tool.
            parses_tools: otherwise calls are content.
            parses_reasoning: otherwise reasoning is content, with its markers; calls in it are no
                calls either way.
            in_reasoning: the prompt ended behind the marker that opens reasoning.
            text_or_calls: an answer that has begun as text is text to its end.
        """
        self._tools = tools or {}
        self._parts = PartList()
        self._shapes: dict[str, list[CallShape]] = {}
        for shape in format.tools if parses_tools else ():
            self._shapes.setdefault(shape.markers[0], []).append(shape)
        self._bare = [
            shape
            for shapes in self._shapes.values()
            for shape in shapes
            if isinstance(shape, JsonCalls) and shape.bare
        ]
        self._markers = tuple(self._shapes)
        self._markers_in_text = () if text_or_calls else self._markers
        self._open, self._close = format.reasoning or ("", "")
        self._reasoning_kind = Reasoning if parses_reasoning else Content
        self._calls: CallReader | None = None
        self._calls_before = 0
        self._state = 0
        self._held = ""
        """Characters that may be the beginning of a marker."""
        self._space: list[str] = []
        """White space that is dropped or given, by what follows it."""
        self._is_leading = True
        """No reasoning has come behind its marker yet."""
        self._since = _Since.START
        self._read: Callable[[str, int], int] = self._read_beginning
        if self._close and in_reasoning:
            self._read = self._read_reasoning
        elif not (self._open or self._markers):
            self._read = self._read_text

    @property
    def calls(self) -> int:
        """Tool calls that have begun."""
        return self._parts.calls

    @property
    def in_call(self) -> bool:
        """Whether the last of them has not ended."""
        return self._parts.in_call

    def push(self, text: str) -> list[Part]:
        """Takes the next piece and returns what it makes certain."""
        self._advance(text)
        return self._parts.take()

    def finish(self) -> list[Part]:
        """Ends the answer and returns what was held. To be called once, last."""
        while self._calls is not None:
            if self._parts.calls > self._calls_before and not self._parts.in_call:
                self._calls.held.clear()  # Half a mark, which is nothing to a reader.
            self._leave_calls(self._calls)
        held, self._held = self._held, ""
        if self._read == self._read_reasoning:
            self._parts.write(self._reasoning_kind, "".join([*self._space, held]))
        elif held:
            self._begin_text(held)
        elif self._since is _Since.START:
            self._parts.write(Content, "".join(self._space))
        self._space.clear()
        return self._parts.take()

    def _advance(self, text: str) -> None:
        position = 0
        while position < len(text):
            position = self._read(text, position)

    # Readers: each takes text from a position on and returns the position that it got to.

    def _read_beginning(self, text: str, start: int) -> int:
        openings = (self._open, *self._markers) if self._open else self._markers
        for position in range(start, len(text)):
            char = text[position]
            if not self._held and char in SPACE:
                self._space.append(char)
                continue
            if not self._held and self._bare and char in "[{":
                self._go_to_calls("")
                return position
            self._held += char
            if self._held in openings:
                marker, self._held = self._held, ""
                self._enter(marker)
                return position + 1
            if not any(marker.startswith(self._held) for marker in openings):
                # It is text, in which other markers may begin.
                begun, self._held = self._held, ""
                self._begin_text("")
                self._advance(begun)
                return position + 1
        return len(text)

    def _read_text(self, text: str, start: int) -> int:
        if not self._markers_in_text:
            self._parts.write(Content, text[start:])
            return len(text)
        safe, marker, end = self._scan(text, start, self._markers_in_text)
        self._parts.write(Content, safe)
        if marker:
            self._enter(marker)
        return end

    def _read_reasoning(self, text: str, start: int) -> int:
        safe, marker, end = self._scan(text, start, (self._close,))
        if self._reasoning_kind is Content:
            self._parts.write(Content, safe + marker)
        else:
            self._write_reasoning(safe)
        if marker:
            keeps = self._reasoning_kind is Reasoning
            self._begin(_Since.REASONING if keeps else _Since.START)
        return end

    def _read_calls(self, text: str, start: int) -> int:
        calls = self._calls
        assert calls is not None, "calls are read without a reader"
        for position in range(start, len(text)):
            progress = calls.push(text[position])
            if progress is not Progress.MORE:
                self._leave_calls(calls)
                return position + (progress is Progress.DONE)
        return len(text)

    def _scan(self, text: str, start: int, markers: tuple[str, ...]) -> tuple[str, str, int]:
        """Looks for markers.

        Returns:
            Text that belongs to none, the one that follows it if any, and where reading goes on.
        """
        states, state = automaton(markers), self._state
        for position in range(start, len(text)):
            state = states.step(state, text[position])
            if states.found[state]:
                seen = self._held + text[start : position + 1]
                length = len(seen) - states.found[state]
                self._state, self._held = 0, ""
                return seen[:length], seen[length:], position + 1
        seen = self._held + text[start:]
        safe = len(seen) - states.depth[state]
        self._state, self._held = state, seen[safe:]
        return seen[:safe], "", len(text)

    # Changes from one reader to another.

    def _begin(self, since: _Since) -> None:
        self._since = since
        self._space.clear()
        self._read = self._read_beginning

    def _begin_text(self, text: str) -> None:
        """Goes on with text, of which some has been seen."""
        if self._since is not _Since.REASONING:
            self._parts.write(Content, "".join(self._space))
        self._space.clear()
        self._parts.write(Content, text)
        self._since = _Since.START
        self._read = self._read_text

    def _enter(self, marker: str) -> None:
        if marker in self._shapes:
            self._go_to_calls(marker)
            return
        if self._reasoning_kind is Content:
            self._begin_text(marker)
        self._space.clear()
        self._is_leading = True
        self._read = self._read_reasoning

    def _go_to_calls(self, marker: str) -> None:
        shapes = self._shapes[marker] if marker else self._bare
        self._calls_before = self._parts.calls
        self._calls = CallReader(shapes, marker, self._tools, self._parts)
        self._read = self._read_calls

    def _leave_calls(self, calls: CallReader) -> None:
        """Goes on behind calls, or with the text that turned out to be none."""
        held = "".join(calls.held)
        self._calls = None
        if self._parts.calls > self._calls_before:
            self._begin(_Since.CALLS)
            if held.strip(SPACE):
                self._begin_text(held)
            else:
                self._space = list(held)
        elif calls.is_bare:
            # No marker has been looked for in it.
            self._begin_text("")
            self._advance(held)
        else:
            self._begin_text(held)

    def _write_reasoning(self, text: str) -> None:
        """Writes reasoning without the white space at its ends."""
        if self._is_leading:
            text = text.lstrip(SPACE)
            self._is_leading = not text
        body = text.rstrip(SPACE)
        if body:
            self._parts.write(Reasoning, "".join([*self._space, body]))
            self._space.clear()
        self._space.append(text[len(body) :])
