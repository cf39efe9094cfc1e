"""Requests of the generation service, and how their calls end."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve.v1 import generation_pb2 as pb


def ask(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"request_id": "r", "text": "hi", **fields})


def details(error: Any) -> tuple[dict[str, Any], str]:
    """Returns the typed details of a failed call by message name, and its text."""
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for detail in status.details:
        kind = detail.TypeName().rsplit(".", 1)[1]
        message = getattr(error_details_pb2, kind)()
        detail.Unpack(message)
        found[kind] = message
    return found, status.message


def all_of(result: Any) -> list[Any]:
    """Returns the messages of either kind of call."""
    return list(result) if hasattr(result, "__next__") else [result]


def fail(call: Any) -> Any:
    """Runs a call to its end and returns the error that it ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value
