"""What a request may ask for: every refusal names the field, the value and the limit."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from jaxserve.engine import request as request_module
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.errors import InvalidRequestError, PromptTooLongError
from tests.engine.driving import make_request

VOCAB, CONTEXT = 100, 32


def check(prompt: list[int] | None = None, *, scored: bool = True, **values: Any) -> None:
    request = make_request("r", [1, 2, 3] if prompt is None else prompt, **values)
    request.validate(vocab_size=VOCAB, context_tokens=CONTEXT, prompt_logprobs=scored)


REFUSED = [
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -4}, "max_tokens", "max_tokens must be at least 1, got -4"),
    ({"max_tokens": 30}, "max_tokens", "max_tokens is 30 .* room for 29 .* lower max_tokens to 29"),
    ({"min_tokens": -1}, "min_tokens", "min_tokens must be at least 0, got -1"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "min_tokens must be 0 to 4, got 5"),
    ({"temperature": -0.5}, "temperature", "finite number, 0 to 100, got -0.5"),
    ({"temperature": float("nan")}, "temperature", "temperature must be a finite .*got nan"),
    ({"temperature": float("inf")}, "temperature", "temperature must be a finite .*got inf"),
    ({"temperature": 101.0}, "temperature", "got 101"),
    ({"top_p": 0.0}, "top_p", "top_p must be a finite number, above 0 and at most 1, got 0"),
    ({"top_p": 1.5}, "top_p", "top_p .* got 1.5"),
    ({"top_k": -1}, "top_k", "top_k must be at least 0, got -1"),
    ({"min_p": -0.1}, "min_p", "min_p must be a finite number, 0 to 1, got -0.1"),
    ({"min_p": 1.1}, "min_p", "min_p .* got 1.1"),
    ({"seed": -1}, "seed", "seed must be 0 to 18446744073709551615, got -1"),
    ({"seed": 2**64}, "seed", "seed must be 0 to .*, got 18446744073709551616"),
    ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty .* -2 to 2, got 2.5"),
    ({"frequency_penalty": -3.0}, "frequency_penalty", "frequency_penalty .* got -3"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0 and at most 100, got 0"),
    ({"n": 0}, "n", "n must be 1 to 64, got 0"),
    ({"n": 65}, "n", "n must be 1 to 64, got 65"),
    ({"stop": ("x",) * 17}, "stop", "stop has 17 entries and the limit is 16; send fewer"),
    ({"stop": ("a", "")}, "stop", "stop holds an empty string, which would end every answer"),
    ({"stop": ("x" * 257,)}, "stop", "a string of 257 characters and the limit is 256; shorten"),
    ({"stop_token_ids": (1,) * 17}, "stop_token_ids", "stop_token_ids has 17 entries"),
    ({"stop_token_ids": (100,)}, "stop_token_ids", "holds token id 100; this model's ids are 0 to"),
    ({"logit_bias": {100: 1.0}}, "logit_bias", "logit_bias holds token id 100"),
    ({"logit_bias": {5: float("inf")}}, "logit_bias", r"logit_bias\[5\] must be a finite"),
    ({"logit_bias": {5: 101.0}}, "logit_bias", r"logit_bias\[5\] .* -100 to 100, got 101"),
    ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias", "has 1025 entries"),
    ({"allowed_token_ids": (-1,)}, "allowed_token_ids", "allowed_token_ids holds token id -1"),
    ({"banned_token_ids": (100,)}, "banned_token_ids", "banned_token_ids holds token id 100"),
    (
        {"allowed_token_ids": (1, 2), "banned_token_ids": (2, 1)},
        "banned_token_ids",
        "every one of allowed_token_ids is also in banned_token_ids, so no token is left",
    ),
    (
        {"banned_token_ids": tuple(range(VOCAB))},
        "banned_token_ids",
        "banned_token_ids holds the whole vocabulary",
    ),
    ({"logprobs": 21}, "logprobs", "logprobs must be 0 to 20, got 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs must be 0 to 20, got -1"),
    ({"prompt_logprobs": 1, "scored": False}, "prompt_logprobs", "--no-prompt-logprobs"),
    ({"prompt": []}, "prompt", "prompt is empty; send at least one token"),
    (
        {"prompt": [1, 100]},
        "token_ids",
        "token id 100; this model's ids are 0 to 99",
    ),
    ({"prompt": [-1]}, "token_ids", "token_ids holds token id -1"),
    ({"resume": (100,)}, "resume", "resume holds token id 100"),
    ({"resume": (1,), "n": 2}, "resume", "resume needs n = 1, got n = 2"),
    ({"resume": (1, 2), "max_tokens": 2}, "resume", "resume holds 2 tokens and max_tokens is 2"),
    ({"resume": (1,), "temperature": 1.0}, "seed", "needs the seed that `started` reported"),
    ({"priority": 1_000_001}, "priority", "priority must be -1000000 to 1000000, got 1000001"),
    ({"cache_salt": "x" * 129}, "cache_salt", "cache_salt has 129 characters and the limit is 128"),
]


@pytest.mark.parametrize(("values", "field", "text"), REFUSED)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text) as caught:
        check(**values)

    assert caught.value.field == field


def test_a_request_id_has_a_length() -> None:
    request = Request(request_id="x" * 129, prompt=[1])
    with pytest.raises(InvalidRequestError, match="129 characters and the limit is 128") as caught:
        request.validate(vocab_size=VOCAB, context_tokens=CONTEXT)

    assert caught.value.field == "request_id"


@pytest.mark.parametrize(("prompt", "resume"), [(32, 0), (40, 0), (30, 2)])
def test_a_prompt_leaves_room_for_a_token(prompt: int, resume: int) -> None:
    tokens = prompt + resume
    with pytest.raises(PromptTooLongError, match=f"prompt has {tokens} tokens .* at most 31") as e:
        check([1] * prompt, resume=(1,) * resume)

    assert (e.value.prompt_tokens, e.value.context_tokens) == (tokens, 32)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_tokens": 29, "min_tokens": 29},
        {"prompt": [0] * 31, "max_tokens": 1},
        {"temperature": 100.0, "top_p": 1e-6, "top_k": 10**9, "min_p": 1.0, "seed": 2**64 - 1},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 100.0},
        {"n": 64, "stop": ("x" * 256,) * 16, "stop_token_ids": tuple(range(16))},
        {"logit_bias": {99: -100.0}, "allowed_token_ids": (1, 2), "banned_token_ids": (2,)},
        {"banned_token_ids": tuple(range(VOCAB - 1))},
        {"logprobs": 20, "prompt_logprobs": 0},
        {"resume": (1, 2), "temperature": 1.0, "seed": 0, "max_tokens": 3},
        {"priority": -1_000_000, "cache_salt": "x" * 128},
    ],
)
def test_every_limit_itself_is_allowed(values: dict[str, Any]) -> None:
    check(**values)


def test_the_defaults_are_plain_sampling() -> None:
    SamplingParams().validate(vocab_size=2)


def test_one_stop_string_is_not_a_list_of_its_characters() -> None:
    assert SamplingParams(stop="three").stop == ("three",)


def test_a_salt_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="half a surrogate pair") as caught:
        check(cache_salt="\ud800")
    assert caught.value.field == "cache_salt"


@pytest.mark.parametrize("value", [1.5, True, "3"])
def test_numbers_that_count_are_whole(value: Any) -> None:
    """Through the plain function: the tests' run-time types would refuse the call before."""
    check_int = inspect.unwrap(request_module._check_int)
    with pytest.raises(InvalidRequestError, match=r"seed must be a whole number, got"):
        check_int("seed", value, 0, None)
    check_tokens = inspect.unwrap(request_module._check_tokens)
    with pytest.raises(InvalidRequestError, match="token ids are whole numbers"):
        check_tokens("prompt", [1, value], None, VOCAB)


def test_numpy_integers_count_as_whole() -> None:
    inspect.unwrap(request_module._check_int)("seed", np.int64(3), 0, None)
    inspect.unwrap(request_module._check_tokens)("prompt", list(np.arange(3)), None, VOCAB)
