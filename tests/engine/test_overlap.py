"""An engine that reads a step before it dispatches the next, beside one whose steps overlap."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.testing import counting_engine, expected_tokens
from tests.engine.driving import Reader, run, submit, turn

PROMPT = [5, 6, 7, 8, 9]


def answer(prompt: list[int], count: int) -> list[int]:
    return expected_tokens(prompt, count, vocab_size=259)


@pytest.mark.parametrize(("overlap", "turns"), [(True, 2), (False, 1)])
def test_without_overlap_a_request_that_comes_during_a_step_joins_the_next(
    overlap: bool, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = counting_engine(overlap=overlap)
    first = submit(engine, "a", PROMPT, max_tokens=12)
    turn(engine, 3)
    came: list[Reader] = []
    publish = engine._publish

    def wait_and_publish(step: Any) -> None:
        if not came:  # While the engine waits for the step.
            came.append(submit(engine, "b", PROMPT, max_tokens=4))
        publish(step)

    monkeypatch.setattr(engine, "_publish", wait_and_publish)
    turn(engine)
    for _ in range(turns):
        assert not came[0].tokens()
        turn(engine)
    assert came[0].tokens() == answer(PROMPT, 1)
    run(engine)

    assert first.tokens() == answer(PROMPT, 12)
    assert came[0].tokens() == answer(PROMPT, 4)


def test_without_overlap_nothing_is_computed_for_an_answer_that_has_ended() -> None:
    tokens = answer(PROMPT, 3)
    steps = {}
    for overlap in (True, False):
        engine, _ = counting_engine(overlap=overlap, end_ids=(tokens[-1],))
        reader = submit(engine, "a", PROMPT, max_tokens=9)
        run(engine)
        assert reader.tokens() == tokens
        steps[overlap] = engine.stats().steps_total
    assert steps == {True: 4, False: 3}
