"""The doubles of ``jaxserve.testing`` are tests' ground, so they are tested themselves."""

from __future__ import annotations

import pytest

from jaxserve.engine.step import Column, ProgramCall, StepInputs
from jaxserve.testing import (
    ByteTokenizer,
    ManualClock,
    counting_engine,
    expected_tokens,
    paced_engine,
)
from tests.engine.driving import run, submit, turn


def test_a_manual_clock_moves_when_it_is_told_to() -> None:
    clock = ManualClock(5.0)
    assert clock() == clock() == 5.0
    clock.advance(1.5)
    assert clock() == 6.5


def test_the_expected_tokens_are_a_weighted_sum_of_everything_before() -> None:
    assert expected_tokens([2, 3], 2, vocab_size=100) == [9, 36]  # 1+2+6, then 27 more.
    assert expected_tokens([2, 3], 1, vocab_size=100, seed=4, choice=2) == [75]
    assert expected_tokens([2, 3], 2, vocab_size=100, penalised=True) == [9, 37]
    assert expected_tokens([2, 3], 1, vocab_size=100, banned=(9, 10)) == [11]


@pytest.mark.parametrize("page", [0, 1, 2])
def test_a_page_that_is_overwritten_changes_the_answer(page: int) -> None:
    engine, runner = counting_engine()
    reader = submit(engine, "a", [1, 2, 3, 4, 5, 6], max_tokens=6)
    turn(engine, 2)
    runner._pool[page][0] += 1
    run(engine)

    same = reader.tokens() == expected_tokens([1, 2, 3, 4, 5, 6], 6, vocab_size=259)
    assert same == (page == 0), "the null page is never read"


def test_a_page_that_was_not_written_changes_the_answer() -> None:
    engine, runner = counting_engine()
    reader = submit(engine, "a", [1, 2, 3, 4, 5, 6], max_tokens=6)
    turn(engine, 2)
    runner.reset()
    run(engine)

    assert reader.tokens() != expected_tokens([1, 2, 3, 4, 5, 6], 6, vocab_size=259)


def test_the_double_insists_on_compiled_shapes() -> None:
    engine, runner = counting_engine()
    steps: list[StepInputs] = []
    runner.on_dispatch = steps.append
    submit(engine, "a", [1, 2], max_tokens=2)
    run(engine)
    prefill, decode = steps[0].calls[0], steps[1].calls[0]

    def dispatch(kind: str, bucket: tuple[int, int], call: ProgramCall) -> None:
        changed = ProgramCall(kind, bucket, call.buffer)
        runner.dispatch(StepInputs([changed], [], 0, 0))

    with pytest.raises(AssertionError, match="is not a compiled shape"):
        dispatch("prefill", (1, 8), prefill)
    runner._buckets["decode"] = {(1, 1)}
    decode.buffer = decode.buffer.repeat(2, axis=0)
    with pytest.raises(AssertionError, match=r"\(2, 1\) is not a decode bucket"):
        dispatch("decode", (2, 1), decode)
    runner._buckets["decode"] = {(2, 1)}
    decode.buffer[0, Column.LENGTH] = 0
    with pytest.raises(AssertionError, match="padding among the lines"):
        dispatch("decode", (2, 1), decode)


def test_a_paced_runner_takes_its_time_and_says_the_alphabet() -> None:
    engine, _ = paced_engine(step_s=0.002)
    reader = submit(engine, "a", [1], max_tokens=27)
    run(engine)

    text = ByteTokenizer().decode(reader.tokens(), skip_special_tokens=True)
    assert text == "abcdefghijklmnopqrstuvwxyza"
    assert engine.stats().phase_seconds_total["wait"] > 0.02


def test_a_byte_tokenizer_gives_back_what_it_was_given() -> None:
    tokenizer = ByteTokenizer()
    text = "naïve <turn>日本 <eos>"
    ids = tokenizer.encode(text, add_special_tokens=True)

    assert ids[0] == tokenizer.bos_id == 256
    assert ids.count(257) == ids.count(258) == 1
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "naïve 日本 "
    assert tokenizer.encode("a", add_special_tokens=False) == [97]
    assert tokenizer.decode([0xE6, 0x97], skip_special_tokens=True) == "�"
    assert tokenizer.token_text(97) == "a"
    assert tokenizer.token_bytes(400) == b""
    assert max(ids) < tokenizer.vocab_size
