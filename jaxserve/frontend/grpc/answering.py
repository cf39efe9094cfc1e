"""What every handler has around its own work: registered, errors mapped, ended in bounded time."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Protocol, runtime_checkable

import grpc

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.calls import OpenCall, OpenCalls
from jaxserve.frontend.grpc.decoding import Malformed
from jaxserve.frontend.grpc.status import to_grpc_status

ABORT_TIMEOUT_S = 1.0
"""Sending a status can hang behind a message that the client does not accept; after this the
stream is reset instead."""


@runtime_checkable
class Context(Protocol):
    """What is used of ``grpc.aio.ServicerContext``, which gRPC's own contexts do not inherit."""

    async def write(self, message: Any, /) -> None:
        """Sends one message of a stream."""
        ...

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = (), /
    ) -> NoReturn:
        """Ends the call with a status; always raises."""
        ...

    def time_remaining(self) -> float | None:
        """Returns the seconds until the call's deadline; None without one."""
        ...


@runtime_checkable
class Servicer(Protocol):
    """A servicer whose open calls are known."""

    calls: OpenCalls


Handler = Callable[[Any, Any, Context, OpenCall], Awaitable[Any]]


def answered(handler: Handler | None = None, *, counts: bool = True) -> Any:
    """Makes a gRPC handler of a method that takes one more argument, its ``OpenCall``.

    Whatever the method raises becomes a status; its own ``finally`` has run by then. Typed loosely
    because generated base classes describe synchronous and asynchronous handlers at once.

    Args:
        handler: the method; left out when used as ``@answered(counts=False)``.
        counts: whether a drain waits for the call.
    """
    if handler is None:
        return functools.partial(answered, counts=counts)

    @functools.wraps(handler)
    async def handle(self: Servicer, request: Any, context: Context) -> Any:
        request_id = _request_id(request)
        with self.calls.open(request_id, counts=counts) as call:
            try:
                refuse_malformed(request)
                return await handler(self, request, context, call)
            except asyncio.CancelledError:
                if call.error is None:
                    raise  # The client has left, or its deadline has passed: nobody to tell.
                error: BaseException = call.error
            except Exception as raised:  # The RPC boundary: logged once, in to_grpc_status.
                error = raised
            return await abort(context, error, request_id)

    return handle


def refuse_malformed(request: Any) -> None:
    """Accepts every message that could be read.

    Raises:
        InvalidRequestError: it could not.
    """
    if type(request) is Malformed:
        raise InvalidRequestError(
            f"the bytes received are not a request of {request.method}; generate the client from "
            "the same proto files, and send text as UTF-8",
            field="",
        )


async def abort(context: Context, error: BaseException, request_id: str) -> NoReturn:
    """Ends the RPC with an error's status, within ``ABORT_TIMEOUT_S``."""
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            status = to_grpc_status(error, request_id=request_id)
            await context.abort(status.code, status.details, status.trailing_metadata)
    except (TimeoutError, grpc.aio.InternalError):
        # The client does not take the status or is gone; gRPC resets the stream.
        raise asyncio.CancelledError from None


async def write(context: Context, call: OpenCall, message: object) -> None:
    """Sends one message under the eye of the stall timer."""
    call.sweeps_waited = 0
    try:
        await context.write(message)
    except grpc.aio.InternalError:
        # How gRPC tells that the connection broke before it had cancelled this task.
        raise asyncio.CancelledError from None
    call.sweeps_waited = None


def deadline_of(context: Context) -> float | None:
    """Returns the RPC's deadline on the ``time.monotonic`` clock."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _request_id(request: Any) -> str:
    """Returns the client's id for a call, or a new one."""
    inner = getattr(request, "request", request)
    return getattr(inner, "request_id", "") or uuid.uuid4().hex
