"""A child of ``bench.peers``: loads one engine, then answers on a pipe until it is told to stop.

    python -m bench.peers.child DRIVER '{"model": ...}'

Runs in the environment of the engine. What the engine prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from typing import Any

from bench.peers.protocol import Driver, Question

PR_SET_PDEATHSIG = 1
MESSAGE_CHARACTERS = 400


def die_with_parent() -> None:
    """Lets the kernel end this process when its parent is gone, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(words: list[str]) -> int:
    """Answers until stdin ends or says stop; returns the exit code."""
    die_with_parent()
    name, options = words
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # An engine's own chatter must not look like a reply.

    def tell(line: dict[str, Any]) -> None:
        replies.write(json.dumps(line) + "\n")
        replies.flush()

    try:
        driver: Driver = importlib.import_module(f"bench.peers.drivers.{name}").make(
            **json.loads(options)
        )
    except Exception as error:
        tell({"error": describe(error)})
        raise
    try:
        tell({"ready": {"version": driver.version, "process_id": driver.process_id}})
        for line in sys.stdin:
            told = json.loads(line)
            if told.get("stop"):
                break
            questions = [Question(prompt, count) for prompt, count in told["ask"]]
            answered = driver.ask(questions, told["clients"])
            tell({"replies": [vars(reply) for reply in answered]})
    except Exception as error:
        tell({"error": describe(error)})
        raise
    finally:
        driver.close()
    return 0


def describe(error: Exception) -> str:
    """Says an error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:MESSAGE_CHARACTERS]


if __name__ == "__main__":
    sys.stdout.flush()
    # Not sys.exit: threads of an engine that never end would keep the interpreter.
    code = main(sys.argv[1:])
    os._exit(code)
