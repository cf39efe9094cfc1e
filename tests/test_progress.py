"""Progress for people: bars on a terminal or in a notebook, few lines elsewhere."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any

import pytest

from jaxserve.progress import (
    NotebookBars,
    Progress,
    ProgressBars,
    ProgressLines,
    bars_html,
    show_count,
    show_progress,
    show_to_person,
)
from jaxserve.testing import ManualClock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stage_has_its_first_and_last_line_and_one_every_two_seconds() -> None:
    clock, file = ManualClock(), io.StringIO()
    progress = ProgressLines(file, clock)
    for done in range(11):
        progress("compile", done, 10, f"program {done}")
        clock.advance(0.7)
    assert file.getvalue().splitlines() == [
        "[compile] 0/10 program 0",
        "[compile] 3/10 program 3",
        "[compile] 6/10 program 6",
        "[compile] 9/10 program 9",
        "[compile] 10/10 program 10 (done in 7.0 s)",
    ]


def test_millions_are_bytes() -> None:
    assert show_count(3, 14) == "3/14"
    assert show_count(513 * 2**20, 513 * 2**20) == "513/513 MiB"


def test_stages_do_not_silence_each_other() -> None:
    file = io.StringIO()
    with ProgressLines(file, ManualClock()) as progress:
        progress("weights", 0, 5, "a.gguf")
        progress("compile", 0, 3, "")
        progress("ready", 1, 1, "3.0 s")
    assert file.getvalue() == "[weights] 0/5 a.gguf\n[compile] 0/3\n[ready] 3.0 s\n"


def test_bars_show_every_stage_and_take_markup_for_text() -> None:
    file = Terminal()
    with ProgressBars(file) as progress:
        progress("compile", 1, 4, "decode [bold]4x1[/bold]")
        progress("compile", 4, 4, "decode [bold]16x1[/bold]")
    text = file.getvalue()
    assert "compile" in text
    assert "4/4" in text
    assert "[bold]16x1[/bold]" in text
    progress.close()


def test_only_a_terminal_gets_bars() -> None:
    with show_progress(Terminal()) as progress:
        assert isinstance(progress, ProgressBars)
    assert isinstance(show_progress(io.StringIO()), ProgressLines)


def test_nobody_watching_gets_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert type(show_to_person(None)) is Progress
    assert type(show_to_person(False)) is Progress
    assert isinstance(show_to_person(True), ProgressLines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with show_to_person(None) as progress:
        assert isinstance(progress, ProgressBars)
    Progress()("stage", 0, 1, "is not shown")


class Display:
    """Stands in for IPython's display: keeps what is shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def __call__(self, html: str, *, display_id: bool) -> Display:
        assert display_id
        self.update(html)
        return self

    def update(self, html: str) -> None:
        self.shown.append(html)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    display = Display()
    module: Any = ModuleType("IPython.display")
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    return display


def test_a_notebook_gets_one_output_that_changes(notebook: Display) -> None:
    clock = ManualClock()
    progress = NotebookBars(clock)
    progress("compile", 0, 3, "")
    progress("compile", 1, 3, "too soon to draw")
    clock.advance(0.2)
    progress("compile", 2, 3, "drawn")
    progress("compile", 3, 3, "the end")
    assert len(notebook.shown) == 4
    assert 'value="3" max="3"' in notebook.shown[-1]
    with show_to_person(None) as progress:
        assert isinstance(progress, NotebookBars)
    assert type(show_to_person(False)) is Progress


def test_bars_of_a_notebook_escape_what_they_show() -> None:
    text = bars_html({"weights": (1, 2, "<b>"), "ready": (1, 1, "")})
    assert "&lt;b&gt;" in text
    assert text.count("<progress ") == 2
