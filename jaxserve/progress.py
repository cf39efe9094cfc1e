"""What a person sees while something takes long: bars on a terminal, a few lines elsewhere.

A ``Progress`` is called like ``launch.Report``: ``progress(stage, done, total, detail)``, from any
thread. What is being done, and how far it is, is other modules' knowledge.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, Self, TextIO

LINE_INTERVAL_S = 2.0
"""Between two lines of one stage, so that a log stays readable."""


class Progress(Protocol):
    """Something that shows progress until it is closed."""

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Shows how far a stage is."""
        ...

    def close(self) -> None:
        """Stops showing; safe to call again."""
        ...

    def __enter__(self) -> Self:
        """Returns itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Closes."""
        ...


class _Closing:
    def close(self) -> None:
        """Stops showing; safe to call again."""

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()


class NoProgress(_Closing):
    """Shows nothing."""

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Does nothing."""


class ProgressLines(_Closing):
    """One line at the start and the end of a stage, and now and then between."""

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Writes to ``file``."""
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._last_s: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Writes a line unless the stage has just had one."""
        now = self._clock()
        with self._lock:
            last = self._last_s.get(stage)
            if last is not None and done < total and now - last < LINE_INTERVAL_S:
                return
            self._last_s[stage] = now
            count = f"{done}/{total} " if total > 1 else ""
            print(f"[{stage}] {count}{detail}".rstrip(), file=self._file, flush=True)


class ProgressBars(_Closing):
    """One bar per stage."""

    def __init__(self, file: TextIO) -> None:
        """Draws on ``file``, a terminal."""
        # Imported here: a tenth of a second that commands without bars do not spend.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress as RichProgress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._bars = RichProgress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(file=file),
        )
        self._bars.start()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Moves the stage's bar."""
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, detail=detail)
            self._bars.update(self._tasks[stage], completed=done, total=total, detail=detail)

    def close(self) -> None:
        """Draws the bars for the last time."""
        self._bars.stop()


def show_progress(file: TextIO | None = None) -> Progress:
    """Returns bars when ``file`` (default stderr) is a terminal, lines otherwise."""
    file = sys.stderr if file is None else file
    return ProgressBars(file) if file.isatty() else ProgressLines(file)


def show_to_person(wanted: bool | None) -> Progress:
    """Returns what a library may show: to a person at a terminal or a notebook, nothing in a log.

    Args:
        wanted: True or False decide; None finds out whether somebody is watching.
    """
    if wanted is None:
        wanted = sys.stderr.isatty() or "ipykernel" in sys.modules
    return show_progress() if wanted else NoProgress()
