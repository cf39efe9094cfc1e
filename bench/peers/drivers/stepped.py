"""The loop around an engine in this process whose caller drives every step."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from bench.peers.protocol import Question, Reply


class Stepped(ABC):
    """Clients are a number of requests that may be under way, so no client's work is counted."""

    version = ""

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self._number = 0

    @abstractmethod
    def submit(self, key: str, question: Question) -> None:
        """Hands a request over."""

    @abstractmethod
    def step(self) -> Iterable[tuple[str, Sequence[int], bool]]:
        """Computes; yields key, new tokens and whether that was the end."""

    def ask(self, questions: Sequence[Question], clients: int | None) -> list[Reply]:
        """As ``Driver.ask``."""
        waiting = deque(questions)
        replies: list[Reply] = []
        live: dict[str, Reply] = {}

        def fill() -> None:
            while waiting and len(live) < (clients or len(questions)):
                self._number += 1
                key = str(self._number)
                live[key] = Reply(time.perf_counter())
                replies.append(live[key])
                self.submit(key, waiting.popleft())

        fill()
        while live:
            for key, ids, is_finished in self.step():
                reply = live[key]
                reply.note(ids, time.perf_counter())
                if is_finished:
                    reply.end_s = time.perf_counter()
                    del live[key]
            fill()
        return replies

    def close(self) -> None:  # noqa: B027
        """Leaves the engine to the end of the process, unless there is more to do."""


def as_ids(values: Any) -> list[int]:
    """Returns plain integers, which JSON can carry."""
    return [int(value) for value in values]
