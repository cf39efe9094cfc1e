from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.text import TextAssembler
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint


class ByteTokens:
    """Token n is byte n; 256 is a control token, 257 is a whole word, 258 is three bytes."""

    special_ids = frozenset({256})
    strips_leading_space = False
    words = {256: b"<end>", 257: b" stop it", 258: "日".encode()}  # noqa: RUF012

    def token_bytes(self, token_id: int) -> bytes:
        return self.words.get(token_id) or bytes((token_id,))

    def decode(self, ids: Sequence[int], *, skip: bool) -> str:
        kept = [i for i in ids if not (skip and i in self.special_ids)]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")


class SpacedTokens(ByteTokens):
    """The same, but text loses its leading space, as SentencePiece's does."""

    strips_leading_space = True


TOKENS = ByteTokens()


@pytest.fixture(scope="module")
def smollm2(assets: Callable[[str], Path]) -> Tokenizer:
    return load_tokenizer(open_checkpoint(assets("smollm2")).tokenizer_files())


def cut_at_stop(text: str, stops: Sequence[str], *, include: bool) -> str:
    """The whole text up to the stop string that is complete first, by looking at all of it."""
    ends = [
        (text.find(stop) + len(stop), text.find(stop)) for stop in stops if text.find(stop) >= 0
    ]
    if not ends:
        return text
    end, start = min(ends)
    return text[:end] if include else text[:start]


def stream(assembler: TextAssembler, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Pushes ids in pieces of the given sizes, then finishes; returns every text."""
    texts, at = [], 0
    for size in [*sizes, len(ids)]:
        delta = assembler.push(ids[at : at + size])
        texts.append(delta.text)
        at += size
        if delta.stopped:
            break
    return [*texts, assembler.finish()]


BYTES = st.one_of(st.sampled_from([*b"ab st", 0xE6, 0x97, 0xA5, 0xF0, 0xFF, 256, 257, 258]))
STOPS = st.lists(st.sampled_from(["a", "ab", "ba", "bb", "stop", " st", "日", "日a", "\ufffd"]))


@given(
    ids=st.lists(st.integers(0, 258) | BYTES),
    sizes=st.lists(st.integers(0, 4)),
    stops=STOPS,
    include=st.booleans(),
    skip=st.booleans(),
)
def test_pieces_add_up_to_the_whole_text_cut_at_the_first_stop(
    ids: list[int], sizes: list[int], stops: list[str], include: bool, skip: bool
) -> None:
    assembler = TextAssembler(TOKENS, stop=stops, include_stop=include, skip_special_tokens=skip)
    found = "".join(stream(assembler, ids, sizes))
    assert found == cut_at_stop(TOKENS.decode(ids, skip=skip), stops, include=include)
    assert assembler.finish() == ""


@given(data=st.data(), sizes=st.lists(st.integers(0, 5)), skip=st.booleans())
def test_the_same_with_a_real_tokenizer(
    smollm2: Tokenizer, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, smollm2.vocab_size - 1) | st.integers(0, 300)))
    whole = smollm2.fast.decode(ids, skip_special_tokens=skip)
    starts = st.integers(0, max(0, len(whole) - 1))
    stops = [whole[at : at + 3] for at in data.draw(st.lists(starts, max_size=3)) if whole]
    assembler = TextAssembler(smollm2, stop=stops, skip_special_tokens=skip)
    found = "".join(stream(assembler, ids, sizes))
    assert found == cut_at_stop(whole, stops, include=False)


@given(ids=st.lists(BYTES, min_size=1), stops=STOPS, data=st.data())
def test_a_resumed_answer_goes_on_where_the_text_ended(
    ids: list[int], stops: list[str], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    first = TextAssembler(TOKENS, stop=stops)
    sent = first.push(ids[:cut])
    second = TextAssembler(TOKENS, stop=stops, context=ids[:cut])
    assert second.stopped == sent.stopped
    rest = second.push(ids[cut:]).text + second.finish()
    assert sent.text + rest == cut_at_stop(TOKENS.decode(ids, skip=True), stops, include=False)


def test_half_a_character_is_never_sent() -> None:
    assembler = TextAssembler(TOKENS)
    assert [assembler.push([byte]).text for byte in "é日".encode()] == ["", "é", "", "", "日"]


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    assembler = TextAssembler(TOKENS)
    assert assembler.push([0xE6, 0x97]).text == ""
    assert assembler.finish() == "\ufffd"


def test_text_waits_only_while_it_could_become_a_stop_string() -> None:
    assembler = TextAssembler(TOKENS, stop=["###", "User:"])
    texts = [assembler.push([byte]).text for byte in b"a##b Us.#"]
    assert texts == ["a", "", "", "##b", " ", "", "", "Us.", ""]
    assert assembler.finish() == "#"


def test_a_stop_string_may_begin_inside_one_token_and_end_inside_another() -> None:
    assembler = TextAssembler(TOKENS, stop=["a stop"])
    assert assembler.push([*b"xa"]).text == "x"
    delta = assembler.push([257, *b"more"])
    assert (delta.text, delta.stopped, delta.tokens, delta.stop) == ("", True, 1, "a stop")
    after = assembler.push([*b"b"])
    assert (after.text, after.stopped, after.tokens) == ("", True, 0)


def test_include_stop_keeps_the_stop_string_and_nothing_after_it() -> None:
    assembler = TextAssembler(TOKENS, stop=["stop"], include_stop=True)
    assert assembler.push([*b"no", 257]).text == "no stop"


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assembler = TextAssembler(TOKENS, stop=["abcd", "bc"])
    delta = assembler.push([*b"xabcd"])
    assert (delta.text, delta.stop) == ("xa", "bc")


def test_of_stop_strings_complete_at_once_the_longest_wins() -> None:
    assembler = TextAssembler(TOKENS, stop=["c", "abc"])
    delta = assembler.push([*b"xabc"])
    assert (delta.text, delta.stop) == ("x", "abc")


def test_a_stop_string_may_be_completed_by_the_flush() -> None:
    assembler = TextAssembler(TOKENS, stop=["a\ufffd"])
    assert assembler.push([*b"xa", 0xE6]).text == "x"
    assert assembler.finish() == ""
    assert assembler.stopped


def test_control_tokens_show_only_when_asked_for() -> None:
    assert TextAssembler(TOKENS).push([65, 256, 66]).text == "AB"
    assert TextAssembler(TOKENS, stop=["x"]).push([65, 256, 66]).text == "AB"
    assert TextAssembler(TOKENS, skip_special_tokens=False).push([65, 256]).text == "A<end>"


def test_a_leading_space_is_dropped_once_and_only_at_the_start() -> None:
    assembler = TextAssembler(SpacedTokens())
    assert [assembler.push([byte]).text for byte in b"  a b"] == ["", " ", "a", " ", "b"]
    assert TextAssembler(SpacedTokens(), context=[65]).push([*b" b"]).text == " b"


def test_bytes_that_never_become_a_character_cost_no_more_each() -> None:
    """Quadratic work would take a minute here, and would stall every other stream."""
    assembler = TextAssembler(TOKENS, stop=["stop"])
    texts = [assembler.push([0x80]).text for _ in range(20_000)]
    assert "".join(texts) + assembler.finish() == "\ufffd" * 20_000


def test_many_long_stop_strings_cost_no_more_than_few() -> None:
    """Every suffix of the text begins all of these strings."""
    stops = ["a" * 255 + chr(ord("b") + number) for number in range(16)]
    assembler = TextAssembler(TOKENS, stop=stops)
    text = "".join(assembler.push([97]).text for _ in range(10_000))
    assert len(text) == 10_000 - 255
    assert assembler.push([ord("c")]).stop == stops[1]
