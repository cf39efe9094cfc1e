"""``/metrics``, and the counter of HTTP requests that every one passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

from fastapi import APIRouter
from prometheus_client import exposition
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.frontend.door import Door
from jaxserve.frontend.http.answering import CLIENT_CLOSED
from jaxserve.frontend.metrics.collector import EngineCollector, make_registry

OTHER = "other"
"""The route of whatever has none: its path is the client's to choose, and must not be a label."""


class Counted:
    """Counts requests by route and status. One event loop writes; any thread reads."""

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self._counts: dict[tuple[str, str], int] = {}

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Returns (route, status) -> requests that have ended."""
        return self._counts.copy()

    def around(self, app: ASGIApp) -> ASGIApp:
        """Returns ``app``, counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            status = CLIENT_CLOSED

            async def watched(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                if scope["type"] == "http":
                    # Set by the router, once it has found one.
                    route = getattr(scope.get("route"), "path", OTHER)
                    key = (route, str(status))
                    self._counts[key] = self._counts.get(key, 0) + 1

        return counted


def routes(door: Door, counted: Counted) -> APIRouter:
    """The route of metrics."""
    router = APIRouter()
    collector = EngineCollector(door.text.engine, door.info, counted.counts)
    registry = make_registry(collector)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(http: HttpRequest) -> Response:
        """Tells Prometheus everything; see docs/metrics.md."""
        encode, media_type = negotiate(http.headers.get("accept", ""))
        # Some milliseconds of Python, for which no stream shall wait.
        text = await asyncio.to_thread(encode, registry)
        return Response(text, headers={"content-type": media_type})

    return router


def negotiate(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """Returns what writes the form that a client prefers, and its media type."""
    try:
        encode, media_type = exposition.choose_encoder(accept)
    except (TypeError, ValueError):  # A version that is none.
        encode, media_type = exposition.choose_encoder("")
    if isinstance(encode, partial):
        # No name here needs escaping. prometheus-client 0.26 would take the colons out of the
        # samples' names, and of nothing else.
        encode = partial(encode, escaping=ALLOWUTF8)
    return encode, media_type
