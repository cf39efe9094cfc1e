"""uvicorn on the event loop of the gRPC server: opens the port, and closes it in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.errors import LaunchError
from jaxserve.frontend.door import Door
from jaxserve.frontend.http.app import make_app
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.http.errors import refusal
from jaxserve.frontend.sockets import listen_on

CLOSE_S = 2.0
"""For answers that have ended to reach their clients."""
BACKLOG = 2048
MAX_HEAD_BYTES = 64 * 1024
"""Of one request: its line and its headers."""


class HttpServer:
    """One port. Created, started and stopped on one event loop."""

    def __init__(self, door: Door, config: HttpConfig) -> None:
        """Assembles the routes; no port is open yet."""
        self._config = config
        settings = uvicorn.Config(
            make_app(door, config),
            http=_patient(config.receive_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=int(config.keep_alive_s),
            timeout_graceful_shutdown=int(CLOSE_S),
        )
        self._server = _Uvicorn(settings)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Opens the port and returns the bound address, such as ``127.0.0.1:8000``.

        Raises:
            LaunchError: the port cannot be opened.
        """
        bound = listen(self._config)
        host, port = self._config.host, bound.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([bound]))
        done, _ = await asyncio.wait(
            [self._serving, asyncio.create_task(self._server.up.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._serving in done:
            await self._serving
            raise LaunchError(f"cannot serve HTTP on {host}:{port}; choose another --http-port")
        return f"[{host}]:{port}" if ":" in host and host[0] != "[" else f"{host}:{port}"

    async def stop(self) -> None:
        """Closes the port and every connection."""
        self._server.should_exit = True
        if self._serving is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * CLOSE_S):
                    await self._serving


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Signals are ``serve.py``'s."""
        yield


def _patient(seconds: float) -> type[asyncio.Protocol]:
    """A protocol that bounds a request's head in time and size, which uvicorn does not.

    Args:
        seconds: from a connection's beginning, or a later request's, to the end of its head.
    """

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head_timer: asyncio.TimerHandle | None = None
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head_timer is not None:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._refuse_head()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._head_timer is None:
                self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                self._refuse_head()
                raise ValueError("the head is too large")  # Stops the parser.
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(refusal(400, "this is no HTTP request; send HTTP/1.1"))

        def _begin_head(self) -> None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(seconds, self._close)

        def _end_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _close(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

        def _refuse_head(self) -> None:
            message = f"the head of a request has at most {MAX_HEAD_BYTES} bytes; send less"
            self._refuse(refusal(431, message))

        def _refuse(self, response: Response) -> None:
            if not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                    b"connection: close\r\n\r\n%b"
                    % (response.status_code, len(response.body), bytes(response.body))
                )
                self.transport.close()

    return Protocol


def listen(config: HttpConfig) -> socket.socket:
    """Opens the port.

    Raises:
        LaunchError: it cannot be listened on.
    """
    try:
        bound = listen_on(config.host, config.port, backlog=BACKLOG)
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror or error}) for HTTP; "
            "stop the process that uses the port, or choose another with --http-port (0 takes any "
            "free one, none opens none)"
        ) from error
    bound.setblocking(False)
    return bound
