"""Other protocols over the real engine: the same tokens, and every way out gives all pages back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from jaxserve.engine.engine import Engine
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.client import Client
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.testing import counting_engine, expected_tokens, paced_engine
from jaxserve.third_party.triton import grpc_service_pb2 as triton
from jaxserve.third_party.triton import grpc_service_pb2_grpc
from jaxserve.v1 import generation_pb2
from tests.frontend.grpc.asking import details, fail

Code = grpc.StatusCode
TOKENIZER = byte_tokenizer()
LONG = {"step_s": 0.002, "context_tokens": 4096, "num_pages": 4096}


class Doors:
    """Stubs of all protocols of one server."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.client = Client(address)
        self.vllm: Any = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)
        self.kserve: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def generate(self, prompt: list[int], timeout: float | None = None, **sampling: Any) -> Any:
        request = vllm_engine_pb2.GenerateRequest(
            tokenized=vllm_engine_pb2.TokenizedInput(input_ids=prompt),
            sampling_params=vllm_engine_pb2.SamplingParams(**sampling),
            stream=True,
        )
        return self.vllm.Generate(request, timeout=timeout)

    def wait_empty(self) -> None:
        """Waits until the engine is idle, and checks that no page is held."""
        assert self.client.drain(wait_s=20.0).idle
        assert self.client.stats().pages_used == 0

    def close(self) -> None:
        self.client.close()
        self.channel.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Doors]]:
    """Starts an engine and a server over it."""
    engines: list[Engine] = []
    servers: list[ServerThread] = []
    opened: list[Doors] = []

    def serve(engine: Engine, **config: Any) -> Doors:
        text = TextEngine(engine, TOKENIZER, None)
        info = ModelInfo(name="m", model_digest="d")
        servers.append(ServerThread(text, info, ServerConfig(port=0, **config)))
        engine.start()
        engines.append(engine)
        opened.append(Doors(servers[-1].start()))
        return opened[-1]

    yield serve
    for doors in opened:
        doors.close()
    for server in servers:
        server.stop(grace_s=0.0)
    for engine in engines:
        engine.stop()
        engine.check_integrity()


def infer(text: str, **parameters: int | bool) -> triton.ModelInferRequest:
    request = triton.ModelInferRequest()
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(struct.pack("<I", len(text)) + text.encode())
    for name, value in parameters.items():
        if isinstance(value, bool):
            request.parameters[name].bool_param = value
        else:
            request.parameters[name].int64_param = value
    return request


def text_of(response: triton.ModelInferResponse) -> str:
    return response.raw_output_contents[0][4:].decode()


def test_every_protocol_gives_the_tokens_that_arithmetic_says(serve):
    doors = serve(counting_engine()[0])
    prompt = TOKENIZER.encode("hi", add_special_tokens=True)
    expected = expected_tokens(prompt, 20, vocab_size=259)
    *chunks, last = doors.generate(prompt, max_tokens=20, temperature=0.0, ignore_eos=True)
    greedy = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    whole = doors.kserve.ModelInfer(infer("hi", exclude_input_in_output=True, **greedy))
    streamed = list(doors.kserve.ModelStreamInfer(iter([infer("hi", stream=True, **greedy)])))

    assert [token for chunk in chunks for token in chunk.chunk.token_ids] == expected
    assert list(last.complete.output_ids) == expected
    text = TOKENIZER.decode(expected, skip_special_tokens=True)
    assert text_of(whole) == text
    assert "".join(text_of(response.infer_response) for response in streamed) == text


def test_leaving_in_the_middle_gives_every_page_back(serve):
    doors = serve(paced_engine(**LONG)[0])
    generating = doors.generate([5], max_tokens=4000, ignore_eos=True)
    next(generating)
    streaming = doors.kserve.ModelStreamInfer(
        iter([infer("a", max_tokens=4000, ignore_eos=True, stream=True)] * 3)
    )
    next(streaming)
    whole = doors.kserve.ModelInfer.future(infer("b", max_tokens=4000, ignore_eos=True))
    for stats in doors.client.watch_stats(0.05):
        if stats.rows_running == 4 and stats.requests_waiting == 1:
            break
    generating.cancel()
    streaming.cancel()
    whole.cancel()

    doors.wait_empty()


def test_an_abort_by_id_ends_the_stream_with_what_there_is(serve):
    doors = serve(paced_engine(**LONG)[0])
    request = vllm_engine_pb2.GenerateRequest(
        request_id="mine",
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=[5]),
        sampling_params=vllm_engine_pb2.SamplingParams(max_tokens=4000, ignore_eos=True),
        stream=True,
    )
    call = doors.vllm.Generate(request)
    next(call)
    twice = fail(doors.vllm.Generate(request))
    doors.vllm.Abort(vllm_engine_pb2.AbortRequest(request_ids=["mine", "other"]))
    *_, last = list(call)

    assert twice.code() is Code.ALREADY_EXISTS
    assert last.complete.finish_reason == "abort"
    assert 0 < len(last.complete.output_ids) == last.complete.completion_tokens < 4000
    doors.wait_empty()


def test_deadlines_end_requests_of_every_protocol(serve):
    doors = serve(paced_engine(**LONG)[0])
    late = fail(doors.generate([5], timeout=0.2, max_tokens=4000, ignore_eos=True))
    asked = infer("a", max_tokens=4000, ignore_eos=True, timeout=200_000)
    with pytest.raises(grpc.RpcError) as caught:
        doors.kserve.ModelInfer(asked)
    (item,) = doors.kserve.ModelStreamInfer(iter([asked]))

    assert late.code() is Code.DEADLINE_EXCEEDED
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    assert "the deadline of request" in item.error_message
    doors.wait_empty()


def test_queues_and_messages_have_the_bounds_of_our_own(serve):
    engine, _ = paced_engine(**LONG, max_rows=1, max_waiting_requests=1)
    doors = serve(engine, max_message_bytes=10_000)
    running = doors.generate([5], max_tokens=4000, ignore_eos=True)
    next(running)
    waiting = doors.generate([5], max_tokens=4000, ignore_eos=True)
    for stats in doors.client.watch_stats(0.05):
        if stats.requests_waiting == 1:
            break
    refused = fail(doors.generate([5]))
    with pytest.raises(grpc.RpcError) as caught:
        doors.kserve.ModelInfer(infer("a" * 20_000))

    assert refused.code() is Code.RESOURCE_EXHAUSTED
    assert "RetryInfo" in details(refused)[0]
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    running.cancel()
    waiting.cancel()
    doors.wait_empty()


def test_a_draining_server_says_so_in_every_protocol(serve):
    doors = serve(counting_engine()[0])
    doors.client.drain()
    refused = fail(doors.generate([5]))
    (item,) = doors.kserve.ModelStreamInfer(iter([infer("a")]))

    assert refused.code() is Code.UNAVAILABLE
    assert details(refused)[0]["ErrorInfo"].reason == "DRAINING"
    assert "the server is draining" in item.error_message
    assert not doors.kserve.ServerReady(triton.ServerReadyRequest()).ready
    assert not doors.vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest()).healthy
    assert doors.vllm.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest()).is_paused


def test_a_gateway_embeds_where_the_server_does(serve: Any) -> None:
    doors = serve(counting_engine(embeddings=True)[0])
    prompt = vllm_engine_pb2.TokenizedInput(input_ids=[5, 6, 8])
    got = doors.vllm.Embed(vllm_engine_pb2.EmbedRequest(tokenized=prompt))
    (expected,) = doors.client._stubs.generation.Embed(
        generation_pb2.EmbedRequest(token_ids=[generation_pb2.TokenIds(ids=[5, 6, 8])])
    ).embeddings
    assert list(got.embedding) == list(expected.values)
    assert (got.prompt_tokens, got.embedding_dim) == (3, 2)
    without = serve(counting_engine()[0])
    with pytest.raises(grpc.RpcError, match="--embeddings") as refused:
        without.vllm.Embed(vllm_engine_pb2.EmbedRequest(tokenized=prompt))
    error: Any = refused.value
    assert error.code() is Code.INVALID_ARGUMENT
