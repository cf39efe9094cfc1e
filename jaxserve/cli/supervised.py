"""Becomes another command that Linux ends with SIGTERM when the process that started it is gone.

    python supervised.py PARENT COMMAND...

A file to run, not to import: Python code between fork and exec is unsafe beside threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(128 + signal.SIGTERM)  # It had gone before it was asked after.
    os.execv(sys.argv[2], sys.argv[2:])
