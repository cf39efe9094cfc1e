"""The official client, untouched, against every route of a real engine."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

from jaxserve import LLM
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.parsing import FORMATS
from jaxserve.models.presets import PRESETS

pytestmark = pytest.mark.slow

MODEL = "dummy:tiny-llama"
CHAT: list[Any] = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """tiny-llama with a longer window: a token is a byte here."""
    path = tmp_path_factory.mktemp("model")
    config = {**PRESETS["tiny-llama"], "max_position_embeddings": 2048}
    (path / "config.json").write_text(json.dumps(config))
    with LLM(
        str(path),
        served_name=MODEL,
        load_format="dummy",
        device="cpu",
        dtype="float32",
        context_tokens=2048,
        max_rows=8,
        kv_memory_bytes=16 * 2**20,
        embeddings=True,
        progress=False,
        cache_dir=Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
    ) as made:
        yield made


@pytest.fixture(scope="module")
def address(llm: LLM) -> Iterator[str]:
    """The model has a format with thoughts and tools, as if it had been trained to write it."""
    own = llm._text
    text = TextEngine(own.engine, own.tokenizer, own.template, own.grammars, FORMATS["hermes"])
    server = ServerThread(text, llm.info, ServerConfig(port=0), HttpConfig(port=0))
    server.start()
    assert server.http_address is not None
    yield server.http_address
    server.stop(0.0)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def until(condition: Callable[[], Any]) -> None:
    """Waits until it is true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "jaxserve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_completion_is_what_the_engine_says(llm: LLM, client: openai.OpenAI) -> None:
    expected = llm.generate("Hello", temperature=0.0, max_tokens=12)
    got = client.completions.create(prompt="Hello", max_tokens=12, **GREEDY)
    assert got.choices[0].text == expected.text
    assert got.choices[0].finish_reason == expected.finish_reason.value
    assert got.usage is not None
    assert got.usage.completion_tokens == expected.usage.output_tokens
    pieces = client.completions.create(
        prompt="Hello", max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(pieces)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected.text
    assert chunks[-1].usage == got.usage


def test_several_prompts_and_choices_are_numbered_in_their_order(
    llm: LLM, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "n": 2, "seed": 11, "temperature": 1.0}
    prompts = ["Hello", "The sky", "a"]
    expected = [
        choice.text for prompt in prompts for choice in llm.generate(prompt, **options).choices
    ]
    got = client.completions.create(model=MODEL, prompt=prompts, **options)
    assert [choice.index for choice in got.choices] == list(range(6))
    assert [choice.text for choice in got.choices] == expected
    texts = [""] * 6
    for chunk in client.completions.create(model=MODEL, prompt=prompts, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_an_evaluation_harness_scores_a_prompt(llm: LLM, client: openai.OpenAI) -> None:
    ids = llm.tokenizer.encode("Hello there", add_special_tokens=True)
    scores = llm.score(token_ids=ids, top_logprobs=1)
    for max_tokens in (0, 1):
        got = client.completions.create(
            prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1, **GREEDY
        )
        logprobs = got.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(
            [token.logprob for token in scores.tokens[1:]], abs=1e-5
        )
        assert len(logprobs.tokens or ()) == len(ids) + max_tokens
        # A harness asks whether the text is what the model would have said.
        best = [max(top.values()) for top in logprobs.top_logprobs[1 : len(ids)] if top]
        assert best == pytest.approx([t.top[0].logprob for t in scores.tokens[1:]], abs=1e-5)


def test_a_chat_streams_what_it_says_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "messages": CHAT,
        "max_tokens": 16,
        "n": 2,
        "seed": 5,
        "model": MODEL,
    }
    whole = client.chat.completions.create(logprobs=True, top_logprobs=3, **options)
    texts, tokens = ["", ""], [0, 0]
    reasons: list[Any] = [None, None]
    chunks = client.chat.completions.create(
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=3,
        **options,
    )
    usage: Any = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs = choice.logprobs
            tokens[choice.index] += len((logprobs and logprobs.content) or ())
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for number, choice in enumerate(whole.choices):
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert len(content) == tokens[number]
        assert all(len(entry.top_logprobs) == 3 for entry in content)


class Answer(BaseModel):
    ok: bool
    level: Literal["low", "high"]
    notes: list[Literal["a", "b"]] = Field(max_length=2)


def test_structured_answers_parse(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(
        messages=CHAT, response_format=Answer, max_tokens=200, seed=1, model=MODEL
    )
    assert isinstance(got.choices[0].message.parsed, Answer)
    for more, check in (
        ({"guided_regex": "[ab]{4}"}, lambda text: set(text) <= {"a", "b"} and len(text) == 4),
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"structured_outputs": {"grammar": 'start: "x" "y"+ "z"'}}, lambda t: t[0] == "x"),
        ({"structured_outputs": {"json": {"enum": [7]}}}, lambda text: text == "7"),
    ):
        text = client.chat.completions.create(
            messages=CHAT, max_tokens=30, seed=2, model=MODEL, extra_body=more
        )
        assert check(text.choices[0].message.content)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "travel")
]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "travel"}}]
)
def test_tools_that_have_to_be_called_are_called_with_arguments_that_fit(
    client: openai.OpenAI, choice: Any
) -> None:
    options: dict[str, Any] = {
        "messages": CHAT,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 90,
        "seed": 4,
        "model": MODEL,
    }
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    calls = whole.message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name in (["travel"] if isinstance(choice, dict) else ["weather", "travel"])
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")

    name, text, ids, reason = "", "", set(), None
    for chunk in client.chat.completions.create(stream=True, **options):
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.function is not None
            ids.add(delta.id or "")
            name += delta.function.name or ""
            text += delta.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (name, text, reason) == (call.function.name, call.function.arguments, "tool_calls")
    assert len(ids - {""}) == 1

    # And back again: the call and its result are messages of the next turn.
    history = [
        *CHAT,
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    again = client.chat.completions.create(messages=history, max_tokens=4, **GREEDY)
    assert again.usage is not None
    assert again.usage.prompt_tokens > len("sunny")


def test_a_response_streams_what_it_says_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"input": "Hello", "max_output_tokens": 16, **GREEDY}
    whole = client.responses.create(instructions="Be brief", **options)
    assert whole.status in ("completed", "incomplete")
    assert whole.usage is not None
    assert whole.usage.output_tokens == 16
    text, kinds, numbers, last = "", [], [], None
    for event in client.responses.create(instructions="Be brief", stream=True, **options):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert text == whole.output_text
    assert numbers == list(range(len(numbers)))
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == f"response.{whole.status}"
    assert last is not None
    assert getattr(last, "response").output_text == text  # noqa: B009


def test_responses_call_tools_parse_schemas_and_go_on(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    got = client.responses.create(
        input="Hello", tools=tools, tool_choice="required", parallel_tool_calls=False,
        max_output_tokens=90, **GREEDY,
    )  # fmt: skip
    (call,) = [item for item in got.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    deltas = ""
    with client.responses.stream(
        input="Hello", tools=tools, tool_choice={"type": "function", "name": "travel"},
        parallel_tool_calls=False, max_output_tokens=90, **GREEDY,
    ) as stream:  # fmt: skip
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                deltas += event.delta
        final = stream.get_final_response()
    (streamed,) = [item for item in final.output if item.type == "function_call"]
    assert streamed.name == "travel"
    assert deltas == streamed.arguments
    history: list[Any] = [
        {"role": "user", "content": "Hello"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert client.responses.create(input=history, max_output_tokens=4, **GREEDY).output_text
    parsed = client.responses.parse(
        input="Hello", text_format=Answer, max_output_tokens=200, **GREEDY
    )
    assert isinstance(parsed.output_parsed, Answer)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is kept"),
        ({"background": True}, "nothing is kept"),
        ({"truncation": "auto"}, "shorter input"),
        ({"include": ["file_search_call.results"]}, "only message.output_text.logprobs"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "valid dictionary"),
        ({"tool_choice": {"type": "mcp"}}, "of the type 'mcp'"),
        ({"tool_choice": {"type": "function"}}, "names no function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "not offered; send these tools alone"),
        ({"reasoning": {"foo": 1}}, "reasoning.foo: unknown parameter"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort: Input should be a valid string"),
        ({"text": {"foo": 1}}, "text.foo: unknown parameter"),
        ({"text": {"format": {"type": "text", "foo": 1}}}, "text.format.foo: unknown"),
        ({"tools": [{"type": "function", "name": "f", "foo": 1}]}, "foo: unknown parameter"),
        ({"tools": [{"type": "function", "name": "f", "strict": "no"}]}, "valid boolean"),
        ({"text": {"format": {"type": "xml"}}}, "none of text"),
        ({"text": {"verbosity": "low"}}, "ask for it in a message"),
        ({"input": [{"type": "image_generation_call"}]}, "messages, function calls"),
        ({"input": [{"role": "king", "content": "x"}]}, "is no message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text only"),
    ],
)
def test_what_responses_do_not_offer_is_refused(
    client: openai.OpenAI, more: dict[str, Any], match: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=match):
        client.responses.create(**{"input": "Hello", "model": MODEL, **more})


def test_embeddings_come_as_floats_and_as_bytes(llm: LLM, client: openai.OpenAI) -> None:
    texts = ["Hello", "The sky is blue"]
    expected = llm.embed(texts)
    for form in ("float", "base64"):
        got = client.embeddings.create(model=MODEL, input=texts, encoding_format=form)  # type: ignore[call-overload]
        vectors = [
            np.frombuffer(base64.b64decode(each.embedding), "<f4")
            if isinstance(each.embedding, str)
            else each.embedding
            for each in got.data
        ]
        np.testing.assert_allclose(np.array(vectors, np.float32), expected, atol=1e-6)
    width = expected.shape[1]
    client.embeddings.create(model=MODEL, input=[1, 2, 3], dimensions=width)
    with pytest.raises(openai.BadRequestError, match=f"this model's vectors have {width}"):
        client.embeddings.create(model=MODEL, input="a", dimensions=width - 1)
    with pytest.raises(openai.BadRequestError, match="input has 0 prompts"):
        client.embeddings.create(model=MODEL, input=[])


def test_a_stream_that_is_closed_frees_its_pages(llm: LLM, client: openai.OpenAI) -> None:
    for route in (client.chat.completions, client.completions):
        given: dict[str, Any] = (
            {"messages": CHAT} if route is client.chat.completions else {"prompt": "Hello"}
        )
        with route.create(
            model=MODEL, max_tokens=400, stream=True, extra_body={"ignore_eos": True}, **given
        ) as stream:
            next(iter(stream))
        until(lambda: not llm.stats().pages_used)


def test_a_call_that_is_given_up_frees_its_pages(llm: LLM, address: str) -> None:
    """Not streaming: the client leaves while the answer is being made."""

    async def leave() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"http://{address}/v1", api_key="none", max_retries=0
        ) as client:
            call = asyncio.create_task(
                client.chat.completions.create(
                    model=MODEL, messages=CHAT, max_tokens=400, extra_body={"ignore_eos": True}
                )
            )
            await asyncio.to_thread(until, lambda: llm.stats().rows_running)
            call.cancel()

    asyncio.run(leave())
    until(lambda: not llm.stats().pages_used)


def test_many_clients_at_once_get_what_each_would_get_alone(
    llm: LLM, client: openai.OpenAI
) -> None:
    expected = [llm.generate(f"Number {n}", temperature=0.0, max_tokens=10).text for n in range(12)]
    got = [""] * 12

    def ask(number: int) -> None:
        pieces = client.completions.create(
            prompt=f"Number {number}", max_tokens=10, stream=True, **GREEDY
        )
        got[number] = "".join(piece.choices[0].text for piece in pieces)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
