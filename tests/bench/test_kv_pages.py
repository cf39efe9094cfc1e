"""What ``bench.kv_pages`` says of two formats, worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import kv_pages
from bench.kv_pages import Scored

BASE = Scored("bf16", [1, 2, 3, 4, 5, 6], [4.0, 8.0], [[7, 8], [9, 9]], 1.0)
"""Two prompts of four tokens, of which three each are scored."""


def test_a_line_compares_places_prompts_and_answers() -> None:
    other = Scored("int8", [1, 2, 0, 4, 5, 6], [4.3, 8.6], [[7, 8], [9, 1]], 2.0)
    line = other.line(BASE, 6)
    assert line["same_likeliest"] == round(5 / 6, 5)
    assert line["perplexity"] == round(math.exp(12.9 / 6), 4)
    # A token costs 0.1 nats more in the first prompt and 0.2 in the second.
    assert line["perplexity_ratio"] == round(math.exp(0.15), 5)
    assert line["perplexity_ratio_error"] == round(0.1 / 2, 5)
    assert (line["same_answers"], line["answers_alike_until"]) == (0.5, 0.75)
    assert (line["prompts"], line["places"], line["compared_with"]) == (2, 6, "bf16")


@pytest.mark.parametrize(
    ("formats", "remedy"),
    [("int8", "bf16,int8"), ("int8,bf16", "bf16,int8"), ("fp8,int8,int4", "bf16,fp8,int8,int4")],
)
def test_int8_without_what_it_is_gated_against_is_refused(
    formats: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        kv_pages.main(["--formats", formats])
    said = f"--formats is {formats}: int8 is gated against bf16, which comes first; give --formats "
    assert f"{said}{remedy}" in capsys.readouterr().err


def test_other_formats_need_no_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kv_pages, "_measure", lambda *_: BASE)
    text, out = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text("words")
    assert kv_pages.main(["--formats", "fp8", "--out", str(out), str(text)]) == 0
    assert "gate" not in json.loads(out.read_text())


@pytest.mark.parametrize(
    ("likeliest", "nats", "status"),
    [
        ([1, 2, 3, 4, 5, 6], [4.0, 8.0], 0),
        ([1, 2, 3, 4, 5, 0], [4.0, 8.0], 1),
        ([1, 2, 3, 4, 5, 6], [4.0, 8.1], 1),
    ],
)
def test_int8_that_misses_its_gate_is_the_exit_status(
    likeliest: list[int],
    nats: list[float],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    measured = {"bf16": BASE, "int8": Scored("int8", likeliest, nats, [], 1.0)}
    monkeypatch.setattr(kv_pages, "_measure", lambda name, *_: measured[name])
    text, out = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text("words")
    words = ["--formats", "bf16,int8", "--answer-tokens", "0", "--out", str(out), str(text)]
    measured["bf16"] = Scored("bf16", BASE.likeliest, BASE.prompt_nats, [], 1.0)
    assert kv_pages.main(words) == status
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["format"] for line in lines] == ["bf16", "int8"]
    assert lines[1]["gate"] == ("missed" if status else "passed")
    assert "same_answers" not in lines[1]
