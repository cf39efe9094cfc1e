"""Bytes that are no message become INVALID_ARGUMENT; gRPC itself would log a defect for each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

PREFIXES = ("/jaxserve.v1.", "/vllm.grpc.engine.", "/inference.")
"""Services that are answered by this package; those of libraries keep gRPC's behaviour."""


@dataclass(frozen=True)
class Malformed:
    """Stands for a request whose bytes could not be read; ``answered`` refuses it."""

    method: str


class RequestDecoding(grpc.aio.ServerInterceptor):
    """Replaces the request decoder of every method by one that does not raise."""

    def __init__(self) -> None:
        """Begins with no method seen."""
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler, changed once and then remembered."""
        method: Any = handler_call_details.method  # str; the stubs leave it untyped.
        if not method.startswith(PREFIXES):
            return await continuation(handler_call_details)
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # Not remembered: clients can make up any number of names.
            self._handlers[method] = _replaced(handler, method)
        return self._handlers[method]


def _replaced(handler: Any, method: str) -> Any:
    def decode(raw: bytes) -> Any:
        try:
            return handler.request_deserializer(raw)
        except DecodeError:
            return Malformed(method)

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(
            handler.stream_stream, decode, handler.response_serializer
        )
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            handler.unary_stream, decode, handler.response_serializer
        )
    return grpc.unary_unary_rpc_method_handler(
        handler.unary_unary, decode, handler.response_serializer
    )
