"""vllm.grpc.engine over a real socket: what gateways send, what they get, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from tokenizers import Tokenizer as FastTokenizer

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.errors import RequestCancelledError, RequestFailedError
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grpc import vllm_convert
from jaxserve.frontend.grpc.tokenizer_bundle import CHUNK_BYTES, bundle_tokenizer
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.tokenizer_source import TokenizerSource
from tests.frontend.grpc.asking import details, fail
from tests.weights.gguf_writing import BYTE_VOCABULARY

Code = grpc.StatusCode


@pytest.fixture
def vllm(stubs) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(stubs.channel)


def ask(*, stream: bool = True, ids: tuple[int, ...] = (5, 6), **sampling: Any) -> Any:
    return pb.GenerateRequest(
        request_id="r",
        tokenized=pb.TokenizedInput(input_ids=ids),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


def read(request: pb.GenerateRequest) -> Any:
    return vllm_convert.call_from_generate(request, "r", None, context_tokens=64)


# -- what is asked ---------------------------------------------------------------------------------


def test_every_sampling_field_reaches_the_engine(engine, vllm):
    given = {
        "temperature": 0.0, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "frequency_penalty": -1.5,
        "presence_penalty": 1.5, "repetition_penalty": 2.0, "max_tokens": 9, "min_tokens": 1,
        "ignore_eos": True, "n": 2, "logprobs": 4, "prompt_logprobs": 0, "seed": 7,
    }  # fmt: skip
    call = vllm.Generate(
        ask(**given, stop=["x"], stop_token_ids=[5], logit_bias={7: -2.5},
            include_stop_str_in_output=True)
    )  # fmt: skip
    request = engine.wait_request()
    call.cancel()

    assert {name: getattr(request.sampling, name) for name in given} == given
    assert (request.sampling.stop, request.sampling.stop_token_ids) == (("x",), (5,))
    assert request.sampling.logit_bias == {7: -2.5}
    assert request.sampling.include_stop
    assert (request.request_id, list(request.prompt)) == ("r", [5, 6])


def test_zero_is_unset_where_it_has_no_presence():
    sampling = read(ask(top_p=0.0, repetition_penalty=0.0, n=0, top_k=0)).sampling

    assert (sampling.top_p, sampling.repetition_penalty, sampling.n) == (1.0, 1.0, 1)
    assert (sampling.top_k, sampling.temperature, sampling.seed) == (0, 1.0, None)
    assert (sampling.max_tokens, sampling.logprobs) == (None, None)


@pytest.mark.parametrize(
    ("asked", "grammar"),
    [
        ({}, None),
        ({"json_schema": "{}"}, Grammar("json_schema", "{}")),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"grammar": "root ::= 'a'"}, Grammar("grammar", "root ::= 'a'")),
        ({"json_object": True}, Grammar("json_object")),
        ({"choice": {"choices": ["a", "b"]}}, Grammar("choices", '["a", "b"]')),
    ],
)
def test_constraints_become_grammars(asked, grammar):
    assert read(ask(grammar_from_first_token=True, **asked)).grammar == grammar


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        ({}, None),
        ({"truncate_prompt_tokens": 3}, 3),
        ({"truncate_prompt_tokens": -1}, 63),
        ({"truncate_prompt_tokens": -1, "max_tokens": 10}, 54),
        ({"truncate_prompt_tokens": -1, "max_tokens": 100}, 1),
    ],
)
def test_prompts_are_truncated_to_a_number_or_to_what_fits(sampling, tokens):
    assert read(ask(**sampling)).truncate_prompt_tokens == tokens


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"mm_inputs": pb.MultimodalInputs(im_token_id=3)}, "mm_inputs", "reads text alone"),
        ({"extra_mm_inputs": [pb.MultimodalInputs()]}, "extra_mm_inputs", "reads text alone"),
        ({"media_refs": pb.MediaRefs(items=[pb.MediaRef(url="x")])}, "media_refs", "text alone"),
        (
            {"kv_transfer_params": pb.KvTransferParams(remote_host="h")},
            "kv_transfer_params",
            "computes prompts itself",
        ),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json", "computes prompts itself"),
        ({"sampling_params": {"structural_tag": "t"}}, "structural_tag", "not supported"),
        ({"sampling_params": {"json_object": False}}, "json_object", "asks for nothing"),
        ({"sampling_params": {"logprobs": -1}}, "logprobs", "logprobs must be 0 to 20, got -1"),
        ({"sampling_params": {"seed": -1}}, "seed", "seed must be 0 to"),
        ({"sampling_params": {"truncate_prompt_tokens": 0}}, "truncate_prompt_tokens", "least 1"),
        ({"sampling_params": {"regex": "a"}}, "regex", "compiles no grammars"),
        ({"text": ""}, "prompt", "prompt is empty"),
        ({}, "prompt", "prompt needs exactly one"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(vllm, fields, field, text):
    if not fields.keys() & {"text"} and fields:
        fields = {"text": "x", **fields}
    error = fail(vllm.Generate(pb.GenerateRequest(**fields)))
    found, message = details(error)

    assert error.code() is Code.INVALID_ARGUMENT
    assert found["BadRequest"].field_violations[0].field == field
    assert text in message


# -- what is answered ------------------------------------------------------------------------------


def test_a_stream_is_chunks_of_new_tokens_and_then_all_of_them(engine, vllm):
    call = vllm.Generate(ask())
    engine.wait_request()
    engine.start("r", cached=1)
    engine.give("r", [7, 8])
    first = next(call).chunk
    engine.give("r", [9], first=2)
    engine.finish("r", FinishReason.LENGTH, tokens=3)
    second, last = list(call)

    assert (list(first.token_ids), first.completion_tokens, first.index) == ([7, 8], 2, 0)
    assert (first.prompt_tokens, first.cached_tokens) == (2, 1)
    assert list(second.chunk.token_ids) == [9]
    complete = last.complete
    assert (list(complete.output_ids), complete.finish_reason) == ([7, 8, 9], "length")
    assert (complete.prompt_tokens, complete.completion_tokens) == (5, 3)
    assert complete.cached_tokens == 1
    assert complete.WhichOneof("matched_stop") is None


def test_without_streaming_each_choice_comes_whole(engine, vllm):
    call = vllm.Generate(ask(stream=False, n=2, logprobs=1))
    engine.wait_request()
    engine.start("r")
    engine.give("r", [7], logprobs=TokenLogprobs(-0.5, 1, (7,), (-0.5,)))
    engine.give("r", [8], choice=1, logprobs=TokenLogprobs(-1.5, 2, (9,), (-0.25,)))
    engine.finish("r", tokens=1, choice=1)
    engine.give("r", [4], first=1, logprobs=TokenLogprobs(-2.0, 1))
    engine.finish("r", tokens=2)
    one, zero = [message.complete for message in call]

    assert (zero.index, list(zero.output_ids)) == (0, [7, 4])
    assert (one.index, list(one.output_ids), one.finish_reason) == (1, [8], "stop")
    assert list(zero.output_logprobs.token_logprobs) == [-0.5, -2.0]
    assert list(zero.output_logprobs.token_ids) == [7, 4]
    assert list(one.output_logprobs.top_logprobs[0].token_ids) == [9]
    assert list(one.output_logprobs.top_logprobs[0].values) == [-0.25]


@pytest.mark.parametrize("stream", [True, False])
def test_prompt_logprobs_come_once_with_none_for_the_first_token(engine, vllm, stream):
    call = vllm.Generate(ask(stream=stream, prompt_logprobs=1))
    engine.wait_request()
    engine.start("r", prompt_logprobs=(None, TokenLogprobs(-1.5, 4, (3,), (-0.5,))))
    engine.give("r", [7])
    messages = [next(call)] if stream else []
    engine.give("r", [8], first=1)
    engine.finish("r", tokens=2)
    messages += list(call)

    parts = [getattr(message, message.WhichOneof("response")) for message in messages]
    assert [part.HasField("input_logprobs") for part in parts] == [True] + [False] * (
        len(parts) - 1
    )
    scored = parts[0].input_logprobs
    assert list(scored.token_ids) == [5, 6]
    assert [entry.HasField("value") for entry in scored.token_logprobs] == [False, True]
    assert scored.token_logprobs[1].value == -1.5
    assert list(scored.top_logprobs[1].token_ids) == [3]


def test_nothing_is_detokenised_unless_stop_strings_are_looked_for(engine, vllm, monkeypatch):
    read_ids: list[int] = []
    whole = type(engine.tokenizer).token_bytes

    def token_bytes(self, token_id):
        read_ids.append(token_id)
        return whole(self, token_id)

    monkeypatch.setattr(type(engine.tokenizer), "token_bytes", token_bytes)
    call = vllm.Generate(ask())
    engine.wait_request()
    engine.start("r")
    engine.give("r", "ab")
    engine.finish("r", tokens=2)
    assert len(list(call)) == 2
    assert read_ids == []


def test_a_stop_string_ends_the_answer_and_is_named(engine, vllm):
    call = vllm.Generate(ask(stop=["##"]))
    engine.wait_request()
    engine.start("r")
    engine.give("r", "a## later")
    engine.wait(lambda: engine.stops == [("r", 0)])
    engine.finish("r", FinishReason.LENGTH, tokens=9)
    *_, last = list(call)

    assert last.complete.matched_stop_str == "##"
    assert last.complete.finish_reason == "stop"
    assert list(last.complete.output_ids) == engine.ids("a##")


@pytest.mark.parametrize(("skip", "reason"), [(True, "length"), (False, "stop")])
def test_stop_strings_meet_special_tokens_unless_those_are_skipped(engine, vllm, skip, reason):
    call = vllm.Generate(ask(stop=["<|im_end|>"], ignore_eos=True, skip_special_tokens=skip))
    engine.wait_request()
    engine.start("r")
    engine.give("r", [5, 2, 6])
    engine.finish("r", FinishReason.LENGTH, tokens=3)
    *_, last = list(call)

    assert last.complete.finish_reason == reason


@pytest.mark.parametrize(("stops", "matched"), [([9], 9), ([], None)])
def test_a_stop_token_is_named_and_the_models_own_end_is_not(engine, vllm, stops, matched):
    call = vllm.Generate(ask(stop_token_ids=stops))
    engine.wait_request()
    engine.start("r")
    engine.give("r", [9])
    engine.finish("r", tokens=1, stop_token_id=9)
    *_, last = list(call)

    assert (last.complete.matched_token_id if matched else None) == matched
    assert last.complete.HasField("matched_token_id") is (matched is not None)


def test_an_aborted_answer_ends_with_its_tokens_and_abort(engine, vllm):
    call = vllm.Generate(ask())
    engine.wait_request()
    vllm.Abort(pb.AbortRequest(request_ids=["r", "unknown"]))
    engine.start("r")
    engine.give("r", [7])
    engine.finish("r", FinishReason.CANCELLED, tokens=1, error=RequestCancelledError("r"))
    *_, last = list(call)

    assert (last.complete.finish_reason, list(last.complete.output_ids)) == ("abort", [7])
    assert call.code() is Code.OK


def test_a_failed_answer_ends_with_the_status_of_the_error_table(engine, vllm):
    call = vllm.Generate(ask())
    engine.wait_request()
    engine.start("r")
    engine.finish("r", FinishReason.ERROR, error=RequestFailedError("r", "NaN logits"))
    error = fail(call)

    assert error.code() is Code.INTERNAL
    assert details(error)[0]["ErrorInfo"].reason == "REQUEST_POISONED"


def test_a_client_that_leaves_gives_its_pages_back(engine, vllm):
    call = vllm.Generate(ask())
    engine.wait_request()
    call.cancel()

    engine.wait(lambda: engine.closed == ["r"])


def test_bytes_that_are_no_message_are_the_clients_error(stubs):
    method = "/vllm.grpc.engine.VllmEngine/Generate"
    call = stubs.channel.unary_stream(method)
    error = fail(call(b"\xff\xff"))

    assert error.code() is Code.INVALID_ARGUMENT
    assert f"not a request of {method}" in error.details()


# -- facts -----------------------------------------------------------------------------------------


def test_the_model_is_described(vllm):
    model = vllm.GetModelInfo(pb.GetModelInfoRequest())

    assert (model.served_model_name, model.model_path) == ("scripted", "scripted")
    assert (model.max_context_length, model.max_req_input_len, model.vocab_size) == (64, 63, 259)
    assert (model.is_generation, model.supports_vision) == (True, False)
    assert list(model.eos_token_ids) == [2, 0]
    assert model.model_type == "ScriptedForCausalLM"


def test_the_server_is_described(engine, vllm):
    before = vllm.GetServerInfo(pb.GetServerInfoRequest())
    call = vllm.Generate(ask())
    engine.wait_request()
    after = vllm.GetServerInfo(pb.GetServerInfoRequest())
    call.cancel()

    assert (before.server_type, before.data_parallel_size) == ("vllm-grpc", 2)
    assert (before.active_requests, after.active_requests) == (0, 1)
    assert before.last_receive_timestamp == 0 < after.last_receive_timestamp
    assert 0 <= before.uptime_seconds < 60
    assert not before.is_paused


def test_loads_are_those_of_every_data_shard_or_of_one(vllm):
    both = vllm.GetLoads(pb.GetLoadsRequest(include=["core"]))
    one = vllm.GetLoads(pb.GetLoadsRequest(dp_rank=1))

    assert (both.dp_rank_count, len(both.loads), len(one.loads)) == (2, 2, 1)
    first = both.loads[0]
    assert (first.num_running_reqs, first.max_running_requests) == (1, 2)
    assert (first.utilization, first.cache_hit_rate) == (0.5, 0.5)
    assert first.token_usage == pytest.approx(2 / 7)
    assert one.loads[0].dp_rank == 1
    with pytest.raises(grpc.RpcError, match="dp_rank is 2 and this server has 2"):
        vllm.GetLoads(pb.GetLoadsRequest(dp_rank=2))


def test_health_follows_the_engine(engine, vllm):
    assert vllm.HealthCheck(pb.HealthCheckRequest()).healthy
    engine.report.serving, engine.report.detail = False, "no step finished for 60 s"
    health = vllm.HealthCheck(pb.HealthCheckRequest())

    assert (health.healthy, health.message) == (False, "no step finished for 60 s")


def test_the_tokenizer_comes_as_a_zip_that_builds_the_same_one(engine, vllm):
    chunks = list(vllm.GetTokenizer(common_pb2.GetTokenizerRequest()))
    again = list(vllm.GetTokenizer(common_pb2.GetTokenizerRequest()))
    packed = b"".join(chunk.data for chunk in chunks)

    assert chunks == again
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == hashlib.sha256(packed).hexdigest()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    built = FastTokenizer.from_buffer(files["tokenizer.json"])
    assert built.encode("né", add_special_tokens=False).ids == engine.ids("né")
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 0]}
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])


def test_the_bundle_has_the_template_in_use_and_long_ones_are_cut(engine, serving, monkeypatch):
    bundle = bundle_tokenizer(engine.tokenizer, "{{ messages }}", [2])
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        config = json.loads(archive.read("tokenizer_config.json"))
    assert config["chat_template"] == "{{ messages }}"
    long = bytes(CHUNK_BYTES * 2)
    monkeypatch.setattr(
        "jaxserve.frontend.grpc.vllm_servicer.bundle_tokenizer", lambda *parts: long
    )
    stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(serving.stubs(serving.start(engine)).channel)
    chunks = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    assert [len(chunk.data) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES]
    assert chunks[1].sha256 == hashlib.sha256(long).hexdigest()


def test_a_tokenizer_out_of_gguf_is_bundled_like_any_other():
    tokenizer = load_tokenizer(TokenizerSource(source="x", gguf=BYTE_VOCABULARY))
    bundle = bundle_tokenizer(tokenizer, None, [0])
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        built = FastTokenizer.from_buffer(archive.read("tokenizer.json"))
        config = json.loads(archive.read("tokenizer_config.json"))

    text = "ab cd a<|end|>"
    assert built.encode(text).ids == tokenizer.encode(text, add_special_tokens=True)
    assert config["eos_token"] == "<|end|>"


# -- what is not offered ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "request_type", "text"),
    [
        ("FlushCache", common_pb2.FlushCacheRequest, "--no-prefix-cache"),
        ("StartProfile", common_pb2.StartProfileRequest, "not taken over the network"),
        ("StopProfile", common_pb2.StopProfileRequest, "not taken over the network"),
    ],
)
def test_what_is_not_offered_says_why(vllm, name, request_type, text):
    with pytest.raises(grpc.RpcError) as caught:
        getattr(vllm, name)(request_type())

    assert caught.value.code() is Code.UNIMPLEMENTED
    assert f"{name} is not offered here: " in str(caught.value.details())
    assert text in str(caught.value.details())


def test_an_engine_that_tells_nothing_of_its_pages_says_so(vllm):
    error = fail(vllm.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()))

    assert error.code() is Code.UNIMPLEMENTED
    assert "this engine tells nothing of its pages" in error.details()
