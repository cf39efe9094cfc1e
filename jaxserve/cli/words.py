"""Words that must not decide how a command ends."""

from __future__ import annotations

import os
import sys
from typing import Any


def say(text: str) -> None:
    """Prints lines on stderr; nobody may be reading it any more, and that is no error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def tell(text: str) -> None:
    """Prints lines on stdout; a script may have read all that it wanted, and that is no error."""
    try:
        print(text, flush=True)
    except OSError:
        discard(sys.stdout)


def discard(stream: Any) -> None:
    """Sends what a stream still holds, and what follows, nowhere: Python flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
