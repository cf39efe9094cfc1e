"""The table from error classes to statuses: one row tested per class, and what goes with each."""

from __future__ import annotations

import base64
import logging
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from jaxserve import errors
from jaxserve.frontend.grpc.status import MAX_TEXT_BYTES, row_of, to_grpc_status, to_rich_status

Code = grpc.StatusCode

ROWS = [
    (errors.InvalidRequestError("no", field="top_p"), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (errors.PromptTooLongError(9, 8), Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
    (errors.DuplicateRequestError("r"), Code.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID"),
    (errors.ModelNotFoundError("a", "b"), Code.NOT_FOUND, "MODEL_NOT_FOUND"),
    (errors.RequestNotFoundError("r"), Code.NOT_FOUND, "REQUEST_NOT_FOUND"),
    (errors.NotOfferedError("Embed", "later"), Code.UNIMPLEMENTED, "NOT_OFFERED"),
    (errors.RetryableError("later", retry_after_s=2.0), Code.UNAVAILABLE, "RETRY"),
    (
        errors.QueueFullError("tokens", 9, 8, retry_after_s=2.0),
        Code.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
    ),
    (errors.DrainingError(retry_after_s=2.0), Code.UNAVAILABLE, "DRAINING"),
    (errors.ShuttingDownError("r"), Code.UNAVAILABLE, "SHUTTING_DOWN"),
    (errors.DeadlineExceededError("r", 3), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (errors.RequestCancelledError("r"), Code.CANCELLED, "CANCELLED"),
    (errors.SlowReaderError("r", 30.0), Code.ABORTED, "SLOW_READER"),
    (errors.RequestFailedError("r", "NaN"), Code.INTERNAL, "REQUEST_POISONED"),
    (errors.EngineDeadError("boom"), Code.UNAVAILABLE, "ENGINE_DEAD"),
    (errors.JaxserveError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.GroupError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.LaunchError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.ConfigError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.MeshError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.CheckpointError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.ExecutablesError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.UnsupportedModelError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.TokenizerError("secret"), Code.INTERNAL, "INTERNAL"),
    (errors.MemoryPlanError("secret"), Code.INTERNAL, "INTERNAL"),
    (ValueError("secret"), Code.INTERNAL, "INTERNAL"),
]
RETRYABLE = {
    "RetryableError",
    "QueueFullError",
    "DrainingError",
    "ShuttingDownError",
    "EngineDeadError",
}
RESUMABLE = {"DrainingError", "ShuttingDownError", "SlowReaderError", "EngineDeadError"}


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


def kinds(status: status_pb2.Status) -> list[str]:
    return [detail.TypeName().rsplit(".", 1)[1] for detail in status.details]


def every_class(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(every_class(child) for child in root.__subclasses__()))


def name_of(value: object) -> str:
    return type(value).__name__ if isinstance(value, Exception) else ""


@pytest.mark.parametrize(("error", "code", "reason"), ROWS, ids=name_of)
def test_every_error_has_its_code_and_reason(error, code, reason):
    status = to_rich_status(error, request_id="r")
    info = info_of(status)

    assert status.code == code.value[0]
    assert (info.reason, info.domain) == (reason, "jaxserve")
    assert ("RetryInfo" in kinds(status)) is (name_of(error) in RETRYABLE)
    assert row_of(error).retryable is (name_of(error) in RETRYABLE)
    assert (info.metadata.get("resumable") == "true") is (name_of(error) in RESUMABLE)
    assert "secret" not in str(status)


def test_no_class_of_the_tree_is_left_out():
    """Other modules' launch errors, imported or not, fall to the row of ``LaunchError``."""
    tested = {type(error) for error, _, _ in ROWS}
    tree = {cls for cls in every_class(errors.JaxserveError) if cls.__module__ == errors.__name__}

    assert tree <= tested


def test_a_bad_request_carries_its_field_and_facts():
    status = to_rich_status(errors.PromptTooLongError(9, 8), request_id="r")
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)

    assert bad.field_violations[0].field == "prompt"
    assert bad.field_violations[0].description == status.message
    assert dict(info_of(status).metadata) == {
        "request_id": "r",
        "field": "prompt",
        "prompt_tokens": "9",
        "context_tokens": "8",
    }


def test_the_time_to_come_back_is_exact():
    retry = error_details_pb2.RetryInfo()
    assert to_rich_status(errors.DrainingError(retry_after_s=0.25)).details[1].Unpack(retry)

    assert retry.retry_delay.ToNanoseconds() == 250_000_000


@pytest.mark.parametrize("letter", ["m", "я", "中", "😀"])
def test_text_that_quotes_a_client_is_cut_to_fit_a_header(letter):
    quoted = letter * 100_000
    status = to_rich_status(errors.ModelNotFoundError(quoted, "served"), request_id=quoted)

    assert MAX_TEXT_BYTES - 4 < len(status.message.encode()) <= MAX_TEXT_BYTES
    assert status.message.endswith("…")
    message_header = quote(status.message)
    details_header = base64.b64encode(status.SerializeToString())
    assert len(message_header) + len(details_header) < 7000


def test_a_defect_is_logged_once_and_a_refusal_never(caplog):
    caplog.set_level(logging.INFO)
    to_grpc_status(errors.InvalidRequestError("no", field="n"), request_id="r")
    assert not caplog.records
    status = to_grpc_status(RuntimeError("secret"), request_id="r7")

    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert status.details == "internal error; tell the operator request id r7"


def test_without_a_request_id_the_text_says_so():
    assert to_rich_status(RuntimeError()).message.endswith("request id unknown")
