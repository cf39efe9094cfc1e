"""Prompts that are embedded: alone, in chunks, behind shared pages, among answers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jaxserve.engine.request import (
    EmbeddingEvent,
    FinishReason,
    Request,
    SamplingParams,
    TokenEvent,
)
from jaxserve.engine.step import StepInputs
from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.testing import counting_engine, expected_tokens
from tests.engine.driving import Reader, Recorder, run, submit, turn

VOCAB = 259


def embed(engine: Any, name: str, prompt: list[int]) -> Reader:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    request = Request(request_id=name, prompt=prompt, sampling=sampling, embed=True)
    return Reader(engine.submit(request, Recorder()))


def vector(reader: Reader) -> tuple[float, ...]:
    (event,) = [event for event in reader.events if isinstance(event, EmbeddingEvent)]
    assert not [event for event in reader.events if isinstance(event, TokenEvent)]
    assert reader.finish().reason is FinishReason.STOP
    assert reader.finish().output_tokens == 0
    return event.vector


def expected(prompt: list[int]) -> tuple[float, float]:
    """Where the last token stands and what it is, at length 1."""
    length = math.hypot(len(prompt), prompt[-1])
    return len(prompt) / length, prompt[-1] / length


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("data_shards", [1, 2])
def test_prompts_of_any_length_are_embedded_among_answers(overlap: bool, data_shards: int) -> None:
    engine, runner = counting_engine(
        embeddings=True, overlap=overlap, data_shards=data_shards, max_rows=6, num_pages=64
    )
    kinds: set[str] = set()

    def look(inputs: StepInputs) -> None:
        kinds.update(call.kind for call in inputs.calls)

    runner.on_dispatch = look
    beside = submit(engine, "answer", [1, 2, 3], max_tokens=20)
    turn(engine, 2)
    prompts = [[number + 1] * (1 + 9 * number) for number in range(7)]
    readers = [embed(engine, str(number), prompt) for number, prompt in enumerate(prompts)]
    run(engine)
    for prompt, reader in zip(prompts, readers, strict=True):
        assert vector(reader) == pytest.approx(expected(prompt), abs=1e-6)
    assert beside.tokens() == expected_tokens([1, 2, 3], 20, vocab_size=VOCAB)
    assert kinds == {"prefill", "decode", "embed"}


def test_a_prompt_that_is_known_is_embedded_from_its_last_token() -> None:
    engine, _ = counting_engine(embeddings=True)
    prompt = list(range(1, 14))
    first = embed(engine, "a", prompt)
    run(engine)
    again = embed(engine, "b", prompt)
    run(engine)
    assert vector(first) == vector(again)
    assert again.started.cached_tokens == 12


def test_a_prompt_without_a_finite_meaning_fails_alone() -> None:
    engine, runner = counting_engine(embeddings=True)
    embedded = runner._embedded
    runner._embedded = lambda parts: embedded(parts) * float("nan")  # type: ignore[method-assign]
    broken = embed(engine, "a", [1, 2])
    run(engine)
    assert broken.finish().reason is FinishReason.ERROR
    with pytest.raises(RequestFailedError, match="not finite"):
        raise broken.finish().error or AssertionError
    runner._embedded = embedded  # type: ignore[method-assign]
    assert vector(_ran(engine, embed(engine, "b", [1, 2]))) == pytest.approx(expected([1, 2]))


def _ran(engine: Any, reader: Reader) -> Reader:
    run(engine)
    return reader


def test_an_engine_without_the_programs_refuses() -> None:
    engine, _ = counting_engine()
    with pytest.raises(InvalidRequestError, match="launch it with --embeddings") as got:
        embed(engine, "a", [1])
    assert got.value.field == "embed"
