"""Client and AsyncClient against a real server: results and errors, and the same awaited."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from jaxserve import errors
from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.errors import (
    DeadlineExceededError,
    DrainingError,
    InvalidRequestError,
    JaxserveError,
    ModelNotFoundError,
    PromptTooLongError,
    QueueFullError,
    RequestNotFoundError,
    RetryableError,
)
from jaxserve.frontend.client import AsyncClient, Client, RetryPolicy
from tests.frontend.grpc.clients import QUICK, break_after, play


def test_importing_the_client_starts_no_accelerator_runtime_and_no_server():
    code = (
        "import sys, jaxserve; jaxserve.Client; jaxserve.AsyncClient; "
        "bad = {'jax', 'jaxlib', 'flax', 'transformers', 'tokenizers', 'numpy', "
        "'jaxserve.frontend.grpc', 'jaxserve.engine.engine'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


# -- results ---------------------------------------------------------------------------------------


def test_generate_returns_the_whole_answer(scripted, connect):
    engine = scripted("héllo")
    answer = connect(engine).generate("hi", max_tokens=6, logprobs=0, seed=7, request_id="r")

    assert (answer.text, answer.token_ids) == ("héllo", tuple(engine.ids("héllo")))
    assert (answer.request_id, answer.model_digest, answer.seed) == ("r", "d1", 7)
    assert answer.finish_reason is FinishReason.LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (5, 6)
    assert answer.timing.first_token_s == 0.5
    assert answer.choices[0].logprobs[0].text == "h"
    assert answer.choices[0].logprobs[0].logprob == -0.5


def test_stream_gives_chunks_and_then_the_end(scripted, connect):
    engine = scripted("abc")
    stream = connect(engine).stream("hi", max_tokens=3)
    chunks = list(stream)

    assert "".join(chunk.text for chunk in chunks) == "abc"
    assert chunks[-1].finish is not None
    assert chunks[-1].finish.reason is FinishReason.LENGTH
    assert (stream.seed, stream.model_digest) == (41, "d1")
    assert stream.request_id == engine.requests[0].request_id
    assert (stream.prompt_tokens, stream.cached_tokens) == (2, 0)


def test_facts_of_a_stream_are_unknown_before_it_has_started(engine, connect):
    stream = connect(engine).stream("hi")

    assert (stream.request_id, stream.seed, stream.model_digest) == (None, None, None)
    assert (stream.prompt_tokens, stream.cached_tokens) == (0, 0)
    stream.close()


def test_token_ids_and_lists_and_maps_are_sent(engine, connect):
    client = connect(engine)
    with client.stream(
        token_ids=[4, 5], stop=["x"], logit_bias={7: 1.5}, banned_token_ids=[9], temperature=0.0
    ):
        request = engine.wait_request()

    assert list(request.prompt) == [4, 5]
    assert request.sampling.stop == ("x",)
    assert request.sampling.logit_bias == {7: 1.5}
    assert request.sampling.banned_token_ids == (9,)
    assert request.sampling.temperature == 0.0


def test_leaving_the_with_block_gives_the_request_up(engine, connect):
    with connect(engine).stream("hi", request_id="r") as stream:
        engine.wait_request()
        engine.start("r")
        engine.give("r", "a")
        assert next(stream).text == "a"

    engine.wait(lambda: engine.closed == ["r"])
    assert list(stream) == []


def test_a_stream_can_be_closed_by_another_thread(engine, connect):
    stream = connect(engine).stream("hi", request_id="r")
    engine.wait_request()
    closer = threading.Thread(target=stream.close)
    closer.start()

    assert list(stream) == []
    closer.join()


def test_score_tokenize_detokenize_and_count(engine, connect):
    client = connect(engine)
    ids = client.tokenize("né")
    assert [token for token, _ in client.tokens_of("né")] == ids
    assert client.tokens_of("n", add_special_tokens=False)[0][1] == "n"

    assert ids == engine.ids("né")
    assert client.detokenize([*ids, 2]) == "né<|im_end|>"
    assert client.detokenize([*ids, 2], skip_special_tokens=True) == "né"
    assert client.count_tokens("né") == 3


def test_a_score_has_no_logprob_for_the_first_token(engine, connect):
    client = connect(engine)
    feeder = threading.Thread(target=lambda: _score(engine))
    feeder.start()
    score = client.score("ab", top_logprobs=1)
    feeder.join()

    assert [token.logprob for token in score.tokens] == [None, -0.5]
    assert score.tokens[1].top[0].logprob == -0.25
    assert score.total_logprob == -0.5
    assert score.usage.prompt_tokens == 2


def _score(engine):
    request_id = engine.wait_request().request_id
    entry = TokenLogprobs(-0.5, 2, (7,), (-0.25,))
    engine.start(request_id, prompt_logprobs=(None, entry))


def test_model_stats_health_and_drain(engine, connect):
    client = connect(engine)

    assert client.model().name == client.models()[0].name == "scripted"
    assert client.model().eos_token_ids == (2, 0)
    stats = client.stats()
    assert (stats.pages_total, stats.requests_finished_total) == (7, {"stop": 3})
    assert next(client.watch_stats(0.05)) == stats
    assert client.health().serving
    assert client.drain(wait_s=1.0).idle
    assert not client.health().serving


def test_chat_takes_one_message_or_a_conversation(engine, connect):
    client = connect(engine)
    for messages in ("hi", [{"role": "user", "content": "hi"}]):
        with pytest.raises(InvalidRequestError, match="this model has no chat template"):
            client.chat(messages)


# -- errors ----------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_is_sent(engine, connect):
    client = connect(engine)
    with pytest.raises(TypeError, match="unknown option temprature; there are allowed_token_ids"):
        client.generate("hi", temprature=1.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(
        InvalidRequestError, match=r"seed cannot be sent.*choose 0 to 1844"
    ) as caught:
        client.generate("hi", seed=-1)
    assert caught.value.field == "seed"
    with pytest.raises(InvalidRequestError, match=r"max_tokens cannot be .* at most 2147483647"):
        client.generate("hi", max_tokens=99_999_999_999)
    for timeout_s in (0.0, -3.0, float("nan")):
        with pytest.raises(InvalidRequestError, match="timeout_s must be above 0") as caught:
            client.generate("hi", timeout_s=timeout_s)
        assert caught.value.field == "timeout_s"
    with pytest.raises(InvalidRequestError, match="prompt cannot be sent"):
        client.generate("\ud800")
    with pytest.raises(InvalidRequestError, match="messages cannot be sent") as caught:
        client.chat("\ud800")
    assert caught.value.field == "messages"
    with pytest.raises(InvalidRequestError, match=r"pass exactly one of a text prompt.*got 2"):
        client.generate("hi", token_ids=[1])
    with pytest.raises(InvalidRequestError, match="token_ids cannot be sent"):
        client.generate(token_ids=[2**40])
    with pytest.raises(InvalidRequestError, match="a message has the role 'me'; it must be one of"):
        client.chat([{"role": "me", "content": ""}])
    with pytest.raises(InvalidRequestError, match="a message of the role 'user' has no text"):
        client.chat([{"role": "user"}])
    assert engine.requests == []


def test_errors_come_back_as_the_class_that_was_raised(engine, connect):
    client = connect(engine, retry=RetryPolicy(attempts=1))
    with pytest.raises(InvalidRequestError, match=r"top_p must be") as invalid:
        client.generate("hi", top_p=2.0)
    with pytest.raises(PromptTooLongError, match="context window is 64") as too_long:
        client.generate("x" * 64)
    with pytest.raises(ModelNotFoundError, match="'other' is not served") as unknown:
        client.generate("hi", model="other")
    with pytest.raises(RequestNotFoundError, match="no live request has the id 'x'"):
        client.abort("x")
    engine.refusals = [QueueFullError("requests", 9, 9, retry_after_s=1.5)]
    with pytest.raises(QueueFullError) as full:
        client.generate("hi")

    assert invalid.value.field == "top_p"
    assert (too_long.value.prompt_tokens, too_long.value.context_tokens) == (64, 64)
    assert (unknown.value.model, unknown.value.served) == ("other", "scripted")
    assert (full.value.value, full.value.retry_after_s) == (9, 1.5)


def test_a_defect_of_the_server_has_no_inside(engine, connect):
    engine.refusals = [KeyError("secret")]
    with pytest.raises(JaxserveError, match="internal error; tell the operator request id"):
        connect(engine).generate("hi")


def test_no_server_is_said_with_the_address():
    with (
        Client("127.0.0.1:1", retry=QUICK) as client,
        pytest.raises(
            RetryableError, match=r"no answer from the server at 127\.0\.0\.1:1"
        ) as caught,
    ):
        client.model()
    assert caught.value.reason == "UNAVAILABLE"


def test_a_timeout_is_a_deadline(engine, connect):
    client = connect(engine, timeout_s=0.1)
    with pytest.raises(DeadlineExceededError, match="did not finish in time; pass a longer"):
        client.generate("hi")


def test_a_prompt_over_the_message_limit_is_an_invalid_request(engine, serving):
    with (
        Client(serving.start(engine, max_message_bytes=1000)) as client,
        pytest.raises(InvalidRequestError, match="a message is larger than its receiver takes"),
    ):
        client.generate("x" * 2000)


# -- the other client ------------------------------------------------------------------------------


def test_the_async_client_has_every_method_of_the_blocking_one():
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(AsyncClient) == public(Client)


def test_the_async_client_does_the_same(scripted, serving):
    engine = scripted("abc")
    address = serving.start(engine)

    async def use() -> None:
        async with AsyncClient(address, retry=QUICK) as client:
            engine.refusals = [DrainingError(retry_after_s=0.001)] * 3
            assert (await client.generate("hi", max_tokens=3)).text == "abc"
            async with client.stream("hi", max_tokens=2) as stream:
                assert "".join([chunk.text async for chunk in stream]) == "ab"
            ids = await client.tokenize("né")
            assert [token for token, _ in await client.tokens_of("né")] == ids
            assert await client.detokenize(ids) == "né"
            assert await client.count_tokens("né") == 3
            assert (await client.model()).name == (await client.models())[0].name == "scripted"
            stats = await client.stats()
            async for seen in client.watch_stats(0.05):
                assert seen == stats
                break
            assert (await client.health()).serving
            with pytest.raises(RequestNotFoundError):
                await client.abort("x")
            with pytest.raises(InvalidRequestError, match="no chat template"):
                await client.chat("hi")
            with pytest.raises(errors.InvalidRequestError, match="prompt is empty"):
                await client.score("")
            assert (await client.drain()).idle

    asyncio.run(use())


def test_an_async_stream_continues_and_closes(engine, serving):
    address = serving.start(engine)

    def rest():
        request_id = engine.wait_request(1).request_id
        engine.start(request_id)
        engine.give(request_id, "b", first=1)

    async def use() -> None:
        async with AsyncClient(address, retry=QUICK) as client:
            stream = client.stream("hi", request_id="r", resume=True)
            assert [(await anext(stream)).text, (await anext(stream)).text] == ["a", "b"]
            waiting = asyncio.create_task(anext(stream, None))
            await asyncio.sleep(0)
            stream.close()
            assert await waiting is None

    player = play(lambda: break_after(engine, "a"), rest)
    asyncio.run(use())
    player.join()
    engine.wait(lambda: "r.resume1" in engine.closed)


def test_cancelling_a_task_that_reads_is_not_swallowed(engine, serving):
    address = serving.start(engine)

    async def use() -> None:
        async with AsyncClient(address, retry=QUICK) as client:
            stream = client.stream("hi", request_id="r")
            waiting = asyncio.create_task(anext(stream))
            await asyncio.to_thread(engine.wait_request)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(use())
    engine.wait(lambda: engine.closed == ["r"])
