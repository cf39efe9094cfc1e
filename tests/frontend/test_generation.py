"""TextEngine and TextStream with events made by hand: no engine, no socket, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.request import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingParams,
    StartedEvent,
    Timing,
    TokenEvent,
    TokenLogprobs,
)
from jaxserve.engine.stats import EngineStats
from jaxserve.engine.stream import ThreadWaker, TokenStream, Waker
from jaxserve.errors import InvalidRequestError, RequestCancelledError
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import GenerationCall, TextEngine
from jaxserve.frontend.template import ChatTemplate
from jaxserve.frontend.text_stream import (
    PROMPT_TOKENS_PER_DELTA,
    Delta,
    Finished,
    Started,
    TextStream,
)

TOKENIZER = byte_tokenizer()
END = 2
TIMING = Timing(0.0, 0.0, 0.0)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class Limits:
    context_tokens: int = 100
    vocab_size: int = 259


class Recorder:
    """An engine that takes everything and remembers it."""

    limits = Limits()
    idle = True

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.stops: list[int] = []
        self.closed: list[str] = []

    def submit(self, request: Request, waker: Waker) -> TokenStream:
        self.requests.append(request)
        return TokenStream(
            request.request_id,
            request.sampling.n,
            waker,
            on_close=self.closed.append,
            on_stop=lambda _, choice: self.stops.append(choice),
        )

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    def measures(self) -> Any: ...

    def pages(self) -> Any: ...

    def drain(self) -> None: ...

    def health(self) -> Any: ...


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class Fed:
    """A TextStream whose outputs are looked at without asking for their type first."""

    def __init__(self, stream: TextStream) -> None:
        self.of = stream

    def feed(self, events: Sequence[Event]) -> list[Any]:
        return list(self.of.feed(events))


def begin(recorder: Recorder, **fields: Any) -> Fed:
    sampling = {name: fields.pop(name) for name in list(fields) if hasattr(SamplingParams, name)}
    for name in ("seed", "stop", "logit_bias"):
        if name in fields:
            sampling[name] = fields.pop(name)
    call = GenerationCall(**{"text": "hi", **fields, "sampling": SamplingParams(**sampling)})
    return Fed(TextEngine(recorder, TOKENIZER, None).submit(call, ThreadWaker()))


def tokens(text: str | Sequence[int], first: int = 0, choice: int = 0) -> list[Event]:
    numbers = ids(text) if isinstance(text, str) else text
    return [TokenEvent(choice, first + n, token) for n, token in enumerate(numbers)]


def finish(
    reason: FinishReason = FinishReason.LENGTH, *, output: int = 0, **fields: Any
) -> FinishedEvent:
    return FinishedEvent(fields.pop("choice", 0), reason, 2, output, 0, TIMING, **fields)


def text_of(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if isinstance(output, Delta))


# -- what goes in ----------------------------------------------------------------------------------


def test_text_becomes_tokens_and_an_empty_id_is_filled(recorder):
    begin(recorder, priority=4, cache_salt="s", deadline_s=9.0)
    (request,) = recorder.requests

    assert list(request.prompt) == ids("hi")
    assert (request.priority, request.cache_salt, request.deadline_s) == (4, "s", 9.0)
    assert len(request.request_id) == 32


def test_truncation_keeps_the_last_tokens(recorder):
    begin(recorder, text="abcdef", truncate_prompt_tokens=2)
    begin(recorder, text="a", truncate_prompt_tokens=2)

    assert [list(request.prompt) for request in recorder.requests] == [ids("ef"), ids("a")]


@pytest.mark.parametrize("keep", [0, -3])
def test_truncation_to_nothing_is_refused(recorder, keep):
    with pytest.raises(InvalidRequestError, match=f"must be at least 1, got {keep}") as caught:
        begin(recorder, truncate_prompt_tokens=keep)
    assert caught.value.field == "truncate_prompt_tokens"


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"text": None}, 0), ({"token_ids": [5]}, 2), ({"token_ids": [5], "messages": []}, 3)],
)
def test_exactly_one_prompt_is_needed(recorder, fields, count):
    with pytest.raises(InvalidRequestError, match=f"exactly one of .* got {count}") as caught:
        begin(recorder, **fields)
    assert caught.value.field == "prompt"


def test_empty_text_is_refused_here_and_may_be_encoded(recorder):
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        begin(recorder, text="")
    assert TextEngine(recorder, TOKENIZER, None).encode(GenerationCall(text="")) == ([], "")


def test_chat_needs_a_template(recorder):
    with pytest.raises(InvalidRequestError, match="this model has no chat template; send text"):
        begin(recorder, text=None, messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "text": "hi"}])
def test_a_message_without_content_is_named(recorder, message):
    """A template would say that something is undefined."""
    messages = [{"role": "user", "content": "hi"}, message]
    with closing(ChatTemplate("{{ messages[1].content }}", source="test")) as template:
        text = TextEngine(recorder, TOKENIZER, template)
        with pytest.raises(InvalidRequestError, match=r"chat.messages\[1\] has no text") as caught:
            text.encode(GenerationCall(messages=messages))
    assert caught.value.field == "chat.messages[1].content"


def test_decoding_an_unknown_id_names_it(recorder):
    text = TextEngine(recorder, TOKENIZER, None)

    assert text.decode(ids("né"), skip_special_tokens=True) == "né"
    with pytest.raises(InvalidRequestError, match=r"token id 259; this model's ids are 0 to 258"):
        text.decode([259], skip_special_tokens=True)


def test_an_answer_that_was_complete_cannot_be_resumed(recorder):
    with pytest.raises(InvalidRequestError, match="resume ends with token 2, which ends"):
        begin(recorder, resume=[5, END], seed=1)
    with pytest.raises(InvalidRequestError, match="already contains the stop string 'bc'"):
        begin(recorder, resume=ids("abcd"), seed=1, stop=("bc",))
    begin(recorder, resume=[5, END], seed=1, ignore_eos=True)


# -- what comes out --------------------------------------------------------------------------------


def test_events_of_one_take_become_one_delta(recorder):
    stream = begin(recorder)
    outputs = stream.feed([StartedEvent("r", 7, 1), *tokens("abc"), finish(output=3)])

    assert outputs[0] == Started("r", 7, 1, 2)
    assert outputs[1] == Delta(0, 0, ids("abc"), "abc")
    assert isinstance(outputs[2], Finished)
    assert (outputs[2].reason, outputs[2].output_tokens) == (FinishReason.LENGTH, 3)
    assert stream.of.finished


@given(st.text(min_size=1, max_size=30), st.data())
def test_the_text_does_not_depend_on_how_tokens_are_taken(text, data):
    stream = begin(Recorder())
    events = [*tokens(text), finish()]
    outputs: list[Any] = []
    while events:
        count = data.draw(st.integers(1, len(events)))
        outputs += stream.feed(events[:count])
        events = events[count:]

    assert text_of(outputs) == text
    deltas = [output for output in outputs if isinstance(output, Delta)]
    assert [token for delta in deltas for token in delta.token_ids] == ids(text)


@given(
    st.text("ab#é", max_size=20), st.lists(st.text("ab#é", min_size=1, max_size=3), max_size=3),
    st.booleans(), st.data(),
)  # fmt: skip
def test_stop_strings_are_found_wherever_the_cuts_are(text, stops, include, data):
    """The oracle looks at the whole text: the stop string that is complete first, the longest of
    those complete at the same place."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    end, _, stop = min(found, default=(len(text), 0, ""))
    expected = text[:end] if include else text[: end - len(stop)]
    recorder = Recorder()
    stream = begin(recorder, stop=tuple(stops), include_stop=include)
    events = [*tokens(text), finish(output=len(ids(text)))]
    outputs: list[Any] = []
    while events:
        count = data.draw(st.integers(1, len(events)))
        outputs += stream.feed(events[:count])
        events = events[count:]
    deltas = [output for output in outputs if isinstance(output, Delta)]

    assert text_of(outputs) == expected
    assert [token for delta in deltas for token in delta.token_ids] == ids(text[:end])
    last = outputs[-1]
    assert last.output_tokens == len(ids(text[:end]))
    assert last.stop_string == (stop or None)
    assert last.reason is (FinishReason.STOP if stop else FinishReason.LENGTH)


def test_a_stop_string_tells_the_engine_and_silences_the_choice(recorder):
    stream = begin(recorder, stop=("b",), n=2)
    outputs = stream.feed([*tokens("abc"), *tokens("xyz", choice=1)])

    assert recorder.stops == [0]
    assert [output.text for output in outputs if isinstance(output, Delta)] == ["a", "xyz"]
    assert stream.feed(tokens("def", first=3)) == []


def test_a_stop_string_outranks_what_the_engine_met_meanwhile(recorder):
    stream = begin(recorder, stop=("b",))
    stream.feed(tokens("ab"))
    (last,) = stream.feed(
        [finish(FinishReason.CANCELLED, output=7, error=RequestCancelledError("r"))]
    )

    assert isinstance(last, Finished)
    assert (last.reason, last.error, last.output_tokens) == (FinishReason.STOP, None, 2)


def test_what_could_have_become_a_stop_string_is_sent_at_the_end(recorder):
    stream = begin(recorder, stop=("abc",))

    assert text_of(stream.feed(tokens("xab"))) == "x"
    tail, last = stream.feed([finish(output=3)])
    assert (tail.text, tail.token_ids) == ("ab", [])
    assert isinstance(last, Finished)
    assert recorder.stops == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "ab"),
        ({"include_stop": True}, "ab<|im_end|>"),
        ({"stop_token_ids": [7], "ignore_eos": True}, "ab"),
    ],
)
def test_the_end_tokens_text_is_left_out_unless_included(recorder, fields, text):
    end = 7 if "stop_token_ids" in fields else END
    stream = begin(recorder, **fields)
    outputs = stream.feed(
        [*tokens([*ids("ab"), end]), finish(FinishReason.STOP, output=3, stop_token_id=end)]
    )

    assert text_of(outputs) == text
    assert outputs[0].token_ids == [*ids("ab"), end]
    assert outputs[1].stop_token_id == end


def test_special_tokens_have_no_text(recorder):
    stream = begin(recorder, ignore_eos=True)

    assert text_of(stream.feed(tokens([*ids("a"), 1, END, *ids("b")]))) == "ab"


def test_resumed_tokens_are_not_sent_again_and_held_back_text_is(recorder):
    half, rest = ids("é")
    stream = begin(recorder, resume=[*ids("a"), half], seed=1)
    (delta,) = stream.feed(tokens([rest], first=2))

    assert (delta.text, delta.first_index, delta.token_ids) == ("é", 2, [rest])


def test_logprobs_stay_beside_their_tokens(recorder):
    entry = TokenLogprobs(-1.0, 2)
    stream = begin(recorder, logprobs=0, stop=("b",))
    events = [TokenEvent(0, n, token, entry) for n, token in enumerate(ids("abc"))]
    (delta,) = stream.feed(events)

    assert delta.logprobs == [(token, entry) for token in ids("ab")]


def test_echo_goes_to_every_choice_and_logprobs_once(recorder):
    stream = begin(recorder, echo=True, prompt_logprobs=0, n=2)
    scored = (None, TokenLogprobs(-1.0, 1))
    _, first, second = stream.feed([StartedEvent("r", 0, 0, scored)])

    assert (first.text, first.token_ids, first.prompt) == ("hi", ids("hi"), True)
    assert first.logprobs == tuple(zip(ids("hi"), scored, strict=True))
    assert (second.choice, second.text, second.logprobs) == (1, "hi", ())


def test_echo_of_token_ids_is_what_the_model_saw(recorder):
    stream = begin(recorder, text=None, token_ids=[1, *ids("hi")], echo=True)
    _, delta = stream.feed([StartedEvent("r", 0, 0)])

    assert delta.text == "<|im_start|>hi"


def test_echo_of_a_truncated_prompt_is_what_was_kept(recorder):
    stream = begin(recorder, text="abcdef", truncate_prompt_tokens=2, echo=True)
    _, delta = stream.feed([StartedEvent("r", 0, 0)])

    assert (delta.text, list(delta.token_ids)) == ("ef", ids("ef"))


def test_prompt_logprobs_without_echo_send_neither_tokens_nor_text(recorder):
    stream = begin(recorder, prompt_logprobs=0)
    _, delta = stream.feed([StartedEvent("r", 0, 0, (None, TokenLogprobs(-1.0, 1)))])

    assert (delta.text, list(delta.token_ids), len(delta.logprobs)) == ("", [], 2)


def test_long_prompt_logprobs_are_cut_into_messages(recorder):
    prompt = ids("x") * (2 * PROMPT_TOKENS_PER_DELTA + 1)
    stream = begin(recorder, text=None, token_ids=prompt, prompt_logprobs=0, echo=True)
    entries = (None, *[TokenLogprobs(-1.0, 1)] * (len(prompt) - 1))
    _, *deltas = stream.feed([StartedEvent("r", 0, 0, entries)])

    assert [delta.first_index for delta in deltas] == [0, 512, 1024]
    assert [token for delta in deltas for token in delta.token_ids] == prompt
    assert [entry for delta in deltas for _, entry in delta.logprobs] == list(entries)
    assert [bool(delta.text) for delta in deltas] == [True, False, False]


def test_the_engines_error_is_handed_on(recorder):
    error = RequestCancelledError("r")
    stream = begin(recorder)
    (last,) = stream.feed([finish(FinishReason.CANCELLED, error=error)])

    assert isinstance(last, Finished)
    assert last.error is error


def test_closing_tells_the_engine_once_and_not_after_the_end(recorder):
    stream = begin(recorder, request_id="r")
    stream.of.close()
    stream.of.close()
    ended = begin(recorder, request_id="ended")
    ended.of.stream.put(finish(), ends_choice=True)
    ended.of.close()

    assert recorder.closed == ["r"]


def test_without_text_tokens_are_read_for_stop_strings_alone(recorder):
    def stream(sampling: SamplingParams) -> TextStream:
        call = GenerationCall(text="p", sampling=sampling)
        engine = TextEngine(recorder, TOKENIZER, None)
        request, echo = engine.build_request(call)
        return engine.open(request, echo, ThreadWaker(), with_text=False)

    bare = stream(SamplingParams())
    (delta,) = bare.feed(tokens("ab"))
    assert isinstance(delta, Delta)
    assert (list(delta.token_ids), delta.text) == (ids("ab"), "")
    (finished,) = bare.feed([finish(output=2)])
    assert isinstance(finished, Finished)

    stopping = stream(SamplingParams(stop="b"))
    (delta,) = stopping.feed(tokens("abc"))
    assert isinstance(delta, Delta)
    assert list(delta.token_ids) == ids("ab")

    marks = SamplingParams(stop="<|im_end|>", ignore_eos=True, skip_special_tokens=False)
    seen = stream(marks)
    seen.feed(tokens([5, END, 6]))
    assert recorder.stops == [0, 0]
