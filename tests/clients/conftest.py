"""Two small models behind two real servers, and the clients that knock at them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".clients" / "bin"
BOUND_S = 120.0


@dataclass(frozen=True)
class Served:
    """One server and what is behind it."""

    address: str
    llm: LLM

    def wait_idle(self) -> None:
        """Waits until nothing runs, and checks that no page is held."""
        engine = self.llm._service.engine
        wait_for(lambda: engine.idle)
        assert engine.stats().pages_used == 0

    def cancelled(self) -> int:
        return self.llm.stats().requests_finished_total.get("cancelled", 0)


def wait_for(condition: Callable[[], Any], bound_s: float = BOUND_S) -> Any:
    """Waits for what another process brings about, and returns its value."""
    until_s = time.monotonic() + bound_s
    while not (value := condition()):
        assert time.monotonic() < until_s, "it never came true"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """Runs a script of this directory with the stock clients; returns what it printed."""
    if not (BIN / "python").exists():
        pytest.skip("no stock clients in .clients/; install them with `make clients`")

    def ask(script: str, *arguments: str) -> dict[str, Any]:
        command = [BIN / "python", Path(__file__).with_name(script), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=2 * BOUND_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture(scope="package")
def servers() -> Iterator[tuple[Served, Served]]:
    """Two replicas of one model."""
    with ExitStack() as stack:
        served = []
        for _ in range(2):
            llm = LLM(
                "dummy:tiny-llama",
                device="cpu",
                dtype="float32",
                context_tokens=256,
                max_rows=4,
                step_tokens=16,
                kv_memory_bytes=4 * 2**20,
                progress=False,
                cache_dir=Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
            )
            stack.enter_context(llm)
            server = ServerThread(llm._service.text, llm._service.info, ServerConfig(port=0))
            served.append(Served(stack.enter_context(server), llm))
        yield served[0], served[1]
