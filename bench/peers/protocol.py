"""What the two ends of a child's pipe say to each other: one JSON object a line.

    child    {"ready": {"version": ..., "process_id": ...}}
    parent   {"ask": [[[ids of a prompt], output_tokens], ...], "clients": 32 or null}
    child    {"replies": [a Reply, ...]}
    parent   {"stop": true}

or, from the child at any time, ``{"error": "..."}`` as its last line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class Reply:
    """What one request got, on the clock of ``time.perf_counter`` of the child."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list[float])
    """When each message with tokens came."""
    ids: list[int] = field(default_factory=list[int])
    end_s: float = 0.0

    def note(self, ids: Sequence[int], now_s: float) -> None:
        """Takes tokens that came just now; none is no message."""
        if ids:
            self.arrivals_s.append(now_s)
            self.ids += ids
            self.end_s = now_s


@dataclass(frozen=True)
class Question:
    """One request: greedy, past end tokens."""

    prompt: list[int]
    output_tokens: int


class Driver(Protocol):
    """One engine, loaded when it is made."""

    version: str
    process_id: int
    """The root of the processes that are the engine; a client beside it is not."""

    def ask(self, questions: Sequence[Question], clients: int | None) -> list[Reply]:
        """Sends all at once, or by so many closed-loop clients; replies in the order sent."""
        ...

    def close(self) -> None:
        """Ends what was started; called once."""
        ...


def question_lines(questions: Sequence[Question], clients: int | None) -> dict[str, Any]:
    """Returns what the parent sends."""
    return {"ask": [[one.prompt, one.output_tokens] for one in questions], "clients": clients}
