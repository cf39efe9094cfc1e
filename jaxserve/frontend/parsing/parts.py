"""What an answer is made of, and the list that pieces of it are gathered in.

Pieces come character by character from the readers; ``PartList`` joins those that belong together,
so that a push gives back few parts however it was read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of what the user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought first."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A tool is being called; its arguments follow."""

    index: int
    """Counts the calls of this answer from 0."""
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of the arguments object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnded:
    """The arguments are complete. A call that was cut off or broke has none of these."""

    index: int


Part = Content | Reasoning | ToolCallStarted | ToolCallArguments | ToolCallEnded


class PartList:
    """Gathers parts until they are taken, and counts the answer's tool calls."""

    def __init__(self) -> None:
        self.calls = 0
        """Tool calls started so far."""
        self.in_call = False
        """The last of them has not ended."""
        self._parts: list[Part] = []
        self._kind: type[Content | Reasoning | ToolCallArguments] = Content
        self._texts: list[str] = []

    def write(self, kind: type[Content | Reasoning | ToolCallArguments], text: str) -> None:
        """Adds text to the part that is being written; arguments are those of the last call."""
        if kind is not self._kind:
            self._close()
            self._kind = kind
        self._texts.append(text)

    def start_call(self, name: str) -> None:
        """Begins the next tool call."""
        self._close()
        self._parts.append(ToolCallStarted(self.calls, name))
        self.calls += 1
        self.in_call = True

    def end_call(self) -> None:
        """Ends the last tool call."""
        self._close()
        self._parts.append(ToolCallEnded(self.calls - 1))
        self.in_call = False

    def take(self) -> list[Part]:
        """Returns what was gathered since the last time."""
        self._close()
        parts, self._parts = self._parts, []
        return parts

    def _close(self) -> None:
        text = "".join(self._texts)
        self._texts.clear()
        if not text:
            return
        if self._kind is ToolCallArguments:
            self._parts.append(ToolCallArguments(self.calls - 1, text))
        elif self._kind is Reasoning:
            self._parts.append(Reasoning(text))
        else:
            self._parts.append(Content(text))
