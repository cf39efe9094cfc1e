"""A service that is ready with its first programs, and what becomes of the others."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import serve as serving
from jaxserve.cli.launch import describe_plan
from jaxserve.engine.publish import StepHandle
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.step import StepInputs
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.http.config import Doors
from jaxserve.launch import Service, build
from jaxserve.runner.compiling import CompileAfterReadyError, cores
from jaxserve.runner.config import ProgramKey
from jaxserve.runner.runner import Runner
from tests.agreement.ways import ask_together, service_config

pytestmark = pytest.mark.slow

FIRST, ALL = 6, 8
"""Without decode of 4 rows and prefill of 16 tokens."""
PATIENCE_S = 120.0


class Gate:
    """Holds what a ready runner makes until it is opened."""

    def __init__(self) -> None:
        self.begun: list[ProgramKey] = []
        self.has_begun = threading.Event()
        self.is_open = threading.Event()
        self.error: Exception | None = None
        """Raised instead of making a program, when it is open."""

    def pass_through(self, key: ProgramKey) -> None:
        self.begun.append(key)
        self.has_begun.set()
        assert self.is_open.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, make = Gate(), Runner._make_one

    def make_one(runner: Runner, key: ProgramKey) -> Any:
        if runner.params is not None:
            gate.pass_through(key)
        return make(runner, key)

    monkeypatch.setattr(Runner, "_make_one", make_one)
    yield gate
    gate.is_open.set()


def first_service(cache_dir: Path, **options: Any) -> Service:
    """A service of seven programs, of which two follow."""
    settings = {"max_rows": 8, "context_tokens": 256, "ready_with": "first", **options}
    return build(service_config("dummy:tiny-llama", cache_dir, cache_dir, **settings))


def batch(name: str, count: int = 3) -> list[Request]:
    """Three rows decode together after short prompts, which only late buckets fit tightly."""
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    return [
        Request(request_id=f"{name}{n}", prompt=[7 + n, 5, 6, 7, 8], sampling=sampling)
        for n in range(count)
    ]


def note_buckets(service: Service) -> set[tuple[str, int, int]]:
    """The buckets of every step from now on."""
    seen = set[tuple[str, int, int]]()
    dispatch = service.runner.dispatch

    def noting(inputs: StepInputs) -> StepHandle:
        seen.update((call.kind, *call.bucket) for call in inputs.calls)
        return dispatch(inputs)

    service.runner.dispatch = noting
    return seen


def test_answers_are_the_same_before_and_after_the_other_programs_come(
    gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In strict mode, from a cache that holds nothing: the late programs are compiled."""
    caplog.set_level(logging.INFO, logger="jaxserve")
    with first_service(tmp_path) as service:
        late, runner, engine = service.late, service.runner, service.engine
        assert late is not None
        assert not late.wait(0.0)
        assert len(runner.missing_keys()) == ALL - FIRST
        assert f"{FIRST} of {ALL} programs compiled, the others follow;" in describe_plan(
            service, ServerConfig()
        )
        seen = note_buckets(service)
        before = ask_together(engine, batch("before"))
        assert seen <= {("decode", 1, 1), ("decode", 8, 1), ("prefill", 16, 64)}

        gate.is_open.set()
        assert late.wait(PATIENCE_S)
        assert [str(key) for key in gate.begun] == ["decode of 4 rows", "prefill of 16 tokens"]
        assert runner.missing_keys() == []
        assert runner.loaded_shape == service.plan.step
        assert f"all {ALL} programs are there, " in caplog.messages[-1]
        assert f"{ALL} programs compiled;" in describe_plan(service, ServerConfig())
        seen.clear()
        assert ask_together(engine, batch("after")) == before
        assert {("decode", 4, 1), ("prefill", 16, 16)} <= seen

        assert engine.stats().compiles_after_ready == 0
        with pytest.raises(CompileAfterReadyError, match="compiled after ready"):
            jax.jit(lambda x: x * 5 - 0.75)(np.float32(1))
        assert engine.stats().compiles_after_ready > 0
        assert runner.executables is not None
        stored = {path.stem for path in runner.executables.path.glob("*.xla")}
        assert stored == {key.file_name for key in runner.program_keys()}


def test_programs_come_while_requests_run(gate: Gate, cache_dir: Path) -> None:
    with first_service(cache_dir) as service:
        assert service.late is not None
        dispatch, steps = service.runner.dispatch, 0

        def open_later(inputs: StepInputs) -> StepHandle:
            nonlocal steps
            steps += 1
            if steps == 6:
                gate.is_open.set()
                assert service.late is not None
                assert service.late.wait(PATIENCE_S)
            return dispatch(inputs)

        service.runner.dispatch = open_later
        seen = note_buckets(service)
        during = ask_together(service.engine, batch("during"))
        assert {("decode", 4, 1), ("decode", 8, 1)} <= seen
        assert ask_together(service.engine, batch("after")) == during


def test_closing_waits_for_what_has_begun_and_begins_no_more(gate: Gate, cache_dir: Path) -> None:
    service = first_service(cache_dir)
    assert service.late is not None
    assert gate.has_begun.wait(PATIENCE_S)
    closing = threading.Thread(target=service.close)
    closing.start()
    assert service.late._cancelled.wait(PATIENCE_S)
    assert service.runner.params is not None, "the program that has begun is not waited for"
    gate.is_open.set()
    closing.join(PATIENCE_S)
    assert service.runner.params is None
    assert not service.late.wait(0.0), "not all were made"
    assert 1 <= len(gate.begun) <= max(1, cores() // 2)
    service.close()


def test_a_program_that_cannot_be_made_is_said_and_serving_goes_on(
    gate: Gate, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = MemoryError("XLA has had enough")
    with first_service(cache_dir) as service:
        assert service.late is not None
        before = ask_together(service.engine, batch("before"))
        gate.is_open.set()
        assert not service.late.wait(PATIENCE_S)
        (record,) = [each for each in caplog.records if each.name == "jaxserve.late"]
        text = f"a program cannot be made; serving goes on with {FIRST} of {ALL}"
        assert record.getMessage() == text
        assert record.exc_info is not None
        assert record.exc_info[1] is gate.error
        assert ask_together(service.engine, batch("after")) == before
        assert service.engine.health().serving


def test_a_stop_does_not_wait_for_a_program_for_ever(
    gate: Gate, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process can be left then: what was asked for is done, and that is not a failure."""
    monkeypatch.setattr(serving, "CLOSE_LIMIT_S", 0.5)

    def stop(service: Service, doors: Doors) -> None:
        assert gate.has_begun.wait(PATIENCE_S)
        signal.raise_signal(signal.SIGTERM)

    settings: dict[str, Any] = {"max_rows": 8, "context_tokens": 256, "ready_with": "first"}
    ended = serving.serve(
        service_config("dummy:tiny-llama", cache_dir, cache_dir, **settings),
        ServerConfig(port=0, grace_s=0.1),
        on_ready=stop,
        before_ready=lambda number: pytest.fail(f"signal {number} before ready"),
    )
    assert ended == serving.Ended(None, clean=False, compiling=True)


def test_nothing_is_late_where_the_first_programs_are_all(cache_dir: Path) -> None:
    with first_service(cache_dir, max_rows=1, step_tokens=16) as service:
        assert service.late is None
        assert service.runner.loaded_shape == service.plan.step


LEFT_OPEN = """
import sys
from pathlib import Path
from jaxserve import LLM
if __name__ == "__main__":
    places = dict(cache_dir=Path(sys.argv[1]), assets_dir=Path(sys.argv[1]))
    sizes = dict(context_tokens=128, max_rows=16, step_tokens=64, kv_memory_bytes=2**22)
    asked = dict(device="cpu", progress=False, ready_with="first")
    llm = LLM("dummy:tiny-llama", **asked, **sizes, **places)
    assert llm._service.late is not None
    print(len(llm.generate("Hello", max_tokens=2, ignore_eos=True).token_ids))
"""


def test_a_script_that_closes_nothing_ends_in_peace(tmp_path: Path) -> None:
    """The interpreter ends while a program is compiled, which it waits for."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, tmp_path], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, "2\n")
    assert "program" not in done.stderr
    assert "Thread" not in done.stderr
