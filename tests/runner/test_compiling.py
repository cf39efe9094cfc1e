"""Which compilations count, and in which order a runner makes its programs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.runner.compiling import CompileAfterReadyError, CompileCounter, planned_compiles
from jaxserve.runner.config import ProgramKey
from jaxserve.runner.runner import Runner
from tests.runner.test_executables import make_runner

numbers = iter(range(1000))


def compile_something() -> None:
    """A program that no test has compiled before."""
    number = next(numbers)
    jax.jit(lambda x: x * 3 + 0.125 + number)(np.float32(1))


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    counter = CompileCounter.instance()
    strict, counter.strict = counter.strict, False
    yield counter
    counter.strict = strict


def test_what_is_planned_counts_apart_and_is_allowed_in_strict_mode(
    counter: CompileCounter,
) -> None:
    counter.strict = True
    compiles, unplanned = counter.compiles, counter.unplanned
    with planned_compiles():
        compile_something()
    assert counter.compiles > compiles
    assert counter.unplanned == unplanned
    with pytest.raises(CompileAfterReadyError, match="compiled after ready"):
        compile_something()
    assert counter.unplanned > unplanned


def test_a_plan_of_one_thread_is_none_of_another(counter: CompileCounter) -> None:
    unplanned = counter.unplanned
    with planned_compiles():
        other = threading.Thread(target=compile_something)
        other.start()
        other.join()
    assert counter.unplanned > unplanned


# -- a runner's programs ---------------------------------------------------------------------------


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> list[ProgramKey]:
    """The keys that were begun, of runners whose programs are made at once and do nothing."""
    begun: list[ProgramKey] = []

    def make(runner: Runner, key: ProgramKey) -> Any:
        begun.append(key)
        return str(key)

    monkeypatch.setattr(Runner, "_make_one", make)
    return begun


def test_programs_are_begun_in_order_and_known_when_they_are_done(
    making: list[ProgramKey],
) -> None:
    runner = make_runner()
    keys = runner.program_keys()
    assert runner.missing_keys() == keys
    assert runner.loaded_shape.decode_buckets == runner.loaded_shape.prefill_buckets == ()
    for done, key in enumerate(runner.compile(keys, workers=1), start=1):
        assert key == keys[done - 1]
        assert runner.missing_keys() == keys[done:]
    assert making == keys
    assert runner.loaded_shape == runner.config.step
    assert list(runner.compile(keys)) == []


def test_a_closed_generator_begins_no_other_program(making: list[ProgramKey]) -> None:
    runner = make_runner()
    keys = runner.program_keys()
    with closing(runner.compile(keys, workers=1)) as programs:
        assert next(programs) == keys[0]
    assert making == keys[:1]
    assert runner.missing_keys() == keys[1:]


def test_an_error_begins_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    begun: list[ProgramKey] = []

    def fail(key: ProgramKey) -> Any:
        begun.append(key)
        raise MemoryError("XLA has had enough")

    monkeypatch.setattr(runner, "_make_one", fail)
    with pytest.raises(MemoryError, match="had enough"):
        list(runner.compile(runner.program_keys(), workers=1))
    assert begun == runner.program_keys()[:1]
