"""inference.GRPCInferenceService over a real socket: tensors, options, streams, errors."""

from __future__ import annotations

import contextlib
import json
import queue
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grpc.kserve_convert import read_inference
from jaxserve.frontend.grpc.kserve_options import ALIASES, READERS
from jaxserve.third_party.triton import grpc_service_pb2 as pb
from jaxserve.third_party.triton import grpc_service_pb2_grpc, model_config_pb2
from jaxserve.v1 import admin_pb2
from tests.frontend.grpc.asking import details, fail

Code = grpc.StatusCode
Tensor = pb.ModelInferRequest.InferInputTensor
FORMS = {int: "int64_param", bool: "bool_param", float: "double_param", str: "string_param"}


def packed(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def ask(text: str = "hi", parameters: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A request as Triton's client writes it: raw bytes, other options as parameters."""
    request = pb.ModelInferRequest(**{"model_name": "scripted", "id": "7", **fields})
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(packed(text.encode()))
    for name, value in (parameters or {}).items():
        setattr(request.parameters[name], FORMS[type(value)], value)
    return request


def add(request: Any, name: str, datatype: str, raw: bytes, shape: tuple[int, ...] = (1,)) -> Any:
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return request


def texts(response: pb.ModelInferResponse, name: str = "text_output") -> list[bytes]:
    number = [output.name for output in response.outputs].index(name)
    raw, found = response.raw_output_contents[number], []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    assert list(response.outputs[number].shape) == [len(found)]
    return found


def numbers(response: pb.ModelInferResponse, name: str, code: str) -> list[float]:
    number = [output.name for output in response.outputs].index(name)
    raw = response.raw_output_contents[number]
    return list(struct.unpack(f"<{len(raw) // 4}{code}", raw))


@pytest.fixture
def kserve(stubs) -> Any:
    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(stubs.channel)


class Stream:
    """One ModelStreamInfer that is open until the test ends it."""

    def __init__(self, stub: Any) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None))

    def send(self, request: Any) -> None:
        self._requests.put(request)

    def close(self) -> None:
        self._requests.put(None)

    def next(self) -> pb.ModelStreamInferResponse:
        return next(self.call)


@pytest.fixture
def stream(kserve) -> Iterator[Stream]:
    stream = Stream(kserve)
    yield stream
    stream.call.cancel()
    stream.close()


def is_final(response: pb.ModelStreamInferResponse) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


# -- what is asked ---------------------------------------------------------------------------------


def read(request: Any) -> Any:
    return read_inference(request, "r", None)


GIVEN = {
    "max_tokens": 9, "min_tokens": 1, "temperature": 0.5, "top_p": 0.25, "top_k": 3,
    "min_p": 0.125, "seed": 7, "presence_penalty": 1.5, "frequency_penalty": -1.5,
    "repetition_penalty": 2.0, "n": 2, "logprobs": 4, "include_stop": True, "ignore_eos": True,
}  # fmt: skip


def test_options_may_be_parameters():
    sampling = read(ask(parameters=GIVEN)).call.sampling
    assert {name: getattr(sampling, name) for name in GIVEN} == GIVEN


def test_options_may_be_json_text_whose_values_may_be_text():
    """As Triton's samples for vLLM write them."""
    as_text = {name: str(value) for name, value in GIVEN.items()}
    as_text |= {"stop": None}
    request = ask(parameters={"sampling_parameters": json.dumps(as_text)})
    sampling = read(request).call.sampling

    assert {name: getattr(sampling, name) for name in GIVEN} == GIVEN
    assert sampling.stop == ()


def test_options_may_be_tensors_under_the_names_of_other_backends():
    request = ask()
    add(request, "max_tokens", "INT32", struct.pack("<i", 9), (1, 1))
    add(request, "temperature", "FP32", struct.pack("<f", 0.5), (1, 1))
    add(request, "random_seed", "UINT64", struct.pack("<Q", 2**64 - 1))
    add(request, "stop_words", "BYTES", packed(b"x", b"yz"), (1, 2))
    add(request, "num_return_sequences", "UINT8", b"\2")
    add(request, "stop_token_ids", "INT64", struct.pack("<2q", 5, 6), (2,))
    add(request, "top_k", "INT16", struct.pack("<h", -1))
    add(request, "beam_width", "INT32", struct.pack("<i", 1))
    add(request, "ignore_eos", "BOOL", b"\1")
    sampling = read(request).call.sampling

    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (9, 0.5, 2**64 - 1)
    assert (sampling.stop, sampling.n) == (("x", "yz"), 2)
    assert (sampling.stop_token_ids, sampling.top_k, sampling.ignore_eos) == ((5, 6), 0, True)


def test_tensors_may_be_typed_lists():
    request = pb.ModelInferRequest(
        inputs=[
            Tensor(
                name="text_input", datatype="BYTES", shape=[1, 1],
                contents=pb.InferTensorContents(bytes_contents=[b"h\xc3\xa9"]),
            ),
            Tensor(
                name="temperature", datatype="FP64", shape=[1],
                contents=pb.InferTensorContents(fp64_contents=[0.5]),
            ),
        ]
    )  # fmt: skip
    asked = read(request)

    assert (asked.call.text, asked.call.sampling.temperature) == ("hé", 0.5)


def test_lists_and_maps_in_text_and_json():
    asked = {
        "stop": ["a", "b"], "stop_token_ids": "[5, 6]", "logit_bias": {"7": -2.5},
        "allowed_token_ids": [7, 8], "banned_token_ids": 8,
    }  # fmt: skip
    sampling = read(ask(parameters={"sampling_parameters": json.dumps(asked)})).call.sampling
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), (5, 6))
    assert sampling.logit_bias == {7: -2.5}
    assert (sampling.allowed_token_ids, sampling.banned_token_ids) == ((7, 8), (8,))
    plain = read(ask(parameters={"stop": "\n", "logit_bias": '{"7": 1}'})).call.sampling
    assert (plain.stop, plain.logit_bias) == (("\n",), {7: 1.0})


@pytest.mark.parametrize(
    ("parameters", "grammar"),
    [
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"json_schema": "{}"}, Grammar("json_schema", "{}")),
        ({"json_object": True}, Grammar("json_object")),
        ({"choices": '["a", "b"]'}, Grammar("choices", '["a", "b"]')),
        ({"sampling_parameters": '{"json_schema": {"type": "null"}}'},
         Grammar("json_schema", '{"type": "null"}')),
    ],
)  # fmt: skip
def test_grammars_have_our_own_names(parameters, grammar):
    assert read(ask(parameters=parameters)).call.grammar == grammar


@pytest.mark.parametrize(
    ("parameters", "stream", "echo"),
    [
        ({}, False, True),
        ({"exclude_input_in_output": True}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "exclude_input_in_output": False}, True, True),
    ],
)
def test_the_prompt_begins_the_answer_unless_it_streams(parameters, stream, echo):
    asked = read(ask(parameters=parameters))
    assert (asked.stream, asked.call.echo) == (stream, echo)


def test_what_tritons_client_adds_is_known():
    harmless = {
        "priority": 3, "triton_enable_empty_final_response": True, "sequence_id": 0,
        "sequence_start": False, "sequence_end": False,
    }  # fmt: skip
    assert read(ask(parameters=harmless)).call.deadline_s is None


@pytest.mark.parametrize(
    ("parameters", "field", "text"),
    [
        ({"length_penalty": 1.0}, "length_penalty", r"'length_penalty' \(a parameter\) is not kn"),
        ({"max_tokens": "many"}, "max_tokens", "max_tokens is 'many'; send a whole number"),
        ({"temperature": True}, "temperature", "temperature is True; send a number"),
        ({"sampling_parameters": '{"temperature": 1' + "0" * 400 + "}"}, "temperature", "a numb"),
        ({"ignore_eos": 2}, "ignore_eos", "ignore_eos is 2; send true or false"),
        ({"stop": 3}, "stop", "stop is 3; send a text"),
        ({"logit_bias": "[1]"}, "logit_bias", "a JSON object of token ids and numbers"),
        ({"sampling_parameters": "{"}, "sampling_parameters", "is not JSON"),
        ({"sampling_parameters": "[]"}, "sampling_parameters", "send a JSON object"),
        ({"seed": 1, "random_seed": 2}, "random_seed|seed", "given twice; send it once"),
        ({"seed": 1, "sampling_parameters": '{"seed": 1}'}, "seed", "given twice; send it once"),
        ({"beam_width": 2}, "beam_width", "there is no beam search here"),
        ({"sequence_id": 3}, "sequence_id", "requests have no state here"),
        ({"timeout": -1}, "timeout", "timeout is -1; send microseconds"),
        ({"stream": True}, "stream", "call ModelStreamInfer"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
        ({"regex": "a", "json_object": True}, "json_object|regex", "an answer obeys one of them"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused_by_name(kserve, parameters, field, text):
    with pytest.raises(grpc.RpcError, match=text) as caught:
        kserve.ModelInfer(ask(parameters=parameters))

    assert caught.value.code() is Code.INVALID_ARGUMENT
    found, _ = details(caught.value)
    assert found["BadRequest"].field_violations[0].field in field.split("|")


def shared() -> Any:
    request = ask()
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    return request


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (pb.ModelInferRequest(), "text_input is missing"),
        (add(ask(), "image", "BYTES", packed(b"x")), r"'image' \(an input\) is not known"),
        (add(ask(), "text_input", "BYTES", packed(b"x")), "input 'text_input' is there twice"),
        (add(ask(), "seed", "COMPLEX", b""), "input 'seed' has type 'COMPLEX'; known are BOOL"),
        (add(ask(), "seed", "INT32", b"123"), "has 3 bytes, which is no multiple of 4"),
        (add(ask(), "seed", "INT32", b"1234", (2,)), r"1 elements and the shape \[2\]"),
        (add(ask(), "seed", "INT32", b"1234", (-1, -1)), r"the shape \[-1, -1\]"),
        (add(ask(), "seed", "INT32", b"12345678", (2,)), r"seed is \[\d+, \d+\]; send one value"),
        (add(ask(), "stop", "BYTES", b"\5\0\0\0a"), "ends within an element"),
        (add(ask(), "stop", "BYTES", b"\1\0"), "ends within an element"),
        (add(ask(), "stop", "BYTES", packed(b"\xff")), "send text in UTF-8"),
        (ask(raw_input_contents=[b""]), "raw_input_contents has 2 entries for 1 inputs"),
        (shared(), "lies in shared memory"),
        (ask(outputs=[{"name": "other"}]), "output 'other' is not known; known are text_output"),
        (
            ask(outputs=[{"name": "text_output", "parameters": {"classification": {}}}]),
            "has the parameters classification",
        ),
    ],
)
def test_tensors_that_cannot_be_used_are_refused_by_name(kserve, request_, text):
    with pytest.raises(grpc.RpcError, match=text) as caught:
        kserve.ModelInfer(request_)

    assert caught.value.code() is Code.INVALID_ARGUMENT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAMES = st.sampled_from([*READERS, *ALIASES, "other"])


@given(
    inputs=st.lists(
        st.tuples(
            NAMES,
            st.sampled_from(["BYTES", "BOOL", "INT32", "UINT64", "FP16", "FP64", "?"]),
            st.lists(st.integers(-1, 3), max_size=3),
            st.binary(max_size=12) | st.lists(st.binary(max_size=3)).map(lambda t: packed(*t)),
        ),
        max_size=3,
    ),
    parameters=st.dictionaries(NAMES, st.dictionaries(NAMES, JSON).map(json.dumps) | st.text()),
)
def test_no_request_is_worse_than_refused(inputs, parameters):
    request = ask(parameters=parameters)
    for name, datatype, shape, raw in inputs:
        add(request, name, datatype, raw, tuple(shape))
    with contextlib.suppress(InvalidRequestError):
        read(request)


# -- one request, one response ---------------------------------------------------------------------


def test_a_whole_answer_begins_with_its_prompt(scripted, serving):
    channel = serving.stubs(serving.start(scripted("héllo"))).channel
    stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    response = stub.ModelInfer(ask(parameters={"n": 2, "max_tokens": 4}))
    bare = stub.ModelInfer(ask(parameters={"exclude_input_in_output": True}))

    assert (response.model_name, response.model_version, response.id) == ("scripted", "1", "7")
    assert texts(response) == [b"hih\xc3\xa9l", b"hih\xc3\xa9l"]
    assert [output.datatype for output in response.outputs] == ["BYTES"]
    assert "triton_final_response" not in response.parameters
    assert texts(bare) == ["héllo".encode()]


def test_other_outputs_come_when_asked_for(engine, kserve):
    parameters = {
        "return_finish_reason": True, "return_cumulative_logprob": True, "return_logprobs": True,
        "return_num_input_tokens": True, "return_num_output_tokens": True, "logprobs": 1,
    }  # fmt: skip
    future = kserve.ModelInfer.future(ask(parameters=parameters))
    request_id = engine.wait_request().request_id
    engine.start(request_id)
    letter, other = engine.ids("ab")
    engine.give(request_id, [letter], logprobs=TokenLogprobs(-0.5, 2, (other,), (-0.25,)))
    engine.give(request_id, [other], first=1, logprobs=TokenLogprobs(-1.0, 1, (other,), (-1.0,)))
    engine.finish(request_id, FinishReason.LENGTH, tokens=2)
    response = future.result()

    assert request_id != "7"
    assert texts(response, "finish_reason") == [b"length"]
    assert numbers(response, "cumulative_logprob", "f") == [-1.5]
    assert numbers(response, "num_input_tokens", "I") == [2]
    assert numbers(response, "num_output_tokens", "I") == [2]
    (scores,) = texts(response, "logprobs")
    assert json.loads(scores) == [
        {
            str(other): {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
            str(letter): {"logprob": -0.5, "rank": 2, "decoded_token": "a"},
        },
        {str(other): {"logprob": -1.0, "rank": 1, "decoded_token": "b"}},
    ]


def test_requested_outputs_are_sent_and_no_others(scripted, serving):
    channel = serving.stubs(serving.start(scripted("ab"))).channel
    stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    wanted = [{"name": "logprobs"}, {"name": "cumulative_logprob"}]
    response = stub.ModelInfer(ask(outputs=wanted))
    unscored = stub.ModelInfer(ask(outputs=[{"name": "logprobs"}]))

    assert [output.name for output in response.outputs] == ["logprobs", "cumulative_logprob"]
    assert numbers(response, "cumulative_logprob", "f") == [-1.0]
    assert texts(unscored, "logprobs") == [b"null"]


def test_a_failed_answer_ends_with_the_status_of_the_error_table(engine, kserve):
    future = kserve.ModelInfer.future(ask())
    request_id = engine.wait_request().request_id
    engine.start(request_id)
    engine.finish(request_id, FinishReason.ERROR, error=RequestFailedError("x", "NaN logits"))
    with pytest.raises(grpc.RpcError) as caught:
        future.result()

    assert caught.value.code() is Code.INTERNAL
    assert details(caught.value)[0]["ErrorInfo"].reason == "REQUEST_POISONED"


def test_a_client_that_leaves_gives_its_pages_back(engine, kserve):
    future = kserve.ModelInfer.future(ask())
    request_id = engine.wait_request().request_id
    future.cancel()

    engine.wait(lambda: engine.closed == [request_id])


@pytest.mark.parametrize("timeout", [20_000_000, 60_000_000])
def test_a_timeout_in_microseconds_is_a_deadline(engine, kserve, timeout):
    future = kserve.ModelInfer.future(ask(parameters={"timeout": timeout}), timeout=40.0)
    deadline_s = engine.wait_request().deadline_s
    future.cancel()
    alone = read(ask(parameters={"timeout": timeout})).call.deadline_s

    assert alone - deadline_s == pytest.approx(max(0.0, timeout / 1e6 - 40.0), abs=5.0)


def test_other_models_and_versions_are_not_found(kserve):
    wrong: list[dict[str, Any]] = [{"model_name": "other"}, {"model_version": "2"}]
    for fields in wrong:
        with pytest.raises(grpc.RpcError, match="is not served here") as caught:
            kserve.ModelInfer(ask(**fields))
        assert caught.value.code() is Code.NOT_FOUND


# -- many requests on one stream -------------------------------------------------------------------


def test_a_streams_requests_are_answered_side_by_side_and_end_with_a_mark(engine, stream):
    for number in range(2):
        stream.send(ask(id=str(number), parameters={"stream": True}))
    first, second = (engine.wait_request(number).request_id for number in range(2))
    engine.start(second)
    engine.give(second, "b")
    one = stream.next()
    engine.start(first)
    engine.give(first, "a")
    two = stream.next()
    engine.finish(first, tokens=1)
    three = stream.next()
    engine.give(second, "B", first=1)
    engine.finish(second, tokens=2)
    last = stream.next()

    assert [r.infer_response.id for r in (one, two, three, last)] == ["1", "0", "0", "1"]
    assert [is_final(r) for r in (one, two, three)] == [False, False, True]
    assert texts(three.infer_response) == [b""]
    rest = [last] if is_final(last) else [last, stream.next()]
    assert b"".join(texts(r.infer_response)[0] for r in rest) == b"B"
    assert is_final(rest[-1])
    stream.close()
    assert list(stream.call) == []
    assert stream.call.code() is Code.OK


def test_choices_of_a_stream_share_its_responses(engine, stream):
    wanted = {"stream": True, "n": 2, "return_finish_reason": True}
    stream.send(ask(parameters=wanted))
    request_id = engine.wait_request().request_id
    engine.start(request_id)
    engine.give(request_id, "b", choice=1)
    first = stream.next().infer_response
    engine.finish(request_id, FinishReason.LENGTH, tokens=1, choice=1)
    engine.give(request_id, "a")
    engine.finish(request_id, tokens=1)
    rest = [stream.next()]
    while not is_final(rest[-1]):
        rest.append(stream.next())

    assert texts(first) == [b"", b"b"]
    assert texts(first, "finish_reason") == [b"None", b"None"]
    assert texts(rest[-1].infer_response, "finish_reason") == [b"stop", b"length"]


def test_without_the_option_a_stream_has_whole_answers(engine, stream):
    stream.send(ask())
    request_id = engine.wait_request().request_id
    engine.start(request_id)
    engine.give(request_id, "a")
    engine.wait_taken(request_id)
    engine.give(request_id, "b", first=1)
    engine.finish(request_id, tokens=2)
    response = stream.next()

    assert (texts(response.infer_response), is_final(response)) == ([b"hiab"], True)


def test_an_error_ends_its_request_and_not_the_stream(engine, stream):
    stream.send(ask(id="bad", parameters={"max_tokens": 0}))
    refused = stream.next()
    stream.send(ask(id="poisoned"))
    request_id = engine.wait_request().request_id
    engine.start(request_id)
    engine.finish(request_id, FinishReason.ERROR, error=RequestFailedError("x", "NaN logits"))
    failed = stream.next()
    engine.refusals.append(ValueError("secret"))
    stream.send(ask(id="broken"))
    broken = stream.next()

    assert refused.error_message == "max_tokens must be at least 1, got 0"
    assert (refused.infer_response.id, is_final(refused)) == ("bad", True)
    assert failed.error_message == "request 'x' failed: NaN logits"
    assert broken.error_message.startswith("internal error; tell the operator request id ")
    stream.send(ask(id="good"))
    assert engine.wait(lambda: len(engine.requests) > 1)


def test_bytes_that_are_no_message_end_as_an_error_of_the_stream(stubs):
    call = stubs.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    (raw,) = list(call(iter([b"\xff\xff"])))
    response = pb.ModelStreamInferResponse.FromString(raw)
    error = fail(stubs.channel.unary_stream("/inference.GRPCInferenceService/ModelInfer")(b"\xff"))

    assert "the bytes received are not a request of /inference." in response.error_message
    assert error.code() is Code.INVALID_ARGUMENT


def test_a_stream_that_is_cancelled_gives_all_its_pages_back(engine, stream):
    for number in range(3):
        stream.send(ask(id=str(number), parameters={"stream": True}))
    ids = {engine.wait_request(number).request_id for number in range(3)}
    stream.call.cancel()

    engine.wait(lambda: set(engine.closed) == ids)


def test_a_stream_takes_so_many_requests_at_a_time(engine, kserve, monkeypatch):
    monkeypatch.setattr("jaxserve.frontend.grpc.kserve_servicer.REQUESTS_PER_STREAM", 1)
    other = Stream(kserve)
    for number in range(2):
        other.send(ask(id=str(number)))
    first = engine.wait_request().request_id
    engine.start(first)
    engine.finish(first)
    assert other.next().infer_response.id == "0"
    engine.wait_request(1)
    assert len(engine.requests) == 2
    other.call.cancel()
    other.close()


def test_a_stream_that_nobody_reads_is_ended_with_all_its_requests(engine, serving):
    address = serving.start(engine, stall_timeout_s=0.3)
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    channel = serving.stubs(address, narrow).channel
    deaf = Stream(grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel))
    for number in range(2):
        deaf.send(ask(id=str(number), parameters={"stream": True}))
    loud, quiet = (engine.wait_request(number).request_id for number in range(2))
    engine.start(loud)
    letters = [engine.ids("x")[0]] * 60_000
    while loud in engine.live:
        engine.give(loud, letters)
        engine.wait_taken(loud)
    engine.wait(lambda: {*engine.closed} == {loud, quiet})
    error = fail(deaf.call)

    assert error.code() is Code.ABORTED
    assert details(error)[0]["ErrorInfo"].reason == "SLOW_READER"
    deaf.close()


# -- draining --------------------------------------------------------------------------------------


def test_a_drain_waits_for_requests_and_not_for_idle_streams(engine, stubs, stream):
    stream.send(ask())
    request_id = engine.wait_request().request_id
    busy = stubs.admin.Drain(admin_pb2.DrainRequest(wait_seconds=0.1))
    engine.start(request_id)
    engine.finish(request_id)
    assert is_final(stream.next())
    idle = stubs.admin.Drain(admin_pb2.DrainRequest(wait_seconds=20.0))
    stream.send(ask())
    refused = stream.next()

    assert (busy.idle, idle.idle) == (False, True)
    assert "the server is draining" in refused.error_message


def test_a_stop_lets_a_streams_requests_finish_and_then_ends_it(engine, serving):
    channel = serving.stubs(serving.start(engine)).channel
    stream = Stream(grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel))
    stream.send(ask())
    request_id = engine.wait_request().request_id
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(serving.servers.pop().stop, 20.0)
        engine.wait_draining()
        engine.start(request_id)
        engine.give(request_id, "ok")
        engine.finish(request_id, tokens=2)
        assert texts(stream.next().infer_response) == [b"hiok"]
        error = fail(stream.call)
        stopped.result()

    assert error.code() is Code.UNAVAILABLE
    stream.close()


# -- facts -----------------------------------------------------------------------------------------


def test_readiness_follows_the_engine_and_liveness_does_not(engine, kserve):
    def ready(name: str = "scripted", version: str = "") -> bool:
        return kserve.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready

    assert (ready(), ready(version="1"), ready("other"), ready(version="2")) == (
        True, True, False, False,
    )  # fmt: skip
    assert kserve.ServerReady(pb.ServerReadyRequest()).ready
    engine.report.serving = False
    assert not kserve.ServerReady(pb.ServerReadyRequest()).ready
    assert not ready()
    assert kserve.ServerLive(pb.ServerLiveRequest()).live


def test_metadata_and_configuration_say_the_same(kserve):
    server = kserve.ServerMetadata(pb.ServerMetadataRequest())
    metadata = kserve.ModelMetadata(pb.ModelMetadataRequest(name="scripted"))
    config = kserve.ModelConfig(pb.ModelConfigRequest(name="scripted", version="1")).config

    assert (server.name, list(server.extensions)) == (
        "jaxserve",
        ["model_configuration", "parameters"],
    )
    assert (metadata.name, list(metadata.versions), metadata.platform) == (
        "scripted", ["1"], "jaxserve",
    )  # fmt: skip
    assert [tensor.name for tensor in metadata.inputs] == [tensor.name for tensor in config.input]
    first = metadata.inputs[0]
    assert (first.name, first.datatype, list(first.shape)) == ("text_input", "BYTES", [1])
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    assert config.input[0].data_type == model_config_pb2.TYPE_STRING
    assert metadata.outputs[0].name == config.output[0].name == "text_output"
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    for call, request in (
        (kserve.ModelMetadata, pb.ModelMetadataRequest(name="other")),
        (kserve.ModelConfig, pb.ModelConfigRequest(name="scripted", version="2")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() is Code.NOT_FOUND


def test_what_is_not_vendored_is_unimplemented(stubs):
    for name in ("ModelStatistics", "RepositoryIndex", "SystemSharedMemoryRegister"):
        call = stubs.channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"")
        assert caught.value.code() is Code.UNIMPLEMENTED
