"""Records of searched tilings: what cannot be used is passed over, and tracing goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import mosaic_config as attention
from pallas_kernels.quantized_matmul import mosaic_config as matmul
from pallas_kernels.searched import read_record

KIND = "NVIDIA H200"
GOOD: dict[ModuleType, tuple[Any, dict[str, int]]] = {
    attention: (
        attention.Problem(128, 4, 64, jnp.dtype("int8"), one_query=True),
        {"tiles": 1, "columns": 1, "tile_keys": 128, "stages": 3, "query_stages": 1},
    ),
    matmul: (
        matmul.Problem(3, 4096, 4096, 32, jnp.int4, jnp.bfloat16, True, jnp.float16),
        {"tokens": 8, "depth": 128, "rows": 1, "chains": 2, "parts": 4, "stages": 4},
    ),
}
UNUSABLE: dict[str, Any] = {
    "a field is unknown": lambda found: found | {"warps": 4},
    "a field is missing": lambda found: dict(list(found.items())[1:]),
    "the device's field is recorded": lambda found: found | {"blocks": 3, "programs": 3},
    "a number is a text": lambda found: found | {"stages": "4"},
    "a number is a fraction": lambda found: found | {"stages": 4.0},
    "a number is a truth": lambda found: found | {"stages": True},
    "a number is null": lambda found: found | {"stages": None},
    "a number is zero": lambda found: dict.fromkeys(found, 0),
    "a number is negative": lambda found: found | {"stages": -4},
    "no object": lambda found: list(found.values()),
}


@pytest.fixture(params=GOOD, ids=["paged_attention", "quantized_matmul"])
def family(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ModuleType]:
    """A family whose record is in ``tmp_path``, and read anew."""
    module: ModuleType = request.param
    monkeypatch.setattr(module, "RECORD", tmp_path / "configs.json")
    module._recorded.cache_clear()
    yield module
    module._recorded.cache_clear()


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE)
def test_a_tiling_that_cannot_be_used_is_passed_over(family: ModuleType, spoil: Any) -> None:
    problem, good = GOOD[family]
    family.RECORD.write_text(json.dumps({KIND: {problem.key: spoil(good)}}))
    assert family.best_known(problem, KIND) is None


def test_a_good_tiling_is_used(family: ModuleType) -> None:
    problem, good = GOOD[family]
    family.RECORD.write_text(json.dumps({KIND: {problem.key: good}}))
    assert family.best_known(problem, KIND) is not None


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"NVIDIA H200": [1]}', "\ufffe"])
def test_a_record_that_cannot_be_read_is_passed_over(family: ModuleType, text: str) -> None:
    family.RECORD.write_text(text)
    assert family.best_known(GOOD[family][0], KIND) is None


def test_what_is_passed_over_is_said(
    family: ModuleType, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    problem, good = GOOD[family]
    with caplog.at_level(logging.WARNING):
        family.RECORD.write_text(json.dumps({KIND: {problem.key: good | {"stages": 0}}}))
        family.best_known(problem, KIND)
        assert f"recorded for {KIND}, {problem.key} is passed over" in caplog.text
        (tmp_path / "bytes").write_bytes(b"\xff{}")
        assert read_record(tmp_path / "bytes") == {}
        assert f"{tmp_path / 'bytes'} cannot be read" in caplog.text
        (tmp_path / "list").write_text("[]")
        assert read_record(tmp_path / "list") == {}
        assert "is no object of kinds of devices" in caplog.text
    assert read_record(tmp_path / "absent") == {}
