"""From jaxserve errors to gRPC statuses: the one table, and the details that go with it.

What a client sees of an error is decided here and nowhere else: the code, whether retrying helps,
whether a broken stream can be resumed, and the facts. ``frontend/client_errors.py`` reads it back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from jaxserve import errors

DOMAIN = "jaxserve"
"""``google.rpc.ErrorInfo.domain`` of every error raised on purpose."""
MAX_TEXT_BYTES = 512
"""Longest message, in UTF-8. Statuses travel as HTTP/2 headers, which peers limit to 8 KiB in all;
a message may quote what a client sent, stands in the status three times, and once percent-encoded,
where a byte takes three."""
MAX_FACT_BYTES = 256
"""Longest single fact."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """How one class of errors is told to clients."""

    code: grpc.StatusCode
    retryable: bool = False
    """The same request may succeed later or on another server."""
    resumable: bool = False
    """A stream that this error breaks can be continued elsewhere with ``resume``."""
    shown: bool = True
    """False: the message is for the operator's log; the client gets a request id instead."""


C = grpc.StatusCode
TABLE: dict[type[errors.JaxserveError], Row] = {
    errors.InvalidRequestError: Row(C.INVALID_ARGUMENT),
    errors.PromptTooLongError: Row(C.INVALID_ARGUMENT),
    errors.DuplicateRequestError: Row(C.ALREADY_EXISTS),
    errors.ModelNotFoundError: Row(C.NOT_FOUND),
    errors.RequestNotFoundError: Row(C.NOT_FOUND),
    errors.NotOfferedError: Row(C.UNIMPLEMENTED),
    errors.RetryableError: Row(C.UNAVAILABLE, retryable=True),
    errors.QueueFullError: Row(C.RESOURCE_EXHAUSTED, retryable=True),
    errors.DrainingError: Row(C.UNAVAILABLE, retryable=True, resumable=True),
    errors.ShuttingDownError: Row(C.UNAVAILABLE, retryable=True, resumable=True),
    errors.DeadlineExceededError: Row(C.DEADLINE_EXCEEDED),
    errors.RequestCancelledError: Row(C.CANCELLED),
    errors.SlowReaderError: Row(C.ABORTED, resumable=True),
    errors.RequestFailedError: Row(C.INTERNAL),
    errors.EngineDeadError: Row(C.UNAVAILABLE, retryable=True, resumable=True),
    errors.JaxserveError: Row(C.INTERNAL, shown=False),
}
"""Looked up along the class's ancestors, nearest first; every class of ``errors.py`` has a row or
an ancestor with one. Operator errors (``LaunchError``, ``GroupError``) fall to the last row."""

UNKNOWN = Row(C.INTERNAL, shown=False)


def row_of(error: BaseException) -> Row:
    """Returns the table's row for an error; a hidden INTERNAL for anything not in it."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return UNKNOWN


def to_rich_status(error: BaseException, *, request_id: str = "") -> status_pb2.Status:
    """Describes an error for a client.

    Args:
        error: anything; what was not raised on purpose becomes INTERNAL with nothing but the
            request id.
        request_id: "" when there is none.
    """
    row = row_of(error)
    request_id = _clip(request_id, MAX_FACT_BYTES)
    metadata = {"request_id": request_id} if request_id else {}
    details: list[message.Message] = []
    if row.shown and isinstance(error, errors.JaxserveError):
        text, reason = _clip(str(error), MAX_TEXT_BYTES), error.reason
        metadata |= {name: _clip(str(value), MAX_FACT_BYTES) for name, value in vars(error).items()}
        details = _typed_details(error, text)
    else:
        text = f"internal error; tell the operator request id {request_id or 'unknown'}"
        reason = errors.JaxserveError.reason
    if row.resumable:
        metadata["resumable"] = "true"
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    return status_pb2.Status(
        code=_number(row.code), message=text, details=[_pack(item) for item in (info, *details)]
    )


def to_grpc_status(error: BaseException, *, request_id: str = "") -> grpc.Status:
    """Returns what ``context.abort_with_status`` takes, and logs hidden errors, once."""
    if not row_of(error).shown:
        log.error("request %s failed unexpectedly", request_id or "-", exc_info=error)
    return rpc_status.to_status(to_rich_status(error, request_id=request_id))


def _typed_details(error: errors.JaxserveError, text: str) -> list[message.Message]:
    """Returns the google.rpc messages that generic clients understand."""
    match error:
        case errors.InvalidRequestError():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=error.field, description=text, reason=error.reason
            )
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case errors.RetryableError():
            return [_retry(error.retry_after_s)]
        case errors.EngineDeadError():
            return [_retry(1.0)]
        case errors.ModelNotFoundError():
            kind, name = "model", error.model
        case errors.RequestNotFoundError():
            kind, name = "request", error.request_id
        case _:
            return []
    return [
        error_details_pb2.ResourceInfo(
            resource_type=kind, resource_name=_clip(name, MAX_FACT_BYTES), description=text
        )
    ]


def _retry(delay_s: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(max(delay_s, 0.0) * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _number(code: grpc.StatusCode) -> int:
    return code_pb2.Code.Value(code.name)


def _pack(item: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(item)
    return packed


def _clip(text: str, limit: int) -> str:
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode("utf-8", errors="ignore") + "…"
