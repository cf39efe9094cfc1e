"""One request's way back to the client: a queue of events that two threads share.

The engine thread puts events in; a front end takes them out when it likes. The engine never waits
for a reader: a stream holds at most one event per token that its request may still produce, so
``max_tokens`` and ``n`` bound it. Waking the reader is batched: the engine collects the streams
that a step touched and calls each ``Waker`` once per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxserve.engine.request import Event


@runtime_checkable
class Waker(Protocol):
    """Tells a front end that streams have something to read. One instance serves many streams."""

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Called from the engine thread, after a step, with the streams that were empty before.

        Must not block and must not raise.
        """
        ...


class TokenStream:
    """The events of one request, in order: one ``StartedEvent``, tokens, one finish a choice.

    ``take``, ``stop`` and ``close`` may be called from any thread.
    """

    def __init__(
        self,
        request_id: str,
        choices: int,
        waker: Waker,
        *,
        on_close: Callable[[str], None],
        on_stop: Callable[[str, int], None],
    ) -> None:
        """Makes an empty stream.

        Args:
            request_id: given back to the two callbacks.
            choices: how many ``FinishedEvent`` will come.
            waker: told when the stream is no longer empty.
            on_close: called with the request id when the reader gives up.
            on_stop: called with the request id and the choice that the reader has ended.
        """
        self.request_id = request_id
        self.waker = waker
        self._events: deque[Event] = deque()
        self._open_choices = choices
        self._on_close = on_close
        self._on_stop = on_stop
        self._closed = False

    @property
    def finished(self) -> bool:
        """True once every choice's ``FinishedEvent`` has been put in (read or not)."""
        return self._open_choices == 0

    @property
    def pending(self) -> int:
        """Events that wait to be taken."""
        return len(self._events)

    def take(self) -> list[Event]:
        """Removes and returns every event that is there now; never waits."""
        taken: list[Event] = []
        # Until it is empty, and not until a length read beforehand: ``put`` asks for a wake-up
        # only when it finds the queue empty.
        events = self._events
        while events:
            taken.append(events.popleft())
        return taken

    def stop(self, choice: int) -> None:
        """Ends one choice with STOP, because its text met a stop string.

        Tokens already computed may still arrive; the reader ignores them.
        """
        self._on_stop(self.request_id, choice)

    def close(self) -> None:
        """Gives up the request: its pages are free by the next step. Safe to call again."""
        if not self._closed:
            self._closed = True
            if not self.finished:
                self._on_close(self.request_id)

    def put(self, event: Event, *, ends_choice: bool) -> bool:
        """Appends one event; engine thread only. Returns whether the reader has to be woken."""
        self._events.append(event)
        if ends_choice:
            self._open_choices -= 1
        # Looked at after the append: a reader that emptied the queue just before it, and now
        # waits, would otherwise never hear of this event.
        return len(self._events) <= 1


class ThreadWaker:
    """Wakes one waiting thread; for notebooks, tests and the command line."""

    def __init__(self) -> None:
        """Nothing is ready yet."""
        self._ready = threading.Event()

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Lets the waiting thread go on, or the next ``wait`` return at once."""
        self._ready.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the next ``wake`` since the last ``wait``; False when time ran out.

        ``take`` everything first: a stream that still holds events wakes nobody.
        """
        woken = self._ready.wait(timeout_s)
        self._ready.clear()
        return woken


class AsyncWaker:
    """Wakes coroutines of one event loop: one ``call_soon_threadsafe`` per step, however many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serves coroutines of ``loop``."""
        self._loop = loop
        self._waiting: dict[TokenStream, asyncio.Future[None]] = {}

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Lets the coroutines that wait for these streams go on."""
        # A loop that has been closed has nobody left to wake.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._release, streams)

    async def wait(self, stream: TokenStream) -> None:
        """Returns as soon as the stream has something to take.

        On the loop's thread only, and from one coroutine per stream.
        """
        if stream.pending:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting[stream] = future
        try:
            # An event put in between the check and the registration has woken nobody.
            if not stream.pending:
                await future
        finally:
            del self._waiting[stream]

    def _release(self, streams: Sequence[TokenStream]) -> None:
        for stream in streams:
            future = self._waiting.get(stream)
            if future is not None and not future.done():
                future.set_result(None)
