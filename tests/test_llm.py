"""`LLM`: one engine in the process, asked in every way, against a dense pass and against itself."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, Client, SamplingParams
from jaxserve.engine.request import FinishReason
from jaxserve.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    QueueFullError,
    ShuttingDownError,
)
from jaxserve.frontend.client_types import Generation
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.llm import Stream

pytestmark = pytest.mark.slow

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
PROMPTS = ["Hello", "The sky is blue", "a", "1 2 3 4 5 6 7 8 9"]


def make(**config: Any) -> LLM:
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "context_tokens": 256,
        "max_rows": 4,
        "step_tokens": 16,
        "kv_memory_bytes": 4 * 2**20,
        "max_waiting_requests": 6,
        "progress": False,
        "cache_dir": Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
        **config,
    }
    return LLM("dummy:tiny-llama", **settings)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make() as llm:
        yield llm


def tokens(answers: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


# -- generate --------------------------------------------------------------------------------------


def test_a_text_gives_one_answer_and_a_list_gives_a_list_in_its_order(llm: LLM) -> None:
    alone = [llm.generate(prompt, **GREEDY) for prompt in PROMPTS]
    together = llm.generate(PROMPTS, **GREEDY)
    assert tokens(together) == tokens(alone)
    assert [answer.usage.prompt_tokens for answer in together] == [
        len(llm.tokenizer.encode(prompt, add_special_tokens=True)) for prompt in PROMPTS
    ]
    assert all(answer.finish_reason is FinishReason.LENGTH for answer in alone)


def test_token_ids_are_used_as_they_are(llm: LLM) -> None:
    ids = [llm.tokenizer.encode(prompt, add_special_tokens=True) for prompt in PROMPTS]
    by_text = tokens(llm.generate(PROMPTS, **GREEDY))
    assert tokens(llm.generate(ids, **GREEDY)) == by_text
    assert llm.generate(ids[0], **GREEDY).token_ids == by_text[0]
    assert llm.generate(np.array(ids[1]), **GREEDY).token_ids == by_text[1]


def test_no_prompts_give_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_greedy_answers_are_the_likeliest_tokens_of_a_dense_pass(llm: LLM) -> None:
    answer = llm.generate("The sky", **GREEDY)
    prompt = llm.tokenizer.encode("The sky", add_special_tokens=True)
    logits = llm.logits([*prompt, *answer.token_ids])
    assert tuple(logits[len(prompt) - 1 : -1].argmax(axis=-1)) == answer.token_ids


def test_sampling_params_and_options_say_the_same_and_options_win(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=9, ignore_eos=True)
    by_params = llm.generate("Hello", params)
    by_options = llm.generate("Hello", temperature=0.8, seed=5, max_tokens=9, ignore_eos=True)
    assert by_params.token_ids == by_options.token_ids
    assert by_params.seed == 5
    left_out: Any = None
    shorter = llm.generate("Hello", params, max_tokens=3, min_p=left_out)
    assert shorter.token_ids == by_params.token_ids[:3]


def test_more_prompts_than_the_queue_takes_are_all_answered(llm: LLM) -> None:
    prompts = [[1, 3 + number] for number in range(40)]
    answers = llm.generate(prompts, **GREEDY)
    assert len(answers) == 40
    assert answers[33].token_ids == llm.generate(prompts[33], **GREEDY).token_ids


def test_choices_and_logprobs_come_back_in_full(llm: LLM) -> None:
    answer = llm.generate(
        "Hello", n=3, seed=1, logprobs=2, prompt_logprobs=1, max_tokens=4, ignore_eos=True
    )
    assert [choice.choice for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.output_tokens == 12
    first = answer.choices[0].logprobs
    assert tuple(score.token_id for score in first) == answer.token_ids
    assert all(len(score.top) == 2 and score.logprob < 0 for score in first if score.logprob)
    assert answer.prompt_logprobs[0].logprob is None
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens


def test_chat_uses_the_models_template(llm: LLM) -> None:
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(rendered, add_special_tokens=False)
    expected = llm.generate(ids, **GREEDY).token_ids
    assert llm.chat("Hi", **GREEDY).token_ids == expected
    assert llm.chat([{"role": "user", "content": "Hi"}], **GREEDY).token_ids == expected


def test_one_bad_prompt_is_refused_and_the_others_are_given_up(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError, match="prompt has 300 tokens"):
        llm.generate([[3] * 5, [3] * 300], max_tokens=200)
    assert settled(llm).pages_used == 0
    assert llm.generate("Hello", **GREEDY).text


def test_unknown_options_and_models_are_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"unknown option max_token; there are .*max_tokens"):
        llm.generate("Hello", max_token=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ModelNotFoundError, match="model 'other' is not served here"):
        llm.generate("Hello", model="other")
    assert llm.generate("Hello", model="dummy:tiny-llama", **GREEDY).text


def test_a_full_queue_that_is_not_our_doing_is_reported(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: object, waker: object) -> None:
        raise QueueFullError("requests", 6, 6, retry_after_s=1.0)

    monkeypatch.setattr(llm._service.engine, "submit", refuse)
    with pytest.raises(QueueFullError, match="6 requests"):
        llm.generate(["a", "b"])


def test_generate_works_inside_a_running_event_loop(llm: LLM) -> None:
    async def cell() -> Generation:
        return llm.generate("Hello", **GREEDY)

    assert asyncio.run(cell()).token_ids == llm.generate("Hello", **GREEDY).token_ids


# -- stream ----------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate("Hello", **GREEDY)
    stream = llm.stream("Hello", **GREEDY)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    finish = chunks[-1].finish
    assert finish is not None
    assert finish.usage == replace(whole.usage, cached_tokens=finish.usage.cached_tokens)
    assert stream.prompt_tokens == whole.usage.prompt_tokens
    assert stream.request_id is not None
    assert stream.seed is not None
    assert stream.cached_tokens == finish.usage.cached_tokens


def test_facts_of_a_stream_are_empty_before_its_first_token(llm: LLM) -> None:
    with llm.stream("Hello", **GREEDY) as stream:
        assert (stream.request_id, stream.seed) == (None, None)
        assert (stream.prompt_tokens, stream.cached_tokens) == (0, 0)


def settled(llm: LLM) -> Any:
    """Waits until the engine has no request left: closing a stream is asynchronous."""
    for _ in range(1000):
        if llm._service.engine.idle:
            break
        llm.generate([3], max_tokens=1)  # A turn of the loop.
    assert llm._service.engine.idle
    return llm.stats()


def endless(llm: LLM) -> Stream:
    return llm.stream("Hello", max_tokens=240, ignore_eos=True)


def test_closing_a_stream_cancels_the_request(llm: LLM) -> None:
    before = settled(llm).requests_finished_total["cancelled"]
    stream = endless(llm)
    next(stream)
    stream.close()
    stream.close()
    stats = settled(llm)
    assert stats.pages_used == 0
    assert stats.requests_finished_total["cancelled"] == before + 1
    assert len(list(stream)) <= 240


def test_dropping_a_stream_cancels_the_request(llm: LLM) -> None:
    before = settled(llm).requests_finished_total["cancelled"]
    stream = endless(llm)
    next(stream)
    del stream
    gc.collect()
    assert settled(llm).requests_finished_total["cancelled"] == before + 1


def test_a_stream_takes_messages_or_a_prompt_and_not_both(llm: LLM) -> None:
    chunks = list(llm.stream(messages="Hi", **GREEDY))
    assert "".join(chunk.text for chunk in chunks) == llm.chat("Hi", **GREEDY).text
    with pytest.raises(InvalidRequestError, match="exactly one of a prompt and messages"):
        llm.stream()
    with pytest.raises(InvalidRequestError, match="exactly one of a prompt and messages"):
        llm.stream("a", messages="b")


# -- inside ----------------------------------------------------------------------------------------


def test_score_is_the_log_softmax_of_the_dense_logits(llm: LLM) -> None:
    """Two roads: pages, chunks of 16 tokens and scoring programs; one dense forward pass."""
    ids = list(range(3, 60))
    score = llm.score(token_ids=ids, top_logprobs=3)
    logprobs = np.asarray(jax.nn.log_softmax(llm.logits(ids), axis=-1))
    expected = [logprobs[place, token] for place, token in enumerate(ids[1:])]
    assert score.tokens[0].logprob is None
    np.testing.assert_allclose(
        [token.logprob for token in score.tokens[1:] if token.logprob is not None],
        expected,
        atol=1e-4,
    )
    np.testing.assert_allclose(score.total_logprob, sum(expected), atol=1e-3)
    assert score.tokens[5].top[0].token_id == logprobs[4].argmax()
    assert score.usage.prompt_tokens == len(ids)


def test_a_score_takes_a_text_or_its_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hello", add_special_tokens=True)
    expected = llm.score("Hello")
    for score in (llm.score(ids), llm.score(np.array(ids)), llm.score(token_ids=np.array(ids))):
        assert score.tokens == expected.tokens
    for call in (lambda: llm.score(), lambda: llm.score(ids, token_ids=ids)):
        with pytest.raises(InvalidRequestError, match="exactly one of a text, token_ids and mess"):
            call()


@pytest.mark.parametrize("prompt", [np.array([[3, 4], [5, 6]]), np.array([3.5]), np.array(["a"])])
def test_a_prompt_that_is_neither_text_nor_token_ids_is_shown(llm: LLM, prompt: np.ndarray) -> None:
    for call in (lambda: llm.score(prompt), lambda: llm.stream(prompt)):
        with pytest.raises(InvalidRequestError, match=r"text or a list of token ids, got array\("):
            call()


def test_logits_have_a_float32_row_for_every_token_whatever_the_padding(llm: LLM) -> None:
    long = llm.logits(range(3, 40))
    short = llm.logits(range(3, 13))
    assert long.shape == (37, llm.info.vocab_size)
    assert long.dtype == np.float32
    np.testing.assert_allclose(long[:10], short, atol=1e-5)


def test_logits_refuse_tokens_that_the_model_does_not_have(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        llm.logits([])
    with pytest.raises(InvalidRequestError, match="token_ids holds token id 512"):
        llm.logits([512])
    assert llm.logits([3] * 256).shape[0] == 256
    with pytest.raises(PromptTooLongError):
        llm.logits([3] * 257)


def test_stats_count_what_was_generated(llm: LLM) -> None:
    before = llm.stats()
    llm.generate("Hello", **GREEDY)
    after = llm.stats()
    assert after.output_tokens_total - before.output_tokens_total == 12
    assert after.rows_max == 4


def test_the_llm_and_its_answers_are_shown_in_one_line(llm: LLM) -> None:
    assert repr(llm) == "LLM('dummy:tiny-llama', float32, cpu, data=1,tensor=1)"
    answer = llm.generate("Hello", **GREEDY)
    assert re.fullmatch(r"Generation\('.*', 12 tokens, length\)", repr(answer))
    assert repr(llm.score("Hello")).startswith("Score(5 tokens, total_logprob=-")


def test_a_notebook_shows_text_and_never_its_markup(llm: LLM) -> None:
    answer = llm.generate("Hello", **GREEDY)
    evil = replace(
        answer, choices=(replace(answer.choices[0], text="<script>alert(1)</script>" * 400),)
    )
    html = evil._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "length &middot; 5 prompt tokens" in html
    assert len(html) < 12_000
    assert html.count("…") == 1
    score = llm.score("<b>" * 50)
    assert "<b>" not in score._repr_html_()
    assert 'title="no log-probability"' in score._repr_html_()


# -- the same over gRPC ----------------------------------------------------------------------------


def comparable(value: Any) -> Any:
    """An answer without what differs between equal ones; floats as the wire carries them."""
    if isinstance(value, dict):
        chance = {"request_id", "timing", "cached_tokens"}
        return {name: comparable(item) for name, item in value.items() if name not in chance}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def test_grpc_gives_the_same_answers_to_the_last_field() -> None:
    options: list[dict[str, Any]] = [
        {"seed": 2, "temperature": 0.0, "max_tokens": 20},
        {"seed": 3, "temperature": 0.9, "max_tokens": 20, "top_p": 0.9, "ignore_eos": True},
        {"seed": 4, "n": 2, "logprobs": 3, "prompt_logprobs": 1, "echo": True, "max_tokens": 8},
        {"seed": 5, "stop": ["e", "w"], "include_stop": True, "max_tokens": 30},
    ]
    with make() as llm:
        server = ServerThread(llm._service.text, llm._service.info, ServerConfig(port=0))
        with server as address, Client(address) as client:
            for given in options:
                for prompt in PROMPTS:
                    ours, theirs = llm.generate(prompt, **given), client.generate(prompt, **given)
                    assert comparable(asdict(ours)) == comparable(asdict(theirs))
            ours, theirs = llm.score("Hello", top_logprobs=2), client.score("Hello", top_logprobs=2)
            assert comparable(asdict(ours)) == comparable(asdict(theirs))


# -- the end ---------------------------------------------------------------------------------------


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_close_gives_the_memory_back_and_another_llm_can_be_made() -> None:
    before, arrays = live_bytes(), len(jax.live_arrays())
    for _ in range(2):
        with make() as llm:
            text = llm.generate("Hello", **GREEDY).text
            llm.logits([3, 4])
            assert live_bytes() > before + 2**19, "pages and weights are live"
        assert live_bytes() == before
        assert len(jax.live_arrays()) == arrays
        assert text


def test_a_closed_llm_says_so_and_its_streams_end() -> None:
    llm = make()
    stream = llm.stream("Hello", max_tokens=240, ignore_eos=True)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(ShuttingDownError):
        list(stream)
    for call in (
        lambda: llm.generate("Hello"),
        lambda: llm.stream("Hello"),
        lambda: llm.score("Hello"),
        lambda: llm.logits([3]),
    ):
        with pytest.raises(ConfigError, match="this LLM has been closed; make another"):
            call()


def test_strict_compile_and_logits_exclude_each_other() -> None:
    with make(strict_compile=True) as llm:
        assert llm.generate("Hello", **GREEDY).text
        with pytest.raises(ConfigError, match="logits compiles a program, which strict_compile"):
            llm.logits([3])


def test_an_engine_that_dies_is_reported_to_whoever_waits() -> None:
    with make() as llm:

        def die(inputs: object) -> None:
            raise SystemExit("out of luck")

        llm._service.runner.dispatch = die  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(EngineDeadError, match="out of luck"):
            llm.generate("Hello")


def test_an_engine_that_hangs_is_reported_to_whoever_waits(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxserve.engine.engine import Health

    monkeypatch.setattr("jaxserve.frontend.in_process_calls.HEALTH_INTERVAL_S", 0.01)
    monkeypatch.setattr(
        llm._service.engine, "health", lambda: Health(False, "no step has finished")
    )
    monkeypatch.setattr("jaxserve.frontend.in_process_calls.Inbox.wake", lambda self, streams: None)
    with pytest.raises(EngineDeadError, match="no step has finished"):
        llm.generate("Hello", max_tokens=1)


def test_unknown_settings_are_named() -> None:
    with pytest.raises(TypeError, match="max_row"):
        make(max_row=3)


# -- grammars --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_obeys_its_grammar_beside_answers_that_have_none(
    llm: LLM, temperature: float
) -> None:
    free = llm.generate("Hello", **GREEDY)
    with llm.stream("Hello", **GREEDY) as beside:
        chosen: dict[str, Any] = {"temperature": temperature, "seed": 7, "n": 3}
        held = llm.generate("Say", regex=r"[ab]{9}-\d{2}", **chosen)
        assert [part for chunk in beside for part in chunk.token_ids] == list(free.token_ids)
    for choice in held.choices:
        assert re.fullmatch(r"[ab]{9}-\d{2}", choice.text)
        assert choice.finish.reason is FinishReason.STOP
        assert choice.finish.stop_token_id is None
    again = llm.generate("Say", regex=r"[ab]{9}-\d{2}", **chosen)
    assert [choice.text for choice in again.choices] == [choice.text for choice in held.choices]


@pytest.mark.parametrize("mesh", ["1x2", "2x1"])
def test_more_rows_than_one_call_takes_obey_grammars_on_a_mesh(mesh: str) -> None:
    """Each row its own: a mask that reached another row, or shard, would show."""
    with make(mesh=mesh, max_rows=20, max_waiting_requests=64, device="cpu:8") as llm:
        with llm.stream("go on", max_tokens=4) as stream:
            next(stream)  # The others wait together, and so run together.
        calls = [
            llm._call(llm_prompt, SamplingParams(temperature=1.0), {"regex": f"{number:03}x{{8}}"})
            for number, llm_prompt in enumerate([GenerationCall(text="Say")] * 40)
        ]
        answers = llm._run(calls)
    assert [answer.text for answer in answers] == [f"{n:03}xxxxxxxx" for n in range(40)]


def test_a_json_schema_makes_a_random_model_write_json(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
        "required": ["ok", "level"],
        "additionalProperties": False,
    }
    text = llm.generate("Hello", json_schema=schema, temperature=1.0, seed=3).text
    answer = json.loads(text)
    assert set(answer) == {"ok", "level"}
    assert isinstance(answer["ok"], bool)
    assert answer["level"] in ("low", "high")


def test_a_grammar_that_cannot_be_used_is_refused_and_the_next_request_works(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"regex cannot be used: .*unclosed group"):
        llm.generate("Hello", regex="(")
    with pytest.raises(InvalidRequestError, match="regex and choices are given"):
        llm.generate("Hello", regex="a", choices=["a"])
    assert llm.generate("Hello", choices=["yes", "no"], temperature=0.0).text in ("yes", "no")


def test_a_client_sends_every_kind_of_grammar(llm: LLM) -> None:
    with (
        ServerThread(llm._text, llm.info, ServerConfig(port=0)) as address,
        Client(address) as client,
    ):
        asked: dict[str, Any] = {"temperature": 1.0, "seed": 5}
        kinds: list[dict[str, Any]] = [
            {"json_schema": {"enum": [1, "two"]}},
            {"regex": "[xyz]{5}"},
            {"grammar": 'start: "a" "b"+ "c"'},
            {"choices": ["red", "green"]},
        ]
        for kind in kinds:
            there = client.generate("Hello", max_tokens=20, **kind, **asked)
            assert there.text == llm.generate("Hello", max_tokens=20, **kind, **asked).text
        started = client.generate("Hello", json_object=True, max_tokens=4, **asked)
        assert started.text.startswith("{")
        with pytest.raises(InvalidRequestError, match="grammar cannot be used"):
            client.generate("Hello", grammar="start: x")
        with pytest.raises(InvalidRequestError, match="choices holds something"):
            client.generate("Hello", choices=[1])  # type: ignore[list-item]


# -- embeddings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x1"])
def test_an_embedding_is_what_the_head_sees_at_length_1(mesh: str) -> None:
    """The head's product with it is the dense pass's logits, but for their length."""
    texts = ["Hello", "The sky is blue", "x" * 60, "", "Hello"]
    with make(mesh=mesh, embeddings=True, device="cpu:8", max_waiting_requests=4) as llm:
        vectors = llm.embed(texts[:3])
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.array_equal(llm.embed("Hello"), vectors[:1])
        params = llm._service.runner.params
        assert params is not None
        model = llm._service.runner.model
        head = np.asarray(model.head_weight(params), np.float32)[: llm.info.vocab_size]
        for text, vector in zip(texts, vectors, strict=False):
            ids = llm.tokenizer.encode(text, add_special_tokens=True)
            logits = llm.logits(ids)[-1]
            found = head @ vector
            np.testing.assert_allclose(
                found / np.linalg.norm(found), logits / np.linalg.norm(logits), atol=2e-5
            )
        # More than the queue takes at once, with answers beside them.
        with llm.stream("Hello", **GREEDY):
            many = llm.embed(["a", "bc", "def"] * 10)
        assert np.array_equal(many[:3], many[27:])
        with pytest.raises(InvalidRequestError, match="prompt is empty"):
            llm.embed([""])
        with (
            ServerThread(llm._text, llm.info, ServerConfig(port=0)) as address,
            Client(address) as client,
        ):
            assert np.array_equal(np.array(client.embed(texts[:3]), np.float32), vectors)
            with pytest.raises(InvalidRequestError, match="texts has 0 prompts"):
                client.embed([])
            with pytest.raises(InvalidRequestError, match="texts cannot be sent"):
                client.embed(["a"], truncate_prompt_tokens=2**40)


def test_an_llm_without_embeddings_refuses_them(llm: LLM) -> None:
    assert not llm.info.has_embeddings
    with pytest.raises(InvalidRequestError, match="embeddings are off"):
        llm.embed("Hello")
