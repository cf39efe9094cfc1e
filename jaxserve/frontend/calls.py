"""The calls that are being answered by any door: who is open, who has stalled, how to end them.

An open call can be ended from outside (the reader stalled, the server stops) with the error that
its client shall see. Stalls are found by one timer that counts how often it has met the same
unfinished write: a timer per message would cost as much as sending it, and a clock would blame
the clients for time in which this process itself stood still (a paused machine, a stopped
process).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.errors import JaxserveError, SlowReaderError

SWEEPS_PER_STALL = 8
"""A stalled reader is noticed at most this part of the stall limit, or two, late."""


class OpenCall:
    """One RPC whose handler is running."""

    __slots__ = ("_task", "counts", "error", "request_id", "sweeps_waited")

    def __init__(self, request_id: str, task: asyncio.Task[object], *, counts: bool) -> None:
        """Remembers the handler's task, by which the call can be ended."""
        self.request_id = request_id
        self.counts = counts
        """Whether a drain waits for it."""
        self.sweeps_waited: int | None = None
        """How many sweeps have met the message that has not been accepted yet; None without one."""
        self.error: JaxserveError | None = None
        """Why it was ended from outside, once it was."""
        self._task = task

    def end(self, error: JaxserveError) -> None:
        """Makes the handler stop where it waits; it reports ``error``. Loop's thread only."""
        if self.error is None:
            self.error = error
            self._task.cancel()


class OpenCalls:
    """Every open RPC of one server. Belongs to one event loop."""

    def __init__(self, *, stall_timeout_s: float) -> None:
        """Begins with none open; ``watch_stalls`` has to be run beside."""
        self._stall_timeout_s = stall_timeout_s
        self._calls: set[OpenCall] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()

    @contextmanager
    def open(self, request_id: str, *, counts: bool = True) -> Iterator[OpenCall]:
        """Registers the running handler for the time of the block."""
        task = asyncio.current_task()
        assert task is not None, "handlers run in tasks"
        call = OpenCall(request_id, task, counts=counts)
        self._calls.add(call)
        self._settle()
        try:
            yield call
        finally:
            self._calls.discard(call)
            self._settle()

    def count(self, call: OpenCall, counts: bool) -> None:
        """Changes whether a drain waits for an open call."""
        call.counts = counts
        self._settle()

    def _settle(self) -> None:
        if any(call.counts for call in self._calls):
            self._none_left.clear()
        else:
            self._none_left.set()

    def end_all(self, error: JaxserveError, *, counts: bool | None = None) -> None:
        """Ends every call, or only those whose ``counts`` is as given."""
        for call in list(self._calls):
            if counts is None or call.counts == counts:
                call.end(error)

    async def wait_none(self, timeout_s: float) -> bool:
        """Waits until no counting call is open; False when time ran out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()
        except TimeoutError:
            return False
        return True

    def sweep(self) -> None:
        """Ends the calls whose client has accepted nothing for the stall limit."""
        for call in list(self._calls):
            if call.sweeps_waited is None:
                continue
            call.sweeps_waited += 1
            # The first one came somewhere within an interval.
            if call.sweeps_waited > SWEEPS_PER_STALL:
                call.end(SlowReaderError(call.request_id, self._stall_timeout_s))

    async def watch_stalls(self) -> None:
        """Looks for stalled readers until cancelled."""
        while True:
            await asyncio.sleep(self._stall_timeout_s / SWEEPS_PER_STALL)
            self.sweep()
