"""What a person sees while something takes long: bars on a terminal, a few lines elsewhere.

A ``Progress`` is called like ``launch.Report``: ``progress(stage, done, total, detail)``, from any
thread. What is being done, and how far it is, is other modules' knowledge.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

LINE_INTERVAL_S = 2.0
"""Between two lines of one stage, so that a log stays readable."""


class Progress:
    """Shows nothing; what the others do, they do until they are closed."""

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Shows how far a stage is."""

    def close(self) -> None:
        """Stops showing; safe to call again."""

    def __enter__(self) -> Progress:
        """The block's value is this object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()


class ProgressLines(Progress):
    """One line at the start and the end of a stage, and now and then between."""

    def __init__(self, file: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """Writes to ``file``, any text file."""
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._start_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Writes a line unless the stage has just had one."""
        now = self._clock()
        with self._lock:
            is_first = stage not in self._start_s
            start_s = self._start_s.setdefault(stage, now)
            done_now = done >= total
            if not (is_first or done_now or now - self._last_s[stage] >= LINE_INTERVAL_S):
                return
            self._last_s[stage] = now
            count = f"{show_count(done, total)} " if total > 1 else ""
            took = f" (done in {now - start_s:.1f} s)" if done_now and not is_first else ""
            print(f"[{stage}] {count}{detail}".rstrip() + took, file=self._file, flush=True)


class ProgressBars(Progress):
    """One bar per stage."""

    def __init__(self, file: Any) -> None:
        """Draws on ``file``, a terminal."""
        # Imported here: a tenth of a second that commands without bars do not spend.
        from rich import progress
        from rich.console import Console

        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._bars = progress.Progress(
            progress.TextColumn("{task.description:12}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[count]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[detail]}", markup=False),
            console=Console(file=file),
        )
        self._bars.start()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Moves the stage's bar."""
        with self._lock:
            shown: dict[str, Any] = {"detail": detail, "count": show_count(done, total)}
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, **shown)
            self._bars.update(self._tasks[stage], completed=done, total=total, **shown)

    def close(self) -> None:
        """Draws the bars for the last time."""
        self._bars.stop()


class NotebookBars(Progress):
    """One bar per stage, in the output of a notebook's cell."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes a place in the output."""
        from IPython.display import HTML, display

        self._html = HTML
        self._handle: Any = display(HTML(""), display_id=True)
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: dict[str, tuple[int, int, str]] = {}
        self._last_s = 0.0

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Moves the stage's bar; draws at most ten times a second."""
        with self._lock:
            self._stages[stage] = (done, total, detail)
            if done >= total or self._clock() - self._last_s >= 0.1:
                self._last_s = self._clock()
                self._handle.update(self._html(bars_html(self._stages)))


def bars_html(stages: Mapping[str, tuple[int, int, str]]) -> str:
    """Returns a line with a bar for each stage: (done, total, detail)."""
    return "".join(
        f'<div><code>{html.escape(stage):12}</code> <progress value="{done}" max="{total}">'
        f"</progress> {show_count(done, total)} <small>{html.escape(detail)}</small></div>"
        for stage, (done, total, detail) in stages.items()
    )


def show_count(done: int, total: int) -> str:
    """Returns how far something is. Nothing but bytes comes in millions here.

    >>> show_count(3, 14), show_count(2**20, 5 * 2**20)
    ('3/14', '1/5 MiB')
    """
    if total < 2**20:
        return f"{done}/{total}"
    return f"{done / 2**20:.0f}/{total / 2**20:.0f} MiB"


def show_progress(file: Any = None) -> Progress:
    """Returns bars when ``file`` (default stderr) is a terminal, lines otherwise."""
    stream = file or sys.stderr
    return ProgressBars(stream) if stream.isatty() else ProgressLines(stream)


def show_to_person(wanted: bool | None) -> Progress:
    """Returns what a library may show: to a person at a terminal or a notebook, nothing in a log.

    Args:
        wanted: True or False decide; None finds out whether somebody is watching.
    """
    in_notebook = "ipykernel" in sys.modules
    if not (in_notebook or sys.stderr.isatty() if wanted is None else wanted):
        return Progress()
    return NotebookBars() if in_notebook else show_progress()
