"""Clients that try again at once, and streams that break under them."""

from __future__ import annotations

import threading

from jaxserve.engine.request import FinishReason
from jaxserve.errors import (
    DrainingError,
)
from jaxserve.frontend.client import RetryPolicy

QUICK = RetryPolicy(first_delay_s=0.001, max_delay_s=0.002)


def break_after(engine, text, number=0, error=None, **start):
    """Plays a server that stops in mid-stream: start, some tokens, then the end of its grace."""
    request_id = engine.wait_request(number).request_id
    first = len(engine.requests[number].resume)
    engine.start(request_id, **start)
    engine.give(request_id, text, first=first)
    engine.finish(
        request_id, FinishReason.ERROR, error=error or DrainingError(retry_after_s=0.001), tokens=9
    )


def play(*steps):
    thread = threading.Thread(target=lambda: [step() for step in steps])
    thread.start()
    return thread
