"""``/live``: the engine as server-sent events, for a bounded number of watchers.

Whoever is first looks at the engine, and all watchers get what was seen. A slow one gets the newest
event when it comes back, so that nothing piles up for it. Nobody watching costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RetryableError
from jaxserve.frontend.door import Door
from jaxserve.frontend.engine_api import EngineApi
from jaxserve.frontend.http.answering import Events, EventStream, request_id_of, sse
from jaxserve.frontend.live import LiveView

INTERVAL_S = 0.5
RETRY_AFTER_S = 10.0
MAX_WATCHERS = 16
"""Each costs about 15 KB a second. Too few lock people out; too many cost the event loop time."""


class Broadcast:
    """What the watchers of one server share. Belongs to its event loop."""

    def __init__(self, engine: EngineApi) -> None:
        """Looks at nothing until somebody watches."""
        self.watchers = 0
        self._engine = engine
        self._view = LiveView(engine)
        self._newest = b""
        self._looks = 0
        self._due_s = 0.0
        self._looking = asyncio.Lock()
        self._picture: asyncio.Future[list[np.ndarray]] | None = None

    async def events(self) -> Events:
        """Returns the events of one watcher, from now until it leaves.

        Raises:
            RetryableError: as many as may watch do.
        """
        if self.watchers >= MAX_WATCHERS:
            raise RetryableError(
                f"{MAX_WATCHERS} watch already, which is the most; close another page, or read "
                "/metrics",
                retry_after_s=RETRY_AFTER_S,
            )
        events = self._events()
        # Up to its first, empty event: what has begun is counted, and is uncounted when closed.
        await anext(events)
        return events

    async def _events(self) -> Events:
        self.watchers += 1
        seen = self._looks
        try:
            yield b""
            while True:
                if seen == self._looks:
                    await self._look(seen)
                seen = self._looks
                yield self._newest
        finally:
            self.watchers -= 1
            if not self.watchers:
                self._view.clear()

    async def _look(self, seen: int) -> None:
        """Looks at the engine once it is time, or waits for another watcher who does."""
        now = asyncio.get_running_loop().time
        async with self._looking:
            if seen == self._looks:
                await asyncio.sleep(max(0.0, self._due_s - now()))
                self._due_s = now() + INTERVAL_S
                self._newest = sse(self._view.event(await self._pages()))
                self._looks += 1

    async def _pages(self) -> list[np.ndarray] | None:
        """The pool's states; None while the engine is busy with a long step, or has ended."""
        if self._picture is None:
            self._picture = asyncio.wrap_future(self._engine.pages())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL_S):
                # Shielded: it is asked for once, however long a step takes.
                pages = await asyncio.shield(self._picture)
                self._picture = None
                return pages
        return None


def routes(door: Door) -> APIRouter:
    """The route of watchers."""
    router = APIRouter()
    broadcast = Broadcast(door.text.engine)

    @router.get("/live", include_in_schema=False)
    async def live(http: HttpRequest) -> Response:
        """Tells what the engine does, about twice a second."""
        request_id = request_id_of(http, "", "live-")
        return EventStream(door.calls, request_id, broadcast.events, counts=False)

    return router
