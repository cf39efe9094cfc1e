"""What every answer over HTTP has around it: registered, ended when its client leaves, errors told.

``answer`` is for routes that return one body, ``EventStream`` for those that stream. Both watch the
connection: a client that goes away cancels the work, whatever it waits for, and ``finally`` gives
the pages back by the next step.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from jaxserve.engine.request import MAX_REQUEST_ID_CHARS
from jaxserve.frontend.calls import OpenCall, OpenCalls
from jaxserve.frontend.http import errors

CLIENT_CLOSED = 499
"""nginx's status for a client that left; nobody reads it."""
DONE = b"data: [DONE]\n\n"
Events = AsyncGenerator[bytes, None]


def request_id_of(http: HttpRequest, asked: str, prefix: str) -> str:
    """The id that the client chose, in the body or as ``X-Request-Id``, or a new one."""
    chosen = asked or http.headers.get("x-request-id", "")
    return chosen[: MAX_REQUEST_ID_CHARS + 1] or f"{prefix}{uuid.uuid4().hex}"


async def answer(
    http: HttpRequest,
    calls: OpenCalls,
    request_id: str,
    work: Callable[[], Awaitable[Any]],
    *,
    names: errors.Names = MappingProxyType({}),
) -> Response:
    """Returns the body that ``work`` makes, or the error that it raises."""
    with calls.open(request_id) as call:
        try:
            async with _cancelled_when_gone(http.receive):
                return JSONResponse(await work(), headers={"x-request-id": _header(request_id)})
        except asyncio.CancelledError:
            if call.error is None:
                return Response(status_code=CLIENT_CLOSED)
            error: BaseException = call.error
        except Exception as raised:  # The boundary of a request: logged once, in body_of.
            error = raised
    return errors.response_of(error, request_id=request_id, names=names)


class EventStream(Response):
    """Server-sent events. What goes wrong before the first is an ordinary error response."""

    media_type = "text/event-stream"

    def __init__(
        self,
        calls: OpenCalls,
        request_id: str,
        begin: Callable[[], Awaitable[Events]],
        *,
        names: errors.Names = MappingProxyType({}),
        counts: bool = True,
    ) -> None:
        """Does nothing yet.

        Args:
            calls: where the call is registered while it runs.
            request_id: told to the client.
            begin: admits the request and returns its events; raises what it is refused with.
            names: of fields in errors.
            counts: whether a server that stops waits for the end.
        """
        super().__init__()
        self._calls = calls
        self._request_id = request_id
        self._begin = begin
        self._names = names
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        request_id, began = self._request_id, False
        with self._calls.open(request_id, counts=self._counts) as call:
            try:
                async with _cancelled_when_gone(receive):
                    events = await self._begin()
                    try:
                        await send(self._start())
                        began = True
                        async for event in events:
                            await _send(send, call, event)
                    finally:
                        await events.aclose()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            except asyncio.CancelledError:
                if call.error is None:
                    return  # The client has left.
                error: BaseException = call.error
            except Exception as raised:  # The boundary of a request: logged once, in body_of.
                error = raised
        if not began:
            refused = errors.response_of(error, request_id=request_id, names=self._names)
            await refused(scope, receive, send)
            return
        body = sse(errors.body_of(error, request_id=request_id, names=self._names))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _start(self) -> dict[str, Any]:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would gather what is to be read at once.
            "x-request-id": _header(self._request_id),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


def sse(payload: Any, *, event: str = "") -> bytes:
    """One event, of a name where the protocol has names."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode(errors="replace")


def _header(request_id: str) -> str:
    """An id as a header can carry it; clients may choose any text."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in request_id)


async def _send(send: Send, call: OpenCall, event: bytes) -> None:
    """Sends one event; the sweep of ``OpenCalls`` finds those that are not taken."""
    call.sweeps_waited = 0
    await send({"type": "http.response.body", "body": event, "more_body": True})
    call.sweeps_waited = None


@asynccontextmanager
async def _cancelled_when_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when its client goes away. The request's body has been read by then."""
    task = asyncio.current_task()
    assert task is not None, "requests are answered in tasks"

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
