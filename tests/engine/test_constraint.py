"""Answers that obey a grammar: every token, in every company, and what happens where one ends."""

from __future__ import annotations

import pytest

from jaxserve.engine.request import FinishReason
from jaxserve.errors import InvalidRequestError
from jaxserve.testing import ScriptedConstraint, counting_engine, expected_tokens
from tests.engine.driving import Reader, lose_the_pool, run, submit, turn

VOCAB = 259
PROMPT = [5, 6, 7, 8, 9]
SCRIPT = ({10, 40, 200}, {31, 32}, {258}, {0, 63, 64}, {100})


def walk(prompt: list[int], script: tuple[set[int], ...] = SCRIPT) -> list[int]:
    """The answer by hand: of a place's tokens the first that the sum comes to, going up."""
    context = list(prompt)
    for allowed in script:
        banned = set(range(VOCAB)) - allowed
        context += expected_tokens(context, 1, vocab_size=VOCAB, banned=banned)
    return context[len(prompt) :]


@pytest.mark.parametrize("overlap", [True, False])
def test_an_answer_obeys_its_grammar_among_others_and_ends_with_it(overlap: bool) -> None:
    engine, _ = counting_engine(max_rows=4, overlap=overlap)
    free = submit(engine, "free", [1, 2, 3], max_tokens=12)
    turn(engine, 2)
    held = [
        submit(engine, name, prompt, max_tokens=30, constraint=ScriptedConstraint(*SCRIPT))
        for name, prompt in (("a", PROMPT), ("b", PROMPT * 5))
    ]
    run(engine)
    assert held[0].tokens() == walk(PROMPT)
    assert held[1].tokens() == walk(PROMPT * 5)
    assert {reader.finish().reason for reader in held} == {FinishReason.STOP}
    assert free.tokens() == expected_tokens([1, 2, 3], 12, vocab_size=VOCAB)


def test_choices_walk_a_grammar_each_by_itself() -> None:
    engine, _ = counting_engine(max_rows=4)
    reader = submit(
        engine, "a", PROMPT, n=3, temperature=1.0, seed=3, constraint=ScriptedConstraint(*SCRIPT)
    )
    run(engine)
    for choice in range(3):
        tokens = reader.tokens(choice)
        assert len(tokens) == len(SCRIPT)
        assert all(token in allowed for token, allowed in zip(tokens, SCRIPT, strict=True))


def test_a_grammar_goes_on_behind_what_is_resumed() -> None:
    engine, _ = counting_engine()
    whole = walk(PROMPT)
    reader = submit(engine, "a", PROMPT, resume=whole[:2], constraint=ScriptedConstraint(*SCRIPT))
    run(engine)
    assert reader.tokens() == whole[2:]


@pytest.mark.parametrize("overlap", [True, False])
def test_preemption_and_a_lost_pool_leave_a_grammar_where_it_stood(overlap: bool) -> None:
    engine, _ = counting_engine(max_rows=3, num_pages=9, context_tokens=32, overlap=overlap)
    script = tuple({place, place + 50} for place in range(20))
    prompts = [[number, 6, 7, 8, 9] for number in range(3)]
    readers = [
        submit(engine, str(number), prompt, constraint=ScriptedConstraint(*script))
        for number, prompt in enumerate(prompts)
    ]
    turn(engine, 6)
    lose_the_pool(engine)
    run(engine)
    assert engine.stats().preemptions_total
    for prompt, reader in zip(prompts, readers, strict=True):
        assert reader.tokens() == walk(prompt, script)


def test_the_end_of_a_grammar_may_also_be_an_end_token() -> None:
    engine, _ = counting_engine(end_ids=(100,))
    reader = submit(engine, "a", PROMPT, constraint=ScriptedConstraint(*SCRIPT))
    run(engine)
    assert reader.tokens() == walk(PROMPT)
    assert reader.finish().stop_token_id == 100


def fails(reader: Reader, match: str, error: type[Exception] = InvalidRequestError) -> None:
    assert reader.finish().reason is FinishReason.ERROR
    with pytest.raises(error, match=match):
        raise reader.finish().error or AssertionError


def test_a_grammar_that_passes_a_limit_fails_its_request_alone() -> None:
    engine, _ = counting_engine(max_rows=4)
    other = submit(engine, "other", PROMPT, constraint=ScriptedConstraint(*SCRIPT))
    broken = submit(engine, "a", PROMPT, constraint=ScriptedConstraint(*SCRIPT, fails_at=2))
    run(engine)
    fails(broken, "the grammar cannot go on here: the script says so")
    assert other.tokens() == walk(PROMPT)


def test_a_grammar_and_banned_tokens_may_leave_nothing() -> None:
    engine, _ = counting_engine()
    reader = submit(
        engine, "a", PROMPT, banned_token_ids=[258], constraint=ScriptedConstraint(*SCRIPT)
    )
    run(engine)
    fails(reader, "grammar, allowed and banned tokens leave no token")
    error = reader.finish().error
    assert isinstance(error, InvalidRequestError)
    assert error.field == "banned_token_ids"


def test_a_token_that_a_grammar_does_not_have_fails_the_request() -> None:
    """That cannot come from a device that was told; one that was not is a defect, and is named."""
    engine, runner = counting_engine()
    runner.on_dispatch = lambda inputs: inputs.masks and inputs.masks.words.fill(-1)
    reader = submit(engine, "a", PROMPT, constraint=ScriptedConstraint(*SCRIPT))
    run(engine)
    fails(reader, "it does not go on behind token")
