"""GenerationService over a real socket: what is refused, and every way a call can end."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from jaxserve.engine.request import FinishReason
from jaxserve.errors import (
    EngineDeadError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
)
from jaxserve.frontend.calls import SWEEPS_PER_STALL, OpenCalls
from jaxserve.v1 import generation_pb2 as pb
from tests.frontend.grpc.asking import all_of, ask, details, fail

Code = grpc.StatusCode

# -- bad input -------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
BAD = [
    ({"text": ""}, "prompt", "prompt is empty; send at least one token"),
    ({"text": None}, "prompt", "prompt needs exactly one of text, token_ids and chat, got 0"),
    ({"text": None, "token_ids": pb.TokenIds()}, "prompt", "prompt is empty"),
    ({"text": None, "chat": pb.Chat()}, "chat", "this model has no chat template"),
    ({"text": "x" * 64}, "prompt", "prompt has 64 tokens and the context window is 64; send at"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 1, got -1"),
    ({"max_tokens": 63}, "max_tokens", "max_tokens is 63 but a prompt of 2 tokens leaves room"),
    ({"min_tokens": -1}, "min_tokens", "min_tokens must be at least 0, got -1"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "min_tokens must be 0 to 2, got 3"),
    ({"temperature": -0.5}, "temperature", "temperature must be a finite number, 0 to 100, got"),
    ({"temperature": NAN}, "temperature", "got nan"),
    ({"temperature": INFINITY}, "temperature", "got inf"),
    ({"top_p": 0.0}, "top_p", "top_p must be a finite number, above 0 and at most 1, got 0"),
    ({"top_p": 1.5}, "top_p", "got 1.5"),
    ({"top_k": -2}, "top_k", "top_k must be at least 0, got -2"),
    ({"min_p": -1.0}, "min_p", "min_p must be a finite number, 0 to 1, got -1"),
    ({"presence_penalty": 2.5}, "presence_penalty", "-2 to 2, got 2.5"),
    ({"frequency_penalty": NAN}, "frequency_penalty", "got nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0 and at most 100, got 0"),
    ({"n": 0}, "n", "n must be 1 to 64, got 0"),
    ({"n": 65}, "n", "n must be 1 to 64, got 65"),
    ({"stop": ["a"] * 17}, "stop", "stop has 17 entries and the limit is 16; send fewer"),
    ({"stop": [""]}, "stop", "stop holds an empty string"),
    ({"stop": ["a" * 257]}, "stop", "stop holds a string of 257 characters and the limit is 256"),
    ({"stop_token_ids": [259]}, "stop_token_ids", "token id 259; this model's ids are 0 to 258"),
    ({"logit_bias": {259: 1.0}}, "logit_bias", "logit_bias holds token id 259"),
    ({"logit_bias": {5: INFINITY}}, "logit_bias", "must be a finite number, -100 to 100, got inf"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids", "holds token id -1"),
    ({"banned_token_ids": [999]}, "banned_token_ids", "holds token id 999"),
    ({"logprobs": 21}, "logprobs", "logprobs must be 0 to 20, got 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs must be 0 to 20, got -1"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be at least 1, got 0"),
    ({"priority": 1_000_001}, "priority", "-1000000 to 1000000, got 1000001"),
    ({"cache_salt": "s" * 129}, "cache_salt", "cache_salt has 129 characters and the limit is 128"),
    ({"request_id": "i" * 129}, "request_id", "request_id has 129 characters"),
    ({"text": None, "token_ids": pb.TokenIds(ids=[5, 259])}, "token_ids", "holds token id 259"),
    ({"text": None, "token_ids": pb.TokenIds(ids=[-1])}, "token_ids", "holds token id -1"),
    ({"resume": pb.Resume(token_ids=[300])}, "resume", "resume holds token id 300"),
    ({"resume": pb.Resume(token_ids=[5]), "n": 2, "seed": 1}, "resume", "resume needs n = 1"),
    ({"resume": pb.Resume(token_ids=[5])}, "seed", "needs the seed that `started` reported"),
    ({"resume": pb.Resume(token_ids=[2]), "seed": 1}, "resume", "resume ends with token 2"),
    ({"echo": True, "text": None, "token_ids": pb.TokenIds(ids=[999])}, "token_ids", "id 999"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "field", "text"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_names_the_field_and_the_next_request_is_answered(
    scripted, serving, fields, field, text
):
    engine = scripted("fine")
    stubs = serving.stubs(serving.start(engine))
    error = fail(stubs.generation.Generate(ask(**fields)))

    found, message = details(error)
    assert error.code() is Code.INVALID_ARGUMENT
    assert text in message
    (violation,) = found["BadRequest"].field_violations
    assert violation.field == field
    assert found["ErrorInfo"].domain == "jaxserve"
    assert "RetryInfo" not in found
    assert "fine" in "".join(e.delta.text for e in stubs.generation.Generate(ask()))
    assert not engine.live


def test_a_resumed_answer_that_had_met_its_stop_string_is_refused(engine, stubs):
    resume = pb.Resume(token_ids=engine.ids("ab##"))
    error = fail(stubs.generation.Generate(ask(seed=1, stop=["##"], resume=resume)))

    assert error.code() is Code.INVALID_ARGUMENT
    assert "resume already contains the stop string '##'" in error.details()


@pytest.mark.parametrize("role", [0, 9])
def test_an_unknown_role_names_the_message(engine, serving, role):
    stubs = serving.stubs(serving.start(engine))
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="hi"),
            pb.ChatMessage(role=role, content="hi"),
        ]
    )
    error = fail(stubs.generation.Generate(pb.GenerateRequest(chat=chat)))
    found, message = details(error)

    assert error.code() is Code.INVALID_ARGUMENT
    assert found["BadRequest"].field_violations[0].field == "chat.messages[1].role"
    assert f"chat.messages[1].role is {role}; it must be 1 (system)" in message


def test_an_unknown_model_is_named_with_the_one_that_is_served(engine, stubs):
    for method, request in [
        (stubs.generation.Generate, ask(model="other")),
        (stubs.generation.Tokenize, pb.TokenizeRequest(model="other", text="x")),
        (stubs.generation.Detokenize, pb.DetokenizeRequest(model="other")),
        (stubs.generation.CountTokens, pb.CountTokensRequest(model="other", text="x")),
        (stubs.generation.Score, pb.ScoreRequest(model="other", text="x")),
    ]:
        with pytest.raises(grpc.RpcError) as caught:
            all_of(method(request))
        found, message = details(caught.value)
        assert caught.value.code() is Code.NOT_FOUND
        assert "model 'other' is not served here; this server serves 'scripted'" in message
        assert found["ResourceInfo"].resource_type == "model"
        assert found["ErrorInfo"].reason == "MODEL_NOT_FOUND"


def test_the_served_model_may_be_named(scripted, serving):
    stubs = serving.stubs(serving.start(scripted("x")))

    assert list(stubs.generation.Generate(ask(model="scripted")))


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(engine, stubs):
    first = stubs.generation.Generate(ask())
    engine.wait_request()
    error = fail(stubs.generation.Generate(ask()))
    found, message = details(error)
    engine.start("r")
    engine.finish("r")

    assert error.code() is Code.ALREADY_EXISTS
    assert "request_id 'r' is in use by a live request" in message
    assert found["BadRequest"].field_violations[0].field == "request_id"
    assert len(list(first)) == 2


def test_a_full_queue_says_when_to_come_back(engine, stubs):
    engine.refusals = [QueueFullError("requests", 9, 9, retry_after_s=1.5)]
    error = fail(stubs.generation.Generate(ask()))
    found, message = details(error)

    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "the queue is full (9 requests, limit 9)" in message
    assert found["RetryInfo"].retry_delay.ToNanoseconds() == 1_500_000_000
    assert found["ErrorInfo"].reason == "QUEUE_FULL"


def test_a_message_over_the_size_limit_is_refused_and_the_connection_lives(scripted, serving):
    stubs = serving.stubs(serving.start(scripted("x"), max_message_bytes=10_000))
    error = fail(stubs.generation.Generate(ask(text="x" * 10_001)))

    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "10000" in error.details()
    assert list(stubs.generation.Generate(ask()))


def test_bytes_that_are_no_message_are_refused(scripted, serving):
    stubs = serving.stubs(serving.start(scripted("x")))
    raw = stubs.channel.unary_stream("/jaxserve.v1.GenerationService/Generate")
    error = fail(raw(b"\xff\xff\xff"))

    assert error.code() is Code.INVALID_ARGUMENT
    assert "the bytes received are not a request of /jaxserve.v1.GenerationServ" in error.details()
    assert list(stubs.generation.Generate(ask()))


def test_a_deadline_already_past_never_reaches_the_engine(engine, stubs):
    error = fail(stubs.generation.Generate(ask(), timeout=-1))

    assert error.code() is Code.DEADLINE_EXCEEDED
    assert engine.requests == []


def test_the_deadline_of_the_rpc_is_the_requests(engine, stubs):
    before = time.monotonic()
    call = stubs.generation.Generate(ask(), timeout=100)
    deadline_s = engine.wait_request().deadline_s
    call.cancel()

    # The wire carries whole seconds at this length, rounded up.
    assert before + 99 < deadline_s < time.monotonic() + 102


def test_aborting_an_unknown_id_says_so(engine, stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.generation.Abort(pb.AbortRequest(request_id="nobody"))
    found, message = details(caught.value)

    assert caught.value.code() is Code.NOT_FOUND
    assert "no live request has the id 'nobody'" in message
    assert found["ResourceInfo"].resource_type == "request"


def test_aborting_without_an_id_says_so(engine, stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.generation.Abort(pb.AbortRequest())

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "request_id is empty" in str(caught.value.details())


# -- how calls end ---------------------------------------------------------------------------------


def test_a_client_that_leaves_while_queued_frees_its_request(engine, stubs):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    call.cancel()

    engine.wait(lambda: engine.closed == ["r"])


def test_a_client_that_leaves_before_the_first_token_frees_its_request(engine, stubs):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    engine.start("r")
    next(call)
    call.cancel()

    engine.wait(lambda: engine.closed == ["r"])


def test_a_client_that_leaves_in_mid_stream_frees_its_request(engine, stubs):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    engine.start("r")
    engine.give("r", "abc")
    assert [next(call).WhichOneof("event") for _ in range(2)] == ["started", "delta"]
    call.cancel()

    engine.wait(lambda: engine.closed == ["r"])


def test_a_client_whose_connection_breaks_frees_its_request(engine, serving):
    stubs = serving.stubs(serving.start(engine))
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    stubs.channel.close()

    engine.wait(lambda: engine.closed == ["r"])
    assert call.code() is Code.CANCELLED


def test_a_client_that_leaves_a_unary_call_or_a_score_frees_its_request(engine, stubs):
    unary = stubs.generation.GenerateUnary.future(pb.GenerateUnaryRequest(request=ask()))
    score = stubs.generation.Score.future(pb.ScoreRequest(request_id="s", text="hi"))
    engine.wait(lambda: len(engine.live) == 2)
    unary.cancel()
    score.cancel()

    engine.wait(lambda: sorted(engine.closed) == ["r", "s"])


def test_a_deadline_in_mid_stream_frees_the_request(engine, stubs):
    call = stubs.generation.Generate(ask(), timeout=0.2)
    engine.wait_request()
    error = fail(call)

    assert error.code() is Code.DEADLINE_EXCEEDED
    engine.wait(lambda: engine.closed == ["r"])


ENDS = [
    (RequestCancelledError("r"), Code.CANCELLED, "CANCELLED", False),
    (RequestFailedError("r", "NaN logits"), Code.INTERNAL, "REQUEST_POISONED", False),
    (EngineDeadError("boom"), Code.UNAVAILABLE, "ENGINE_DEAD", True),
]


@pytest.mark.parametrize(("error", "code", "reason", "resumable"), ENDS, ids=lambda v: str(v)[:20])
def test_an_engine_error_in_mid_stream_becomes_the_status(
    engine, stubs, error, code, reason, resumable
):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    engine.start("r")
    engine.give("r", "ab")
    engine.finish("r", FinishReason.ERROR, tokens=2, error=error)
    received = [next(call), next(call)]
    raised = fail(call)
    found, message = details(raised)

    assert received[1].delta.text == "ab"
    assert raised.code() is code
    assert message == str(error)
    assert found["ErrorInfo"].reason == reason
    assert (found["ErrorInfo"].metadata.get("resumable") == "true") is resumable


def test_a_defect_is_told_to_the_log_and_not_to_the_client(engine, stubs, caplog):
    engine.refusals = [KeyError("/secret/path")]
    error = fail(stubs.generation.Generate(ask()))
    found, message = details(error)

    assert error.code() is Code.INTERNAL
    assert message == "internal error; tell the operator request id r"
    assert found["ErrorInfo"].reason == "INTERNAL"
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "request r failed unexpectedly" in record.getMessage()


def test_one_requests_defect_leaves_the_others_alone(engine, stubs):
    other = stubs.generation.Generate(ask(request_id="other"))
    engine.wait_request()
    engine.refusals = [ZeroDivisionError()]
    fail(stubs.generation.Generate(ask()))
    engine.start("other")
    engine.finish("other")

    assert len(list(other)) == 2


def test_a_client_that_does_not_read_is_ended_and_others_are_not_slowed(scripted, serving):
    """Messages of 60 KB fill the windows of a client that never reads; the stall timer ends it."""
    engine = scripted()
    address = serving.start(engine, stall_timeout_s=0.3)
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    deaf = serving.stubs(address, narrow).generation.Generate(ask(request_id="deaf"))
    engine.wait_request()
    engine.start("deaf")
    letters = [engine.ids("x")[0]] * 20_000
    messages = 0
    while "deaf" in engine.live:
        engine.give("deaf", letters)
        engine.wait_taken("deaf")
        messages += 1
        if messages == 1:
            good = serving.stubs(address).generation.Generate(ask(request_id="good"))
            engine.wait_request(1)
            engine.start("good")
            engine.give("good", "ab")
            engine.finish("good", tokens=2)
            assert "".join(event.delta.text for event in good) == "ab"

    assert engine.closed == ["deaf"]
    assert messages * 60_000 < 2**20, "a client that does not read has a bounded share of memory"
    error = fail(deaf)
    found, message = details(error)
    assert error.code() is Code.ABORTED
    assert "the client of request 'deaf' read nothing for 0.3 s; read the stream as" in message
    assert found["ErrorInfo"].reason == "SLOW_READER"
    assert found["ErrorInfo"].metadata["resumable"] == "true"


def test_a_server_that_stood_still_does_not_blame_its_clients():
    """However long the process was stopped, the timer meets an unfinished write once after it."""

    async def stand_still() -> tuple[int | None, Exception | None]:
        calls = OpenCalls(stall_timeout_s=0.8)
        watch = asyncio.create_task(calls.watch_stalls())
        with calls.open("r") as call:
            call.sweeps_waited = 0
            await asyncio.sleep(0.15)
            asyncio.get_running_loop().call_soon(time.sleep, 1.0)
            await asyncio.sleep(0.01)
            watch.cancel()
            return call.sweeps_waited, call.error

    met, error = asyncio.run(stand_still())

    assert error is None
    assert met is not None
    assert 1 <= met < SWEEPS_PER_STALL
