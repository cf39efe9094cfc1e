"""`jaxserve eval`: table, JSON and picture of one run, and what it refuses before it runs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow

TEXT = "The sky is blue, and the sea is what it sees. " * 4
FLAGS = [
    *("--device", "cpu", "--dtype", "float32", "--step-tokens", "16", "--window", "40"),
    *("--cache-dir", os.environ["JAX_COMPILATION_CACHE_DIR"]),
]


def test_a_run_prints_a_table_and_writes_what_was_asked_for(shell: Any, tmp_path: Path) -> None:
    text, numbers, picture = (tmp_path / name for name in ("a.txt", "a.json", "a.svg"))
    text.write_text(TEXT)
    result = shell(
        *("eval", shell.model, "--text", text, "--settings", "unquantized,kv-int8", *FLAGS),
        *("--json", numbers, "--plot", picture),
    )
    assert result.status == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    plain, cache = (
        next(line for line in lines if line[:1] == [name]) for name in ("unquantized", "kv-int8")
    )
    assert plain[1:3] == ["float32", "float32"]
    assert plain[4:] == ["1", "0.4", "512", "2,097,152"]
    assert cache[1:3] == ["float32", "int8"]
    assert cache[-3:] == ["0.4", "144", "7,456,540"]
    assert [word[0] for word in cache if word.startswith("±")] == ["±", "±"]
    assert f"{len(TEXT):,} bytes of text" in result.out
    assert "156 tokens scored in 4 windows of 40; 24 behind" in result.out
    assert "[kv-int8] 4/4 windows" in result.err

    written = json.loads(numbers.read_text())
    assert (written["windows"], written["scored_tokens"]) == (4, 156)
    first, second = written["settings"]
    assert float(plain[3]) == pytest.approx(first["perplexity"], abs=1e-4)
    assert first["perplexity"] == pytest.approx(math.exp(first["nats_per_token"]))
    ratio = second["perplexity"] / first["perplexity"]
    assert second["against"]["perplexity_ratio"] == pytest.approx(ratio)
    assert float(cache[4]) == pytest.approx(ratio, abs=1e-5)
    assert 0 < second["against"]["kl_mean"] < second["against"]["kl_max"]
    assert second["flags"] == {"quantization": "none", "kv_dtype": "int8"}
    root = ElementTree.fromstring(picture.read_text())
    assert any(each.text == "kv-int8" for each in root)


def test_one_window_has_no_errors_and_says_so(shell: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    result = shell(
        *("eval", shell.model, "--text", tmp_path / "a.txt", "--max-windows", "1", *FLAGS),
        *("--settings", "unquantized,kv-int8"),
    )
    assert result.status == 0, result.err
    assert "no standard errors: they need two windows or more" in result.out
    assert "±" not in result.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "kv-int9"], "there is no setting 'kv-int9'; did you mean kv-int"),
        (["--settings", "unquantized,int8"], "setting 'int8' is refused: "),
        (["--max-windows", "0"], "--max-windows is 0; give 1 or more"),
        (["--plot", "cost.pdf"], "--plot cost.pdf does not end with .svg; the picture is an SVG"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json cannot be written; name a file in"),
        (["--window", "100000"], "--window is 100,000 and the model's context of 512 tokens has"),
        (["--window", "500"], "tokens and a window needs 500; give a longer text, or a smaller"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read: No such file"),
        (["--kv-dtype", "int8"], "unknown flag --kv-dtype"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(
    shell: Any, flags: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    result = shell("eval", shell.model, "--text", tmp_path / "a.txt", *FLAGS, *flags)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.out == ""


def test_a_text_has_to_be_named(shell: Any) -> None:
    result = shell("eval", shell.model)
    assert result.status == 2
    assert "the following arguments are required: --text" in result.err
