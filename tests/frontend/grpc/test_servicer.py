"""GenerationService over a real socket: order of messages, fields, and the unary calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import grpc
import pytest

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.errors import (
    RequestFailedError,
)
from jaxserve.frontend.template import ChatTemplate
from jaxserve.v1 import generation_pb2 as pb
from tests.frontend.grpc.asking import ask, details, fail

Code = grpc.StatusCode

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
