"""Back from gRPC statuses to the errors of ``jaxserve.errors``; the mirror of ``grpc/status.py``.

A status with jaxserve's ErrorInfo becomes the very class that the server raised, facts included. A
status of the network or of a proxy becomes the class that tells the caller what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve import errors

DOMAIN = "jaxserve"
_INTEGERS = {"prompt_tokens", "context_tokens", "value", "limit", "output_tokens"}
_FLOATS = {"retry_after_s", "stall_s"}


def _classes(cls: type[errors.JaxserveError]) -> list[type[errors.JaxserveError]]:
    return [cls, *(deeper for child in cls.__subclasses__() for deeper in _classes(child))]


_BY_REASON = {cls.reason: cls for cls in reversed(_classes(errors.JaxserveError))}


@dataclass(frozen=True)
class Failure:
    """A failed call: what to raise, and what may be tried before raising it."""

    error: errors.JaxserveError
    retry_after_s: float | None
    """Seconds after which the call may be tried again; None when that cannot help."""
    resumable: bool
    """Whether a stream that this broke may be continued elsewhere."""
    answered: bool = True
    """False when nobody was there, so that an earlier failure says more."""


def read_failure(error: grpc.RpcError, address: str) -> Failure:
    """Reads what a failed call says about itself.

    Args:
        error: as raised by either kind of gRPC client.
        address: of the server, for messages.
    """
    status = _rich_status(error)
    info = error_details_pb2.ErrorInfo()
    if status is not None:
        for detail in status.details:
            if detail.Unpack(info) and info.domain == DOMAIN:
                return _from_jaxserve(status, info)
    return _from_elsewhere(error, address)


def broken_stream(address: str) -> Failure:
    """Returns the failure of a stream that ended with OK and without ``finished``."""
    error = errors.RetryableError(
        f"the stream from {address} ended before the answer was finished; ask again, or pass "
        "resume=True",
        retry_after_s=0.0,
    )
    return Failure(error, retry_after_s=0.0, resumable=True)


def make_error(
    cls: type[errors.JaxserveError], message: str, reason: str, **facts: object
) -> errors.JaxserveError:
    """Builds an error whose message was written elsewhere; constructors write their own."""
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    vars(error).update(facts)
    error.reason = reason
    return error


def _from_jaxserve(status: Any, info: error_details_pb2.ErrorInfo) -> Failure:
    cls = _BY_REASON.get(info.reason, errors.JaxserveError)
    retry = error_details_pb2.RetryInfo()
    has_retry = any(detail.Unpack(retry) for detail in status.details)
    retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None
    facts = {name: _fact(name, text) for name, text in info.metadata.items() if name != "resumable"}
    return Failure(
        make_error(cls, status.message, info.reason, **facts),
        retry_after_s=retry_after_s,
        resumable=info.metadata.get("resumable") == "true",
    )


def _from_elsewhere(error: Any, address: str) -> Failure:
    """Reads a status that no jaxserve server wrote: the network, a proxy, gRPC itself."""
    code, text = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            raised = make_error(
                errors.RetryableError,
                f"no answer from the server at {address} ({text}); check that it runs and that the "
                "address is right",
                code.name,
                retry_after_s=0.0,
            )
            return Failure(raised, retry_after_s=0.0, resumable=True, answered=False)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            raised = make_error(
                errors.DeadlineExceededError,
                f"the server at {address} did not finish in time; pass a longer timeout_s or a "
                "smaller max_tokens",
                errors.DeadlineExceededError.reason,
                request_id="",
                output_tokens=0,
            )
            return Failure(raised, retry_after_s=None, resumable=False)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            raised = make_error(
                errors.InvalidRequestError,
                f"a message is larger than its receiver takes ({text}); send a shorter prompt, ask "
                "for fewer log-probabilities, or raise the limit",
                "MESSAGE_TOO_LARGE",
                field="",
            )
            return Failure(raised, retry_after_s=None, resumable=False)
    # Whatever the code: proxies break streams with INTERNAL, UNKNOWN or CANCELLED.
    raised = make_error(errors.JaxserveError, f"{code.name} from {address}: {text}", code.name)
    return Failure(raised, retry_after_s=None, resumable=code is not grpc.StatusCode.UNIMPLEMENTED)


def _rich_status(error: Any) -> Any:
    try:
        return rpc_status.from_call(error)
    except ValueError:
        return None  # A proxy has changed the code or the text, so the details are not about it.


def _fact(name: str, text: str) -> str | int | float:
    if name in _INTEGERS:
        return int(text)
    return float(text) if name in _FLOATS else text
