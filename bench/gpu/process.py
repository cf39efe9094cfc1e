"""The parent's side of a part: a child process, ended at its budget, whatever it does.

A child has a session of its own, so that its children end with it. It writes every number into a
file as soon as it has it: a hang, a crash or running out of memory costs only what was to follow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.part import Part

ROOT = Path(__file__).parents[2]
LOG_LINES = 12
PROBE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part went."""

    status: str
    """``ok``, ``failed`` or ``not asked``."""
    reason: str = ""
    """Why it is not ``ok``."""
    seconds: float = 0.0
    budget_s: float
    numbers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Of ``Number.as_json``; a part that failed has those it found before."""
    log: str = ""
    """The end of what a failed part printed; not kept in the file."""

    def as_json(self) -> dict[str, Any]:
        """Returns what the file keeps."""
        found = {key: value for key, value in vars(self).items() if key != "log"}
        return {**found, "seconds": round(self.seconds, 2), "budget_s": round(self.budget_s, 1)}


def probe(environment: Mapping[str, str]) -> dict[str, Any]:
    """Asks a child what the device is, so that this process never holds any of it.

    Raises:
        RuntimeError: JAX does not start there; the message ends with what it printed.
    """
    command = [sys.executable, "-m", "bench.gpu.child", "--probe"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the device cannot be asked:\n{_tail(error.stderr)}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the device did not answer within {PROBE_S:g} s") from None
    return json.loads(done.stdout.splitlines()[-1])


def run_part(
    part: Part,
    setting: Mapping[str, Any],
    *,
    budget_s: float,
    environment: Mapping[str, str],
) -> Outcome:
    """Runs a part to its end or to the end of its budget.

    Args:
        part: which.
        setting: JSON values of a ``Setting``, without ``ends_s``.
        budget_s: what is left for it.
        environment: variables of the child beside this process's own.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        results, log = Path(folder, "results"), Path(folder, "log")
        told = {**setting, "ends_s": time.time() + budget_s}
        command = [sys.executable, "-m", "bench.gpu.child", part.function, str(results)]
        with log.open("wb") as file, _child(command, json.dumps(told), environment, file) as child:
            try:
                code = child.wait(timeout=budget_s)
            except subprocess.TimeoutExpired:
                code = None
        numbers, error = _read(results)
        reason = _reason(code, error, numbers, budget_s)
        return Outcome(
            status="failed" if reason else "ok",
            reason=reason,
            seconds=time.monotonic() - start_s,
            budget_s=budget_s,
            numbers=numbers,
            log=_tail(log.read_text(errors="replace")) if reason else "",
        )


@contextmanager
def _child(
    command: Sequence[str], told: str, environment: Mapping[str, str], log: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone with all its descendants when the block ends, however it ends."""
    child = subprocess.Popen(
        [*command, told],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        # Also after a good end: a descendant that outlived it would hold the device.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read(results: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the numbers of a part, and the error that ended it."""
    numbers, error = [], ""
    lines = results.read_text().splitlines() if results.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break  # Killed while it wrote.
        if "error" in entry:
            error = entry["error"]
        else:
            numbers.append(entry)
    return numbers, error


def _reason(
    code: int | None, error: str, numbers: Sequence[Mapping[str, Any]], budget_s: float
) -> str:
    """Says why a part failed; empty when it did not."""
    if code is None:
        return f"killed at its budget of {budget_s:.0f} s, with {len(numbers)} numbers found"
    if error:
        return error
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}; out of memory is the usual cause"
    if code:
        return f"ended with exit code {code}"
    return "" if numbers else "found no number"


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])
