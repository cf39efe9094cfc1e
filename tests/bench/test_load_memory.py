"""Weights are held once: what loading takes beside them does not grow with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import load_memory

pytestmark = pytest.mark.slow

MEBIBYTES = 256
ALLOWANCE_BYTES = 48 * 2**20
"""Heaps of threads, imports, pieces being read: the same for a model of any size."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load_memory.make_checkpoint(tmp_path_factory.mktemp("memory") / "stored", MEBIBYTES)


@pytest.fixture(scope="module")
def converted(stored: Path) -> tuple[Path, dict[str, Any]]:
    out = stored.with_name("converted")
    return out, load_memory.measured(stored, "1x1", out=out)


def assert_held_once(facts: dict[str, Any]) -> None:
    assert facts["weight_bytes"] > MEBIBYTES * 2**20
    assert facts["held_bytes"] > 0.9 * facts["weight_bytes"], "the weights were loaded"
    assert facts["held_bytes"] < 1.3 * facts["weight_bytes"] + ALLOWANCE_BYTES, facts


def assert_fits_once(facts: dict[str, Any]) -> None:
    assert facts["limit_bytes"] < 2 * facts["weight_bytes"]
    assert_held_once(facts)


@pytest.mark.parametrize("mesh", ["1x1", "1x4"])
def test_safetensors_are_loaded_where_the_weights_would_not_fit_twice(
    mesh: str, stored: Path
) -> None:
    assert_fits_once(load_memory.measured(stored, mesh, limit=1.3))


@pytest.mark.parametrize("mesh", ["1x1", "1x3", "1x4"])
def test_a_converted_model_is_loaded_where_the_weights_would_not_fit_twice(
    mesh: str, converted: tuple[Path, dict[str, Any]]
) -> None:
    assert_fits_once(load_memory.measured(converted[0], mesh, limit=1.3))


def test_converting_holds_the_weights_once(converted: tuple[Path, dict[str, Any]]) -> None:
    assert_held_once(converted[1])


def test_the_limit_that_the_others_pass_under_is_a_limit(stored: Path) -> None:
    with pytest.raises(RuntimeError, match=r"on 1x1 failed:(.|\n)*Unable to allocate"):
        load_memory.measured(stored, "1x1", limit=0.1)
