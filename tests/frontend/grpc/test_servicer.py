"""GenerationService over a real socket: order of messages, fields, and every way a call can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.errors import (
    EngineDeadError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
)
from jaxserve.frontend.grpc.calls import SWEEPS_PER_STALL, OpenCalls
from jaxserve.frontend.template import ChatTemplate
from jaxserve.v1 import generation_pb2 as pb

Code = grpc.StatusCode


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


# -- the answer's stream ---------------------------------------------------------------------------


def test_a_stream_is_started_then_deltas_then_finished(engine, stubs):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    engine.start("r", cached=2)
    started = next(call).started
    engine.give("r", "ab")
    first = next(call).delta
    engine.give("r", "c", first=2)
    engine.finish("r", FinishReason.LENGTH, tokens=3)
    rest = list(call)

    assert (started.request_id, started.model_digest, started.seed_used) == ("r", "d1", 41)
    assert (started.cached_tokens, started.prompt_tokens) == (2, 2)
    assert (first.first_index, first.text, list(first.token_ids)) == (0, "ab", engine.ids("ab"))
    assert [message.WhichOneof("event") for message in rest] == ["delta", "finished"]
    assert (rest[0].delta.first_index, rest[0].delta.text) == (2, "c")
    finished = rest[1].finished
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.usage == pb.Usage(prompt_tokens=5, output_tokens=3, cached_tokens=1)
    assert finished.timing == pb.Timing(
        queue_seconds=0.25, first_token_seconds=0.5, total_seconds=1.0
    )
    assert not finished.HasField("stop_token_id")
    assert call.code() is Code.OK


def test_an_empty_request_id_is_replaced_by_the_server(engine, stubs):
    call = stubs.generation.Generate(pb.GenerateRequest(text="hi"))
    request_id = engine.wait_request().request_id
    engine.start(request_id)

    assert next(call).started.request_id == request_id
    assert len(request_id) == 32


def test_every_sampling_field_reaches_the_engine(engine, stubs):
    given = {
        "max_tokens": 9, "min_tokens": 1, "temperature": 0.5, "top_p": 0.25, "top_k": 3,
        "min_p": 0.125, "seed": 2**64 - 1, "presence_penalty": 1.5, "frequency_penalty": -1.5,
        "repetition_penalty": 2.0, "n": 2, "logprobs": 4, "prompt_logprobs": 0,
        "include_stop": True, "ignore_eos": True,
    }  # fmt: skip
    call = stubs.generation.Generate(
        ask(
            **given,
            stop=["x", "yz"],
            stop_token_ids=[5],
            logit_bias={7: -2.5},
            allowed_token_ids=[7, 8],
            banned_token_ids=[8],
            priority=-3,
            cache_salt="salt",
        )
    )
    request = engine.wait_request()
    call.cancel()

    assert {name: getattr(request.sampling, name) for name in given} == given
    assert request.sampling.stop == ("x", "yz")
    assert request.sampling.stop_token_ids == (5,)
    assert request.sampling.logit_bias == {7: -2.5}
    assert request.sampling.allowed_token_ids == (7, 8)
    assert request.sampling.banned_token_ids == (8,)
    assert (request.priority, request.cache_salt) == (-3, "salt")


def test_absent_fields_take_the_defaults_and_zero_is_not_absent(engine, stubs):
    calls = [
        stubs.generation.Generate(ask(temperature=0.0, seed=0, request_id="zero")),
        stubs.generation.Generate(ask(request_id="absent")),
    ]
    engine.wait(lambda: len(engine.requests) == 2)
    assert len(calls) == 2  # A call that nobody holds is cancelled.
    by_id = {request.request_id: request.sampling for request in engine.requests}

    assert (by_id["zero"].temperature, by_id["zero"].seed) == (0.0, 0)
    assert (by_id["absent"].temperature, by_id["absent"].seed) == (1.0, None)


def test_token_ids_are_used_as_they_are(engine, stubs):
    call = stubs.generation.Generate(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4, 250, 4]), truncate_prompt_tokens=2)
    )

    assert list(engine.wait_request().prompt) == [250, 4]
    call.cancel()


SAY_ALL = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def template() -> Iterator[Callable[[str], ChatTemplate]]:
    """Makes chat templates, and ends their processes after the test."""
    with ExitStack() as stack:
        yield lambda source: stack.enter_context(ChatTemplate(source, source="the test"))


@pytest.mark.parametrize(("header", "end"), [(None, ">"), (True, ">"), (False, "")])
def test_chat_is_rendered_with_the_models_template(engine, serving, template, header, end):
    stubs = serving.stubs(serving.start(engine, template=template(SAY_ALL)))
    messages = [
        pb.ChatMessage(role=pb.CHAT_ROLE_SYSTEM, content="s"),
        pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="u"),
        pb.ChatMessage(role=pb.CHAT_ROLE_ASSISTANT, content="a"),
        pb.ChatMessage(role=pb.CHAT_ROLE_TOOL, content="t"),
    ]
    call = stubs.generation.Generate(
        pb.GenerateRequest(chat=pb.Chat(messages=messages, add_generation_prompt=header))
    )

    rendered = "system:s|user:u|assistant:a|tool:t|" + end
    assert list(engine.wait_request().prompt) == engine.ids(rendered)
    call.cancel()


def test_choices_are_told_apart(engine, stubs):
    call = stubs.generation.Generate(ask(n=2))
    engine.wait_request()
    engine.start("r")
    engine.give("r", "b", choice=1)
    engine.give("r", "a")
    engine.finish("r", tokens=1)
    engine.give("r", "B", first=1, choice=1)
    engine.finish("r", tokens=2, choice=1)
    events = list(call)

    texts = {0: "", 1: ""}
    for event in events:
        texts[event.delta.choice] += event.delta.text
    assert texts == {0: "a", 1: "bB"}
    ends = [event.finished.choice for event in events if event.HasField("finished")]
    assert sorted(ends) == [0, 1]


def test_tokens_that_wait_behind_one_write_share_the_next_message(engine, stubs):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    engine.put("r", [])
    engine.start("r")
    engine.give("r", "abcde")
    engine.finish("r", tokens=5)

    assert [message.delta.text for message in call if message.HasField("delta")] == ["abcde"]


def test_half_a_character_waits_for_its_other_half(engine, stubs):
    call = stubs.generation.Generate(ask())
    engine.wait_request()
    engine.start("r")
    next(call)
    first, second = engine.ids("é")
    engine.give("r", [first])
    half = next(call).delta
    engine.give("r", [second], first=1)
    whole = next(call).delta

    assert (half.text, list(half.token_ids)) == ("", [first])
    assert (whole.text, list(whole.token_ids)) == ("é", [second])


def test_a_stop_string_ends_the_answer_at_its_token(engine, stubs):
    call = stubs.generation.Generate(ask(stop=["##"]))
    engine.wait_request()
    engine.start("r")
    engine.give("r", "ab#")
    engine.give("r", "# later", first=3)
    engine.wait(lambda: engine.stops == [("r", 0)])
    engine.finish("r", FinishReason.LENGTH, tokens=11)
    events = list(call)

    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(delta.text for delta in deltas) == "ab"
    assert [t for delta in deltas for t in delta.token_ids] == engine.ids("ab##")
    finished = events[-1].finished
    assert finished.reason == pb.FINISH_REASON_STOP
    assert finished.stop_string == "##"
    assert finished.usage.output_tokens == 4


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab<|im_end|>")])
def test_the_end_token_is_delivered_and_its_text_only_when_asked_for(engine, stubs, include, text):
    call = stubs.generation.Generate(ask(include_stop=include))
    engine.wait_request()
    engine.start("r")
    engine.give("r", [*engine.ids("ab"), 2])
    engine.finish("r", tokens=3, stop_token_id=2)
    events = list(call)

    assert "".join(event.delta.text for event in events) == text
    assert [t for event in events for t in event.delta.token_ids] == [*engine.ids("ab"), 2]
    assert events[-1].finished.stop_token_id == 2


def test_logprobs_come_with_the_tokens_text_and_bytes(engine, stubs):
    call = stubs.generation.Generate(ask(logprobs=1))
    engine.wait_request()
    engine.start("r")
    letter = engine.ids("a")[0]
    half = engine.ids("é")[0]
    engine.give("r", [letter], logprobs=TokenLogprobs(-0.25, 2, (half,), (-0.125,)))
    engine.finish("r", tokens=1)
    (entry,) = list(call)[1].delta.logprobs

    assert (entry.token_id, entry.logprob, entry.rank) == (letter, -0.25, 2)
    assert (entry.token_text, entry.token_bytes) == ("a", b"a")
    (top,) = entry.top
    assert (top.token_id, top.logprob) == (half, -0.125)
    assert (top.token_text, top.token_bytes) == ("\N{REPLACEMENT CHARACTER}", b"\xc3")


def test_echo_gives_the_prompt_first(engine, stubs):
    call = stubs.generation.Generate(ask(echo=True, prompt_logprobs=0))
    engine.wait_request()
    engine.start("r", prompt_logprobs=(None, TokenLogprobs(-1.5, 4)))
    engine.give("r", "!")
    engine.finish("r", tokens=1)
    _, prompt, answer, _ = list(call)

    assert prompt.delta.prompt
    assert (prompt.delta.text, list(prompt.delta.token_ids)) == ("hi", engine.ids("hi"))
    assert not prompt.delta.logprobs[0].HasField("logprob")
    assert (prompt.delta.logprobs[1].logprob, prompt.delta.logprobs[1].rank) == (-1.5, 4)
    assert (answer.delta.prompt, answer.delta.first_index, answer.delta.text) == (False, 0, "!")


def test_a_resumed_answer_goes_on_where_it_was(engine, stubs):
    half, rest = engine.ids("é")
    call = stubs.generation.Generate(
        ask(seed=3, resume=pb.Resume(token_ids=[*engine.ids("a"), half]))
    )
    assert list(engine.wait_request().resume) == [*engine.ids("a"), half]
    engine.start("r")
    engine.give("r", [rest], first=2)
    engine.finish("r", tokens=3)
    events = list(call)

    assert (events[1].delta.first_index, events[1].delta.text) == (2, "é")


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


# -- the other calls -------------------------------------------------------------------------------


def test_a_unary_answer_is_the_whole_stream_in_one_message(scripted, serving):
    engine = scripted("héllo")
    stubs = serving.stubs(serving.start(engine))
    request = pb.GenerateUnaryRequest(request=ask(n=2, max_tokens=6, logprobs=0, echo=True))
    answer = stubs.generation.GenerateUnary(request)

    assert (answer.request_id, answer.model_digest, answer.seed_used) == ("r", "d1", 41)
    assert [choice.choice for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.text == "hihéllo"
        assert list(choice.token_ids) == engine.ids("hihéllo")
        assert len(choice.logprobs) == 6
        assert choice.finished.reason == pb.FINISH_REASON_LENGTH
    assert answer.usage == pb.Usage(prompt_tokens=5, output_tokens=12, cached_tokens=1)


def test_a_unary_call_fails_like_a_stream(engine, stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.generation.GenerateUnary(pb.GenerateUnaryRequest(request=ask(n=0)))

    assert caught.value.code() is Code.INVALID_ARGUMENT
    found, _ = details(caught.value)
    assert found["BadRequest"].field_violations[0].field == "n"


def test_a_score_is_the_prompts_logprobs_and_frees_the_request(engine, stubs):
    future = stubs.generation.Score.future(
        pb.ScoreRequest(request_id="s", text="abc", top_logprobs=1)
    )
    request = engine.wait_request()
    assert request.sampling.prompt_logprobs == 1
    entries = (None, TokenLogprobs(-0.5, 1, (5,), (-0.5,)), TokenLogprobs(-1.5, 3, (5,), (-0.25,)))
    engine.start("s", cached=0, prompt_logprobs=entries)
    response = future.result()

    assert response.request_id == "s"
    assert [entry.token_id for entry in response.logprobs] == engine.ids("abc")
    assert not response.logprobs[0].HasField("logprob")
    assert [entry.rank for entry in response.logprobs] == [0, 1, 3]
    assert response.total_logprob == -2.0
    assert response.usage.prompt_tokens == 3
    engine.wait(lambda: engine.closed == ["s"])


def test_a_score_is_refused_in_the_words_of_its_own_message(stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.generation.Score(pb.ScoreRequest(text="abc", top_logprobs=21))

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert caught.value.details() == "top_logprobs must be 0 to 20, got 21"
    found, _ = details(caught.value)
    assert found["BadRequest"].field_violations[0].field == "top_logprobs"


def test_a_score_fails_with_the_engines_error(engine, stubs):
    future = stubs.generation.Score.future(pb.ScoreRequest(request_id="s", text="abc"))
    engine.wait_request()
    engine.finish("s", FinishReason.ERROR, error=RequestFailedError("s", "NaN logits"))
    with pytest.raises(grpc.RpcError) as caught:
        future.result()

    assert caught.value.code() is Code.INTERNAL
    assert "NaN logits" in str(caught.value.details())


def test_tokenize_detokenize_and_count_agree(engine, stubs):
    tokens = stubs.generation.Tokenize(pb.TokenizeRequest(text="né"))
    back = stubs.generation.Detokenize(pb.DetokenizeRequest(token_ids=[*tokens.token_ids, 2]))
    bare = stubs.generation.Detokenize(
        pb.DetokenizeRequest(token_ids=[*tokens.token_ids, 2], skip_special_tokens=True)
    )
    count = stubs.generation.CountTokens(pb.CountTokensRequest(text="né"))

    assert list(tokens.token_ids) == engine.ids("né")
    assert list(tokens.token_texts) == ["n", "\ufffd", "\ufffd"]
    assert (back.text, bare.text) == ("né<|im_end|>", "né")
    assert (count.tokens, count.context_tokens) == (3, 64)
    assert tokens.model_digest == back.model_digest == count.model_digest == "d1"


def test_empty_text_has_no_tokens(stubs):
    assert stubs.generation.CountTokens(pb.CountTokensRequest(text="")).tokens == 0
    assert stubs.generation.Detokenize(pb.DetokenizeRequest()).text == ""


def test_long_text_is_tokenised_as_short_text_is(engine, serving):
    stubs = serving.stubs(serving.start(engine))
    text = "long " * 2000

    assert stubs.generation.CountTokens(pb.CountTokensRequest(text=text)).tokens == 10_000


def test_detokenizing_an_unknown_id_names_it(stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.generation.Detokenize(pb.DetokenizeRequest(token_ids=[5, 259]))
    found, message = details(caught.value)

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "token_ids holds token id 259; this model's ids are 0 to 258" in message
    assert found["BadRequest"].field_violations[0].field == "token_ids"


def test_counting_nothing_names_the_prompt(stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.generation.CountTokens(pb.CountTokensRequest())

    assert "prompt needs exactly one" in str(caught.value.details())


def test_chat_without_messages_is_refused(engine, serving, template):
    stubs = serving.stubs(serving.start(engine, template=template(SAY_ALL)))
    error = fail(stubs.generation.Generate(pb.GenerateRequest(chat=pb.Chat())))

    assert error.code() is Code.INVALID_ARGUMENT
    assert "chat has no messages; send at least one" in error.details()


def test_a_template_that_refuses_is_the_clients_error(engine, serving, template):
    refusing = template("{{ raise_exception('only one message, please') }}")
    stubs = serving.stubs(serving.start(engine, template=refusing))
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.CHAT_ROLE_USER)])
    error = fail(stubs.generation.Generate(pb.GenerateRequest(chat=chat)))

    assert error.code() is Code.INVALID_ARGUMENT
    assert "refuses these messages: only one message, please" in error.details()
