"""The parent's end of a child: started, asked with a limit on every wait, and gone at the end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import PROC, descendants, process_stats
from bench.peers.protocol import Question, Reply, question_lines
from bench.peers.systems import Places, System

ROOT = Path(__file__).parents[2]
STOP_S = 15.0
GONE_S = 10.0
SAMPLE_S = 1.0
LOG_LINES = 6


class ChildError(RuntimeError):
    """A child ended, failed, or did not answer in time."""


@dataclass
class Child:
    """A running system."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str | None]
    """What it says; None at its end."""
    started_s: float
    log: Path
    version: str = ""
    process_id: int = 0
    """The root of the engine's processes."""
    stop_s: float = STOP_S
    """How long it may take to end."""

    def ask(
        self, questions: Sequence[Question], clients: int | None, *, limit_s: float
    ) -> list[Reply]:
        """Returns a reply to each question.

        Raises:
            ChildError: there are none within the limit.
        """
        self._tell(question_lines(questions, clients))
        said = self._hear(limit_s, f"{len(questions)} requests")
        return [Reply(**reply) for reply in said["replies"]]

    def wait_until_ready(self, limit_s: float) -> None:
        """Waits until the engine is loaded.

        Raises:
            ChildError: it is not within the limit.
        """
        said = self._hear(limit_s, "the start")["ready"]
        self.version, self.process_id = said["version"], said["process_id"]

    def stop(self) -> None:
        """Asks it to end; whether it does is for ``running`` to see to."""
        with suppress(OSError, ChildError):
            self._tell({"stop": True})
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.stop_s)

    def _tell(self, line: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise ChildError(self._ended()) from None

    def _hear(self, limit_s: float, what: str) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=limit_s)
        except queue.Empty:
            raise ChildError(f"{what} took more than {limit_s:.0f} s") from None
        if line is None:
            raise ChildError(self._ended())
        said = json.loads(line)
        if "error" in said:
            raise ChildError(said["error"])
        return said

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GONE_S)
        code = self.process.returncode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return f"it ended {how}; see {self.log}"


@contextmanager
def running(system: System, places: Places) -> Iterator[Child]:
    """Starts a system; it is gone with all its descendants when the block ends, however it ends."""
    log = log_path(system, places)
    log.parent.mkdir(parents=True, exist_ok=True)
    options = json.dumps(system.options(places))
    started_s = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*system.command(places), options],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **system.environment(places)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    child = Child(process, queue.SimpleQueue(), started_s, log)
    reader = threading.Thread(target=_read, args=(process, child.lines), daemon=True)
    reader.start()
    try:
        yield child
        child.stop()
    finally:
        end(process)
        reader.join(GONE_S)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # What was not sent cannot be now.
                pipe.close()


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def end(process: subprocess.Popen[str]) -> None:
    """Kills a child, its descendants and its session, and waits until they are gone."""
    ends_s = time.monotonic() + GONE_S
    # Before the kill: afterwards nobody knows whose children the rest were.
    others = descendants([process.pid], process_stats())
    for process_id in {*others, *_session(process.pid)}:
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    process.wait()
    while time.monotonic() < ends_s and _session(process.pid):
        time.sleep(0.05)


def _session(leader: int) -> list[int]:
    """Returns what still runs in the session of a child, its parent there or not."""
    return [
        process_id
        for process_id, fields in process_stats().items()
        if int(fields[3]) == leader and fields[0] not in ("Z", "X")
    ]


class Memory:
    """The most memory that a process and its descendants took at a time, while the block ran.

    Summed proportional set sizes: a page that two of them share counts once. It includes the
    key/value cache, so it says how much cache was configured as much as what the engine needs.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Memory:
        """Begins to look, once a second."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Looks a last time."""
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        processes = descendants([self._root], process_stats())
        self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, processes)))


def _pss_bytes(process_id: int) -> int:
    with suppress(OSError):
        for line in (PROC / str(process_id) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def log_path(system: System, places: Places) -> Path:
    """Returns where a system's own words go; each start begins anew."""
    return places.root / "logs" / f"{system.name}.log"


def log_tail(log: Path) -> str:
    """Returns the end of what a child printed."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
