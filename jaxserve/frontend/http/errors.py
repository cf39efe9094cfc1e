"""From jaxserve errors to HTTP: the one table, in the form that OpenAI's clients read."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from starlette.responses import JSONResponse

from jaxserve import errors

MAX_MESSAGE_CHARS = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """How one class of errors is told to HTTP clients."""

    status: int
    type: str
    code: str | None = None
    shown: bool = True
    """False: the message is for the operator's log; the client gets a request id instead."""


TABLE: dict[type[errors.JaxserveError], Row] = {
    errors.InvalidRequestError: Row(400, "invalid_request_error"),
    errors.PromptTooLongError: Row(400, "invalid_request_error", "context_length_exceeded"),
    errors.DuplicateRequestError: Row(409, "invalid_request_error", "duplicate_request_id"),
    errors.ModelNotFoundError: Row(404, "invalid_request_error", "model_not_found"),
    errors.RequestNotFoundError: Row(404, "invalid_request_error", "request_not_found"),
    errors.QueueFullError: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.RetryableError: Row(503, "service_unavailable_error"),
    errors.DeadlineExceededError: Row(504, "timeout_error"),
    errors.RequestCancelledError: Row(499, "cancelled_error", "request_cancelled"),
    errors.SlowReaderError: Row(408, "timeout_error", "slow_reader"),
    errors.RequestFailedError: Row(500, "server_error", "request_failed"),
    errors.EngineDeadError: Row(503, "service_unavailable_error"),
    errors.JaxserveError: Row(500, "server_error", shown=False),
}
"""Looked up along the class's ancestors, nearest first, as ``frontend/grpc/status.py`` does."""
UNKNOWN = Row(500, "server_error", shown=False)


def row_of(error: BaseException) -> Row:
    """Returns the table's row for an error; a hidden 500 for anything not in it."""
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), UNKNOWN)


Names = Mapping[str, str]
"""What a route's clients call the fields of a request, by what errors call them."""


def body_of(
    error: BaseException, *, request_id: str = "", names: Names = MappingProxyType({})
) -> dict[str, Any]:
    """Describes an error as OpenAI does; logs hidden ones, once."""
    row = row_of(error)
    param = error.field if isinstance(error, errors.InvalidRequestError) else ""
    if row.shown:
        message = str(error)[:MAX_MESSAGE_CHARS]
        for inner, outer in names.items():
            if re.match(rf"{re.escape(inner)}(?![a-z_])", param):
                param = outer + param[len(inner) :]
                # "prompt has 9,000 tokens" is what anybody calls it.
                if message.startswith(inner) and inner != "prompt":
                    message = outer + message[len(inner) :]
                break
    else:
        logger.error("request %s failed unexpectedly", request_id or "-", exc_info=error)
        message = f"internal error; tell the operator request id {request_id or 'unknown'}"
    return error_body(message, type=row.type, param=param or None, code=row.code)


def error_body(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The shape of every error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def response_of(
    error: BaseException, *, request_id: str = "", names: Names = MappingProxyType({})
) -> JSONResponse:
    """Returns what ends a request that has not been answered yet."""
    headers = {}
    if isinstance(error, errors.RetryableError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    row = row_of(error)
    return JSONResponse(body_of(error, request_id=request_id, names=names), row.status, headers)


def refusal(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """Returns an error of the protocol itself."""
    body = error_body(message, type="invalid_request_error", param=param, code=code)
    return JSONResponse(body, status)
