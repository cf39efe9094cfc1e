"""`jaxserve quantize`: what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.calibration import Found
from jaxserve.cli.quantize import FORMATS, describe
from jaxserve.quantize import FORMATS as ALL
from jaxserve.quantize import Rounded


def test_a_line_for_each_layer_and_what_was_written() -> None:
    done = Rounded(
        path=Path("out"),
        file_bytes=12_345,
        parameters=1_500_000,
        formats={"w_qkv": "int4/64", "embed": "int8"},
        layers=[
            [Found("w_qkv", 0.4, 0.08, 0.05, np.ones(3)), Found("w_o", 0.0, 0.1, 0.1, np.ones(3))]
        ],
        layer_seconds=[2.5],
        calibration_tokens=4096,
        seconds=9.0,
    )
    assert describe(done) == [
        "error of each output, rounded as it is -> with scales of mean|x|^a, on 4096 tokens:",
        "  layer 0: w_qkv 0.0800 -> 0.0500 (a=0.4), w_o 0.1000 -> 0.1000 (a=0.0), 2.5 s",
        "wrote out: 12,345 bytes, 1.5M parameters, int4/64+int8, in 9.0 s",
    ]
    assert FORMATS == ALL


def test_errors_are_one_line(shell: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    out = str(tmp_path / "out")
    result = shell("quantize", "dummy:smollm2-135m", out, "--calibration", str(empty))
    assert result.status == 2
    assert "empty.txt gives 0 tokens and at least 256 are needed" in result.err
    result = shell("quantize", "dummy:smollm2-135m", out, "--calibration-tokens", "300")
    assert result.status == 2
    assert "--calibration-tokens is given and --calibration is not" in result.err
