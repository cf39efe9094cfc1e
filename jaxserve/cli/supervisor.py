"""Starts a launch again when it fails: a process that runs another and does nothing else.

A mesh of several hosts fails as a whole; each host's supervisor starts its part again, and the
parts find each other. systemd or Kubernetes do the same where they run the show.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
STEADY_S = 60.0
"""After running for so long the count of restarts begins anew."""
NOT_RESTARTED = (0, 2)
"""Statuses of a stop that was asked for and of flags that have to change."""


def supervise(command: Sequence[str], *, restarts: int) -> int:
    """Runs a command until it ends well, cannot be helped, or has failed too often in a row.

    Args:
        command: what to run; SIGTERM and SIGINT are handed on to it.
        restarts: how often in a row it is started again.

    Returns:
        Its last exit status; 128 plus the number of a signal that killed it.
    """
    child: subprocess.Popen[bytes] | None = None
    stopping = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if child is not None:
            child.send_signal(number)

    previous = {
        number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        left, pause_s = restarts, FIRST_PAUSE_S
        while True:
            start = time.monotonic()
            # In a group of its own, so that Ctrl-C reaches it once, from here.
            child = subprocess.Popen(command, start_new_session=True)
            status = child.wait()
            status = 128 - status if status < 0 else status
            if time.monotonic() - start > STEADY_S:
                left, pause_s = restarts, FIRST_PAUSE_S
            if stopping or status in NOT_RESTARTED or left == 0:
                return status
            left -= 1
            print(
                f"restart: ended with {status}; starting again in {pause_s:g} s "
                f"({left} restarts left)",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if stopping:
                return status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
