"""What a client tries again, and how it goes on with a stream that broke."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from jaxserve.engine.request import FinishReason
from jaxserve.errors import (
    DrainingError,
    EngineDeadError,
    JaxserveError,
    QueueFullError,
    RequestFailedError,
    RetryableError,
)
from jaxserve.frontend.client import Client, RetryPolicy
from jaxserve.frontend.client_errors import Failure
from jaxserve.frontend.client_session import Attempts, StreamSession
from jaxserve.frontend.client_types import Chunk
from jaxserve.v1 import generation_pb2 as pb
from tests.frontend.grpc.clients import QUICK, break_after, play

# -- retries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [QueueFullError("requests", 1, 1, retry_after_s=0.001), DrainingError(retry_after_s=0.001)],
    ids=lambda error: error.reason,
)
def test_what_may_pass_is_tried_four_times_and_no_more(scripted, connect, refusal):
    engine = scripted("ok")
    client = connect(engine)
    engine.refusals = [refusal] * 3
    assert client.generate("hi").text == "ok"
    engine.refusals = [refusal] * 3
    assert "".join(chunk.text for chunk in client.stream("hi")) == "ok"
    engine.refusals = [refusal] * 5
    with pytest.raises(type(refusal)):
        client.generate("hi")
    assert len(engine.refusals) == 1


def test_what_cannot_pass_is_tried_once(scripted, connect):
    engine = scripted("ok")
    client = connect(engine)
    engine.refusals = [RequestFailedError("r", "NaN"), RequestFailedError("r", "NaN")]
    with pytest.raises(RequestFailedError):
        client.generate("hi")

    assert len(engine.refusals) == 1


class Ticking:
    """A clock that stands still until told."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_wait_that_outlasts_the_deadline_is_not_begun():
    clock = Ticking()
    attempts = Attempts(QUICK, 1.0, clock)
    failure = Failure(DrainingError(retry_after_s=0.4), retry_after_s=0.4, resumable=False)

    assert attempts.after(failure) == 0.4
    clock.now_s = 0.7
    assert attempts.timeout_s == pytest.approx(0.3)
    with pytest.raises(DrainingError):
        attempts.after(failure)


def test_a_server_that_died_is_blamed_rather_than_the_silence_after_it():
    attempts = Attempts(RetryPolicy(attempts=3), None, Ticking())
    silence = Failure(
        RetryableError("none", retry_after_s=0.0), retry_after_s=0.0, resumable=True, answered=False
    )
    death = Failure(EngineDeadError("out of memory"), retry_after_s=0.0, resumable=True)
    attempts.after(silence)
    attempts.after(death)
    with pytest.raises(EngineDeadError, match="out of memory"):
        attempts.after(silence)


def test_waits_grow_and_spread_and_never_undercut_the_server():
    policy = RetryPolicy(first_delay_s=0.1, max_delay_s=0.3)
    waits = [[policy.delay_s(attempt, 0.0) for _ in range(200)] for attempt in (1, 2, 3)]

    for wait, middle in zip(waits, (0.1, 0.2, 0.3), strict=True):
        assert middle * 0.5 <= min(wait) < max(wait) <= middle * 1.5
    assert policy.delay_s(1, 7.0) == 7.0


# -- resumption ------------------------------------------------------------------------------------


def test_a_broken_stream_goes_on_with_the_tokens_received_and_the_seed(engine, connect):
    def rest():
        request = engine.wait_request(1)
        engine.start(request.request_id)
        engine.give(request.request_id, "cd", first=2)
        engine.finish(request.request_id, FinishReason.LENGTH, tokens=4)

    player = play(lambda: break_after(engine, "ab", seed=99), rest)
    stream = connect(engine).stream("hi", request_id="r", resume=True, max_tokens=4)
    chunks = list(stream)
    player.join()
    again = engine.requests[1]

    assert "".join(chunk.text for chunk in chunks) == "abcd"
    assert [t for chunk in chunks for t in chunk.token_ids] == engine.ids("abcd")
    assert (list(again.resume), again.sampling.seed) == (engine.ids("ab"), 99)
    assert again.request_id == "r.resume1"
    assert stream.request_id == "r"


def test_without_resume_a_broken_stream_raises_what_broke_it(engine, connect):
    player = play(lambda: break_after(engine, "ab", error=EngineDeadError("killed")))
    received = []
    with pytest.raises(EngineDeadError, match="killed"):
        received.extend(connect(engine).stream("hi"))
    player.join()

    assert len(engine.requests) == 1


def test_a_stream_is_continued_three_times_and_no_more(engine, connect):
    steps = [lambda n=n: break_after(engine, "x", n) for n in range(4)]
    player = play(*steps)
    chunks: list[Chunk] = []
    with pytest.raises(DrainingError):
        chunks.extend(connect(engine).stream("hi", resume=True))
    player.join()

    assert [chunk.first_index for chunk in chunks] == [0, 1, 2, 3]
    assert len(engine.requests) == 4


def test_several_choices_are_not_continued(engine, connect):
    player = play(lambda: break_after(engine, "ab"))
    with pytest.raises(DrainingError):
        list(connect(engine).stream("hi", resume=True, n=2))
    player.join()


def test_a_failed_request_is_not_continued(engine, connect):
    player = play(lambda: break_after(engine, "ab", error=RequestFailedError("r", "NaN")))
    with pytest.raises(RequestFailedError):
        list(connect(engine).stream("hi", resume=True))
    player.join()


def test_the_echo_is_not_sent_twice(engine, connect):
    def rest():
        request_id = engine.wait_request(1).request_id
        engine.start(request_id)
        engine.give(request_id, "b", first=1)
        engine.finish(request_id, tokens=2)

    player = play(lambda: break_after(engine, "a"), rest)
    stream = connect(engine).stream("hi", resume=True, echo=True)
    text = "".join(chunk.text for chunk in stream)
    player.join()

    assert text == "hiab"


def test_missing_tokens_are_noticed(engine, connect):
    def skip():
        request_id = engine.wait_request().request_id
        engine.start(request_id)
        engine.give(request_id, "a", first=1)

    player = play(skip)
    with pytest.raises(JaxserveError, match="choice 0 goes on at token 1 and 0 was expected"):
        list(connect(engine).stream("hi"))
    player.join()


def test_another_model_cannot_continue_an_answer():
    session = StreamSession(
        pb.GenerateRequest(text="hi"), Attempts(QUICK, None, Ticking()), resume=True
    )
    session.accept(pb.GenerateResponse(started=pb.GenerateStarted(model_digest="one")))
    with pytest.raises(JaxserveError, match=r"another model \(digest two instead of one\)"):
        session.accept(pb.GenerateResponse(started=pb.GenerateStarted(model_digest="two")))


@pytest.fixture
def plain_server():
    """Starts servers that are not jaxserve's and answer ``Generate`` as told."""
    servers = []

    def start(*responses: pb.GenerateResponse) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        handler = grpc.unary_stream_rpc_method_handler(
            lambda request, context: iter(responses),
            request_deserializer=pb.GenerateRequest.FromString,
            response_serializer=pb.GenerateResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler(
            "jaxserve.v1.GenerationService", {"Generate": handler}
        )
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def test_a_stream_that_ends_early_without_an_error_is_broken(plain_server):
    """A proxy may end a stream with OK."""
    address = plain_server(pb.GenerateResponse(started=pb.GenerateStarted(request_id="r")))
    with Client(address) as client, pytest.raises(RetryableError, match="ended before"):
        list(client.stream("hi"))


def test_a_call_that_the_server_does_not_have_is_not_tried_again(plain_server):
    with Client(plain_server()) as client, pytest.raises(JaxserveError, match="UNIMPLEMENTED"):
        client.health()


def test_events_of_a_later_version_are_passed_over(plain_server):
    finished = pb.GenerateFinished(reason=pb.FINISH_REASON_STOP)
    address = plain_server(pb.GenerateResponse(), pb.GenerateResponse(finished=finished))
    with Client(address) as client:
        (chunk,) = client.stream("hi")

    assert chunk.finish is not None
