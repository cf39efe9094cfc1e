"""One server process for all tests of the command line, and `main` as a function of arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main

MODEL = "dummy:tiny-llama"
FLAGS = [
    *("--device", "cpu", "--dtype", "float32", "--context-tokens", "256", "--kv-memory", "4MiB"),
    *("--max-rows", "4", "--step-tokens", "16", "--no-prompt-logprobs"),
    *("--cache-dir", os.environ["JAX_COMPILATION_CACHE_DIR"]),
]
"""Four programs, the same for every command, so that they are compiled once."""
READY_S = 240.0
"""For a machine that is busy; a cold start takes ten seconds of processor time."""


class ServerProcess:
    """`jaxserve launch` in a process of its own."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "jaxserve", "launch", MODEL, "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.errors: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._reader = threading.Thread(
            target=lambda err: self.errors.extend(err), args=(self.process.stderr,), daemon=True
        )
        self._reader.start()
        timer = threading.Timer(READY_S, self.process.kill)
        timer.start()
        self.ready_line = self.process.stdout.readline().rstrip("\n")
        timer.cancel()
        assert self.ready_line, "".join(self.errors)

    @property
    def facts(self) -> dict[str, str]:
        """The key=value pairs of the ready line."""
        return dict(pair.split("=", 1) for pair in self.ready_line.split(" ")[1:])

    @property
    def address(self) -> str:
        return self.facts["address"]

    def stop(self, number: int) -> tuple[int, str, str]:
        """Sends a signal; returns the exit status and what was left on stdout and stderr."""
        self.process.send_signal(number)
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        status = self.process.wait(60)
        self._reader.join(10)
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status, rest, "".join(self.errors)


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers; those that still run at the end are killed."""
    started: list[ServerProcess] = []

    def start(*flags: str) -> ServerProcess:
        started.append(ServerProcess(*FLAGS, *flags))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop(9)


@pytest.fixture(scope="session")
def server(launch: Callable[..., ServerProcess]) -> ServerProcess:
    """A server for tests that only ask it things."""
    return launch()


@dataclass
class Result:
    """What a command did."""

    status: int
    out: str
    err: str


@dataclass
class Shell:
    """Runs commands in this process, so that each costs no interpreter and no import."""

    capsys: Any
    flags: list[str] = field(default_factory=lambda: FLAGS)
    model: str = MODEL

    def __call__(self, *arguments: str | Path) -> Result:
        self.capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = leaving.code
        assert isinstance(status, int)
        return Result(status, *self.capsys.readouterr())


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`main`, with the environment variables of jaxserve cleared."""
    for name in ("JAXSERVE_SERVER", "JAXSERVE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return Shell(capsys)
