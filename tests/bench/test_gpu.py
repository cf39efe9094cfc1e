"""The benchmark of one GPU: its parts at tiny sizes on a CPU, and what becomes of a failing one."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.gpu import report
from bench.gpu.__main__ import DRY_ENVIRONMENT, main
from bench.gpu.part import PARTS, WHOLE_S, Number, Part
from bench.gpu.process import PROBE_S, Outcome, run_part
from bench.gpu.traces import (
    Arrival,
    asks_of,
    read_trace,
    scale_to,
    trace_files,
    window,
    write_examples,
)

PARTS_MODULE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from bench.gpu.part import Number

def good(setting):
    yield Number("left", setting.left_s, "s", limit=1.0)

def hang(setting):
    yield Number("before", 1.0, "s")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(setting.cache_dir, "grandchild").write_text(str(child.pid))
    time.sleep(600)

def fail(setting):
    yield Number("before", 1.0, "s")
    raise RuntimeError("no luck")

def die(setting):
    yield Number("before", 1.0, "s")
    os.kill(os.getpid(), signal.SIGKILL)

def find_nothing(setting):
    yield from ()

def not_finite(setting):
    yield Number("division", float("nan"), "s")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one of the parts above."""
    (tmp_path / "some_parts.py").write_text(PARTS_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setting = {"dry": True, "device_kind": "cpu", "cache_dir": str(tmp_path), "traces": None}

    def run(name: str, budget_s: float = 30.0) -> Outcome:
        part = Part(name, budget_s, f"some_parts:{name}")
        return run_part(part, setting, budget_s=budget_s, environment=DRY_ENVIRONMENT)

    return run


# -- a part in its process -------------------------------------------------------------------------


def test_a_part_gives_its_numbers(run: Any) -> None:
    outcome = run("good", 20.0)
    assert outcome.status == "ok"
    (number,) = outcome.numbers
    assert 0 < number["value"] < 20
    assert number["share_of_limit"] == pytest.approx(1 / number["value"], rel=0.01)


def test_a_part_that_hangs_is_killed_at_its_budget_with_its_children(
    run: Any, tmp_path: Path
) -> None:
    start_s = time.monotonic()
    outcome = run("hang", 12.0)  # Of which a busy machine takes several to start a process.
    assert time.monotonic() - start_s < 28
    assert outcome.status == "failed"
    assert outcome.reason == "killed at its budget of 12 s, with 1 numbers found"
    assert [number["name"] for number in outcome.numbers] == ["before"]
    grandchild = int((tmp_path / "grandchild").read_text())
    ends_s = time.monotonic() + 10
    while is_running(grandchild):  # Signalled with its parent, but nobody waits for it to end.
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def is_running(process_id: int) -> bool:
    """A zombie that nobody has waited for does not run."""
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "reason", "found"),
    [
        ("fail", "RuntimeError: no luck", 1),
        ("die", "ended by signal SIGKILL; out of memory is the usual cause", 1),
        ("find_nothing", "found no number", 0),
        ("not_finite", "ValueError: division is nan s", 0),
        ("missing", "AttributeError: module 'some_parts' has no attribute 'missing'", 0),
    ],
)
def test_a_part_that_fails_says_why_and_keeps_what_it_found(
    run: Any, name: str, reason: str, found: int
) -> None:
    outcome = run(name)
    assert outcome.status == "failed"
    assert outcome.reason == reason
    assert len(outcome.numbers) == found
    assert json.dumps(outcome.as_json())


def test_the_budgets_leave_room_within_the_whole() -> None:
    to_end_processes_s = 10
    assert sum(part.budget_s for part in PARTS) + to_end_processes_s <= WHOLE_S < 9 * 60
    assert max(Counter(part.name for part in PARTS).values()) == 1
    assert PROBE_S < WHOLE_S


@pytest.mark.parametrize(
    ("number", "share"),
    [
        (Number("rate", 2.0, "GB/s", 4.0), 0.5),
        (Number("time", 4.0, "ms", 1.0), 0.25),
        (Number("difference", 0.001, "error", 0.01), 0.1),
        (Number("no difference", 0.0, "error", 0.01), None),
        (Number("unlimited", 2.0, "ms"), None),
    ],
)
def test_a_share_is_of_what_is_best(number: Number, share: float | None) -> None:
    assert number.share == (share if share is None else pytest.approx(share))


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.wide
def test_a_dry_run_finds_a_finite_number_in_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part, in its own process, as on a GPU but at tiny sizes."""
    out, start_s = tmp_path / "gpu.json", time.monotonic()
    code = main(["--dry-run", "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert time.monotonic() - start_s < 180
    document = json.loads(out.read_text())
    assert list(document["parts"]) == [part.name for part in PARTS]
    for name, part in document["parts"].items():
        assert part["status"] == "ok", (name, part["reason"])
        assert part["numbers"], name
        assert all(math.isfinite(number["value"]) for number in part["numbers"]), name
        assert name in said.out
    assert {"date", "commit", "device", "versions", "machine"} <= document.keys()


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.__main__.probe", lambda environment: {"platform": "cpu"})
    assert main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_a_replay_without_traces_says_that_it_was_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"platform": "gpu", "device": "NVIDIA H200"}
    monkeypatch.setattr("bench.gpu.__main__.probe", lambda environment: found)
    out = tmp_path / "gpu.json"
    assert main(["--out", str(out), "--parts", "replay", "--commit", "abc"]) == 0
    document = json.loads(out.read_text())
    assert document["commit"] == "abc"
    assert document["parts"]["replay"]["status"] == "not asked"
    assert document["parts"]["replay"]["reason"] == "no --traces FOLDER was given"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give --out FILE"),
        (["--out", "x", "--parts", "decode_1b,lunch"], "there is no part lunch"),
        (["--out", "x", "--traces", "/nowhere"], "--traces /nowhere is no folder"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert problem in capsys.readouterr().err


# -- two files beside each other -------------------------------------------------------------------


def document(**changes: Any) -> dict[str, Any]:
    number = {"name": "step", "value": 2.0, "unit": "ms", "limit": 1.0, "share_of_limit": 0.5}
    part = {"status": "ok", "reason": "", "numbers": [number]}
    header = {"date": "2026-11-22", "commit": "a", "device": "NVIDIA H200"}
    return {"bench": "gpu", "dry_run": False, **header, "parts": {"decode": part}, **changes}


def test_two_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster = {"name": "step", "value": 1.6, "unit": "ms", "limit": 1.0, "share_of_limit": 0.625}
    more = {"name": "more", "value": 1.0, "unit": "ms"}
    parts = {"decode": {"numbers": [faster]}, "prefill": {"numbers": [more]}}
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    report.write(document(), before)
    report.write(document(commit="b", parts=parts), after)
    compare.main([str(before), str(after)])
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "decode step ms 2 1.6 0.800 50.0 % -> 62.5 %"
    assert lines[2:] == [
        "note: commit is a before and b after",
        "note: parts with numbers in one of them only: prefill",
    ]


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, dry, other = (tmp_path / name for name in ("good", "dry", "other"))
    report.write(document(), good)
    report.write(document(dry_run=True), dry)
    other.write_text('{"workload": {}}\n{"workload": {}}\n')
    for pair, problem in (((good, dry), "a dry run"), ((good, other), "only one of")):
        with pytest.raises(SystemExit):
            compare.main([str(path) for path in pair])
        assert problem in capsys.readouterr().err


def test_the_table_says_what_failed() -> None:
    failed = {"status": "failed", "reason": "no luck", "numbers": []}
    text = report.table(document(parts={**document()["parts"], "start": failed}))
    header, row, note = text.splitlines()
    assert header.split("  ")[0] == "part"
    assert " ".join(row.split()) == "decode step 2 ms 1 50.0 %"
    assert note == "start failed: no luck"


# -- recorded traffic ------------------------------------------------------------------------------


def test_both_formats_of_traces_are_read(tmp_path: Path) -> None:
    write_examples(tmp_path)
    table, lines = map(read_trace, trace_files(tmp_path))
    assert [arrival.prompt_tokens for arrival in table] == [40, 41, 42, 43]
    assert [later.at_s - table[0].at_s for later in table] == pytest.approx([0, 1, 2, 3])
    assert lines[1] == Arrival(0.3, 1100, 60, (0, 1, 3))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither \.csv nor \.jsonl"):
        trace_files(tmp_path)
    (tmp_path / "empty.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    (tmp_path / "other.jsonl").write_text('{"when": 1}\n')
    with pytest.raises(ValueError, match=r"empty\.csv holds no request"):
        read_trace(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match=r"other\.jsonl has no 'timestamp'"):
        read_trace(tmp_path / "other.jsonl")


def test_a_window_begins_in_the_middle_and_keeps_the_gaps() -> None:
    arrivals = [Arrival(at_s, 10, 1) for at_s in (0.0, 50.0, 60.0, 61.5, 64.0)]
    assert [arrival.at_s for arrival in window(arrivals, 3.0)] == [0.0, 1.5]


def test_scaled_requests_fit_and_share_the_prefixes_that_their_hashes_share() -> None:
    arrivals = [Arrival(0, 1200, 80, (7, 8, 9)), Arrival(0, 1536, 0, (7, 8, 10)), Arrival(0, 9, 9)]
    scale = scale_to(arrivals, 384)
    assert scale == 0.25
    first, second, third = asks_of(arrivals, scale, vocab_size=512, seed=1)
    assert [len(ask.prompt) for ask in (first, second, third)] == [300, 384, 2]
    assert [ask.output_tokens for ask in (first, second, third)] == [20, 1, 2]
    assert first.prompt[:256] == second.prompt[:256]
    assert first.prompt[256:300] != second.prompt[256:300]
    assert first.prompt[:128] != first.prompt[128:256], "each hash has its own tokens"
