"""Starts a launch again when it fails: a process that runs another and does nothing else.

A mesh of several hosts fails as a whole; each host's supervisor starts its part again, and the
parts find each other. systemd or Kubernetes do the same where they run the show.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jaxserve.cli.words import say

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
POLL_S = 0.1
"""How late a signal may be noticed during a pause."""
STEADY_S = 60.0
"""After running for so long the count of restarts begins anew."""
NOT_RESTARTED = (0, 2)
"""Statuses of a stop that was asked for and of flags that have to change."""


def supervise(command: Sequence[str], *, restarts: int) -> int:
    """Runs a command until it ends well, cannot be helped, or has failed too often in a row.

    On Linux it gets SIGTERM when this process is gone, however that came.

    Args:
        command: what to run, a path first; SIGTERM, SIGINT, SIGHUP and SIGQUIT are handed on to it.
        restarts: how often in a row it is started again.

    Returns:
        Its last exit status; 128 plus the number of a signal that killed it.
    """
    child: subprocess.Popen[bytes] | None = None
    stopping = 0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = number
        if child is not None:
            child.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in _handed_on()}
    try:
        left, pause_s = restarts, FIRST_PAUSE_S
        while True:
            start = time.monotonic()
            # In a group of its own, so that Ctrl-C reaches it once, from here.
            child = subprocess.Popen(_bound_to_this_process(command), start_new_session=True)
            if stopping:
                child.send_signal(stopping)  # The handler may have known the last child only.
            status = child.wait()
            status = 128 - status if status < 0 else status
            if time.monotonic() - start > STEADY_S:
                left, pause_s = restarts, FIRST_PAUSE_S
            if stopping or status in NOT_RESTARTED or left == 0:
                return status
            left -= 1
            say(
                f"restart: ended with {status}; starting again in {pause_s:g} s "
                f"({left} restarts left)"
            )
            end = time.monotonic() + pause_s
            # An Event could deadlock: a handler runs in the thread that waits for it.
            while not stopping and time.monotonic() < end:
                time.sleep(min(POLL_S, pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if stopping:
                return status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handed_on() -> list[signal.Signals]:
    """What ends this process, less what it was told to ignore, as nohup does."""
    others = (signal.SIGHUP, signal.SIGQUIT)
    heeded = [number for number in others if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGTERM, signal.SIGINT, *heeded]


def _bound_to_this_process(command: Sequence[str]) -> list[str]:
    if sys.platform != "linux":
        return list(command)
    starter = Path(__file__).with_name("supervised.py")
    return [sys.executable, "-I", "-S", str(starter), str(os.getpid()), *command]
