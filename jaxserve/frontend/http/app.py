"""The HTTP application: routes, and around them what every request passes.

    connection -> Guard (host, type, size, patience) -> FastAPI (types) -> a route -> Door

``Guard`` is plain ASGI, before anything reads a body. Types are pydantic's business, ranges and
everything else the engine's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.frontend.chats import ChatEngine
from jaxserve.frontend.door import Door
from jaxserve.frontend.http import (
    chat,
    completions,
    embeddings,
    live,
    metrics,
    page,
    responses,
    system,
)
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.http.errors import refusal, response_of


def make_app(door: Door, config: HttpConfig) -> ASGIApp:
    """Assembles everything."""
    app = FastAPI(
        title="jaxserve",
        version=door.info.server_version or "0",
        description="OpenAI's routes, health, tokens and metrics of one model.",
        docs_url=None,  # These pages load scripts from elsewhere.
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    chats = ChatEngine(door.text)
    counted = metrics.Counted()
    for routes in (
        chat.routes(door, chats),
        completions.routes(door),
        responses.routes(door, chats),
        embeddings.routes(door),
        system.routes(door, chats),
        metrics.routes(door, counted),
        live.routes(door),
        page.routes(),
    ):
        app.include_router(routes)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return counted.around(Guard(app, config))


class Guard:
    """Refuses what no route should see."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        """Stands before ``app``."""
        self._app = app
        self._hosts = config.served_hosts
        self._max_body_bytes = config.max_body_bytes
        self._patience_s = config.receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if problem := self._problem(scope["method"], headers):
            await problem(scope, receive, send)
            return
        body = await self._body(receive)
        if body is None:
            return  # The client has left, or says nothing any more.
        if len(body) > self._max_body_bytes:
            await self._too_large()(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    def _problem(self, method: str, headers: dict[bytes, str]) -> Response | None:
        host = headers.get(b"host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name not in self._hosts:
            return refusal(
                421,
                f"this server is not called {host[:100]!r}; ask for {', '.join(self._hosts)}, or "
                "launch with --http-allowed-hosts",
                code="misdirected_request",
            )
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            # A form of another site's page could send any other type without being asked first.
            return refusal(
                415,
                f"the body is of the type {kind[:60]!r}; send JSON with "
                "'Content-Type: application/json'",
            )
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, or more than may be; None when it does not come."""
        body = bytearray()
        try:
            while len(body) <= self._max_body_bytes:
                async with asyncio.timeout(self._patience_s):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
        except TimeoutError:
            return None
        return bytes(body)

    def _too_large(self) -> Response:
        return refusal(
            413,
            f"the body is larger than {self._max_body_bytes} bytes; send a shorter prompt, or "
            "several requests",
            code="request_too_large",
        )


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    param = _name_of(first["loc"])
    if first["type"] == "json_invalid":
        what = first.get("ctx", {}).get("error", "")
        return refusal(400, f"the body is no JSON ({what}); send a JSON object")
    if first["type"] == "extra_forbidden":
        return refusal(
            400,
            f"unknown parameter: {param!r}; leave it out",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        text = f"missing required parameter: {param!r}" if param else "the body is missing"
        return refusal(400, text, param=param or None, code="missing_required_parameter")
    shown = repr(first.get("input"))[:80]
    text = f"{param or 'the body'} is {shown}: {first['msg']}"
    return refusal(400, text, param=param or None, code="invalid_type")


def _name_of(location: Sequence[Any]) -> str:
    """The path of a field, as ``messages[0].role``, without which of several types was tried."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "int"):
            name += f".{part}" if name else part
    return name[:200]


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"there is no {http.method} {http.url.path[:200]} here; see /openapi.json"
    elif error.status_code == 405:
        text = f"{http.method} is not what {http.url.path[:200]} takes; see /openapi.json"
    else:
        text = str(error.detail)[:300]
    response = refusal(error.status_code, text)
    response.headers.update(error.headers or {})
    return response


async def _unexpected(http: HttpRequest, error: Exception) -> Response:
    return response_of(error, request_id=http.headers.get("x-request-id", ""))
