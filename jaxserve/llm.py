"""The notebook's front door: an engine in this process, with the client's types and methods.

    with LLM("smollm2") as llm:
        print(llm.generate("The sky is", max_tokens=16).text)
        for chunk in llm.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

The engine runs on threads of its own, so all of this works inside a running event loop. What a
server adds (a socket, deadlines, several processes) is left to ``Client``.
"""

from __future__ import annotations

import queue
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack, cast, overload

import numpy as np

from jaxserve.assets import default_directory
from jaxserve.config import ServeConfig
from jaxserve.engine.request import Event, FinishedEvent, Request, SamplingParams, StartedEvent
from jaxserve.engine.stats import EngineStats
from jaxserve.engine.stream import TokenStream
from jaxserve.errors import ConfigError, EngineDeadError, InvalidRequestError, QueueFullError
from jaxserve.frontend.client_types import Chunk, GenerateOptions, Generation, Score
from jaxserve.frontend.generation import (
    GenerationCall,
    Output,
    Started,
    TextStream,
)
from jaxserve.frontend.in_process import AnswerBuilder, chunk_from, score_from
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.launch import build
from jaxserve.models.decoder import Model
from jaxserve.progress import Progress, show_to_person
from jaxserve.runner.dense import DenseForward

Messages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | np.ndarray

HEALTH_INTERVAL_S = 1.0
"""How often a waiting call looks whether the engine is still alive."""

_SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))
_CALL_NAMES = {
    "request_id": "request_id",
    "truncate_prompt_tokens": "truncate_prompt_tokens",
    "echo": "echo",
    "resume_token_ids": "resume",
    "priority": "priority",
    "cache_salt": "cache_salt",
}


class LLM:
    """One model in this process. Close it, or use ``with``, to get its memory back."""

    def __init__(
        self,
        model: str = "smollm2",
        *,
        mesh: str = "1x1",
        device: str = "auto",
        dtype: str = "auto",
        progress: bool | None = None,
        **config: Any,
    ) -> None:
        """Loads and compiles; takes seconds to a minute.

        Args:
            model: a path, a hub id, an alias, or ``dummy:NAME``.
            mesh: DATAxTENSOR.
            device: ``auto``, ``cpu``, ``cpu:N`` or ``cuda``.
            dtype: of weights, activations and cache.
            progress: show progress; None does when somebody is watching.
            **config: other fields of ``ServeConfig``.

        Raises:
            LaunchError: the message says what has to change.
        """
        directories = {
            "assets_dir": default_directory({}),
            "cache_dir": Path.home() / ".cache" / "jaxserve",
        }
        asked = ServeConfig(
            model=model, mesh=mesh, device=device, dtype=dtype, **{**directories, **config}
        )
        self._progress = progress
        with show_to_person(progress) as report:
            self._service = build(asked, report)
        self._text = self._service.text
        self._dense: DenseForward | None = DenseForward(Model(self._service.plan.model))
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._text.tokenizer

    @property
    def info(self) -> ModelInfo:
        """The facts of the model."""
        return self._service.info

    def stats(self) -> EngineStats:
        """Returns the engine's counters."""
        return self._service.engine.stats()

    # A str is a sequence of str, too; the first overload wins, as it should.
    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompts: Prompt,
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation]:
        """Returns whole answers; a list of prompts is computed together.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling: how tokens are chosen.
            **options: single parameters, as of ``Client.generate``; they win over ``sampling``.

        Raises:
            JaxserveError: a prompt was refused or failed; the others are given up.
        """
        if _is_prompt(prompts):
            return self._run([self._call(_prompt(prompts), sampling, options)])[0]
        many = cast("Sequence[Prompt]", prompts)
        return self._run([self._call(_prompt(prompt), sampling, options) for prompt in many])

    def chat(
        self,
        messages: Messages | str,
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Returns the model's answer to a conversation, or to one user message."""
        return self._run([self._call(_conversation(messages), sampling, options)])[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        sampling: SamplingParams | None = None,
        *,
        messages: Messages | str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Returns an answer as it is made; closing or dropping it cancels the request.

        Args:
            prompt: a text or token ids; or give ``messages``.
            sampling: how tokens are chosen.
            messages: a conversation, or one user message.
            **options: as for ``generate``.

        Raises:
            JaxserveError: the request was refused.
        """
        if (prompt is None) == (messages is None):
            raise InvalidRequestError("pass exactly one of a prompt and messages", field="prompt")
        given = _prompt(prompt) if prompt is not None else _conversation(messages or ())
        return Stream(self, self._call(given, sampling, options))

    def score(
        self,
        text: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        top_logprobs: int = 0,
    ) -> Score:
        """Returns the log-probability of every token of a text.

        Raises:
            InvalidRequestError: also when the LLM was made with ``prompt_logprobs=False``.
        """
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_logprobs)
        request, _ = self._text.build_request(
            GenerationCall(text=text, token_ids=token_ids, messages=messages, sampling=sampling)
        )
        self._check_open()
        inbox = _Inbox()
        stream = self._service.engine.submit(request, inbox)
        try:
            started = None
            while started is None:
                self._wait(inbox)
                started = _started(stream.take())
        finally:
            stream.close()  # The one token that would come next is of no use.
        return score_from(request.prompt, started, self.tokenizer, self.info.model_digest)

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the float32 logits ``[T, V]`` after every token, from one dense forward pass.

        Computed beside the serving loop, in the weights' dtype; compiles when first asked for a
        length (rounded up to a power of two).

        Raises:
            InvalidRequestError: no tokens, too many, or an id that the model does not have.
            ConfigError: the LLM was made with ``strict_compile``, or has been closed.
        """
        Request(request_id="", prompt=list(token_ids)).validate(
            vocab_size=self.info.vocab_size, context_tokens=self.info.context_tokens + 1
        )
        if self._service.config.strict_compile:
            raise ConfigError(
                "logits compiles a program, which strict_compile forbids; leave it off"
            )
        self._check_open()
        params = self._service.runner.params
        assert params is not None
        assert self._dense is not None
        return self._dense(params, [int(token) for token in token_ids])

    def close(self) -> None:
        """Ends whatever runs and gives the memory back. Safe to call again."""
        self._closed = True
        self._dense = None
        self._service.close()

    def __enter__(self) -> LLM:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def __repr__(self) -> str:
        """One line: what runs, and where."""
        info = self.info
        return f"LLM({info.name!r}, {info.dtype}, {info.platform}, {info.mesh})"

    # -- one request -------------------------------------------------------------------------------

    def _call(
        self,
        prompt: GenerationCall,
        sampling: SamplingParams | None,
        options: GenerateOptions,
    ) -> GenerationCall:
        """Joins a prompt with its parameters; options that are None are left out."""
        given = {name: value for name, value in options.items() if value is not None}
        self.info.check_name(cast("str", given.pop("model", "")))
        unknown = sorted(set(given) - _SAMPLING_NAMES - set(_CALL_NAMES))
        if unknown:
            known = ", ".join(sorted({"model", *_SAMPLING_NAMES, *_CALL_NAMES}))
            raise TypeError(f"unknown option {', '.join(unknown)}; there are {known}")
        chosen: dict[str, Any] = {n: v for n, v in given.items() if n in _SAMPLING_NAMES}
        other: dict[str, Any] = {_CALL_NAMES[n]: v for n, v in given.items() if n in _CALL_NAMES}
        return replace(prompt, sampling=replace(sampling or SamplingParams(), **chosen), **other)

    def _run(self, calls: Sequence[GenerationCall]) -> list[Generation]:
        with show_to_person(self._progress if len(calls) > 1 else False) as report:
            return _Batch(self, calls, report).run()

    def _submit(self, call: GenerationCall, inbox: _Inbox) -> TextStream:
        self._check_open()
        return self._text.submit(call, inbox)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this LLM has been closed; make another")

    def _wait(self, inbox: _Inbox) -> Sequence[TokenStream]:
        """Waits for streams with something to read.

        Raises:
            EngineDeadError: nothing will come any more.
        """
        while True:
            streams = inbox.wait(HEALTH_INTERVAL_S)
            if streams:
                return streams
            health = self._service.engine.health()
            if not health.serving:
                raise EngineDeadError(health.detail)


class Stream(Iterator[Chunk]):
    """One answer as it is made. Close it, leave its ``with`` block or read it to the end."""

    def __init__(self, llm: LLM, call: GenerationCall) -> None:
        """Submits the request."""
        self._llm = llm
        self._inbox = _Inbox()
        self._stream = llm._submit(call, self._inbox)
        self._chunks: deque[Chunk] = deque()
        self._started: Started | None = None
        self._close = weakref.finalize(self, self._stream.close)

    @property
    def request_id(self) -> str | None:
        """The id of the request; None before its first token, as everything here."""
        return self._started.request_id if self._started else None

    @property
    def seed(self) -> int | None:
        """The seed in use; sending it again gives the same answer."""
        return self._started.seed if self._started else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._started.prompt_tokens if self._started else 0

    @property
    def cached_tokens(self) -> int:
        """Those that came from the prefix cache."""
        return self._started.cached_tokens if self._started else 0

    def __iter__(self) -> Stream:
        """Returns itself."""
        return self

    def __next__(self) -> Chunk:
        """Waits for the next chunk.

        Raises:
            JaxserveError: the request failed.
        """
        while not self._chunks:
            if self._stream.finished or not self._close.alive:
                raise StopIteration
            self._llm._wait(self._inbox)
            for output in self._stream.feed(self._stream.stream.take()):
                self._take(output)
        return self._chunks.popleft()

    def close(self) -> None:
        """Gives the request up, if it still runs. Any thread; safe to call again."""
        self._close()

    def __enter__(self) -> Stream:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def _take(self, output: Output) -> None:
        if isinstance(output, Started):
            self._started = output
        else:
            self._chunks.append(chunk_from(output, self._llm.tokenizer))


class _Inbox:
    """A ``Waker`` that keeps what it is told, for the one thread that waits."""

    def __init__(self) -> None:
        self._woken: queue.SimpleQueue[Sequence[TokenStream]] = queue.SimpleQueue()

    def wake(self, streams: Sequence[TokenStream]) -> None:
        self._woken.put(streams)

    def wait(self, timeout_s: float) -> Sequence[TokenStream]:
        """Returns the streams of one step; none when time ran out."""
        try:
            return self._woken.get(timeout=timeout_s)
        except queue.Empty:
            return ()


class _Batch:
    """Requests that are computed together: as many submitted as the queue takes."""

    def __init__(self, llm: LLM, calls: Sequence[GenerationCall], report: Progress) -> None:
        self._llm = llm
        self._report = report
        self._inbox = _Inbox()
        self._waiting = deque(enumerate(calls))
        self._live: dict[TokenStream, tuple[int, TextStream, AnswerBuilder]] = {}
        self._answers: dict[int, Generation] = {}
        self._total = len(calls)

    def run(self) -> list[Generation]:
        """Returns the answers in the order of the calls."""
        try:
            while self._waiting or self._live:
                self._submit()
                for stream in self._llm._wait(self._inbox):
                    if stream in self._live:
                        self._read(stream)
        finally:
            for _, text_stream, _ in self._live.values():
                text_stream.close()
        return [self._answers[number] for number in range(self._total)]

    def _submit(self) -> None:
        while self._waiting:
            number, call = self._waiting[0]
            try:
                stream = self._llm._submit(call, self._inbox)
            except QueueFullError:
                if not self._live:
                    raise  # Others fill the queue; nothing of ours will make room.
                return
            self._waiting.popleft()
            builder = AnswerBuilder(self._llm.tokenizer, self._llm.info.model_digest)
            self._live[stream.stream] = (number, stream, builder)

    def _read(self, stream: TokenStream) -> None:
        number, text_stream, builder = self._live[stream]
        for output in text_stream.feed(stream.take()):
            builder.add(output)
        if text_stream.finished:
            del self._live[stream]
            self._answers[number] = builder.generation()
            self._report("generate", len(self._answers), self._total, "")


def _is_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    items = cast("Sequence[object]", prompts)
    return len(items) > 0 and isinstance(items[0], Integral)


def _prompt(prompt: object) -> GenerationCall:
    if isinstance(prompt, str):
        return GenerationCall(text=prompt)
    return GenerationCall(token_ids=[int(token) for token in cast("Sequence[int]", prompt)])


def _conversation(messages: Messages | str) -> GenerationCall:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return GenerationCall(messages=messages)


def _started(events: Sequence[Event]) -> StartedEvent | None:
    for event in events:
        if isinstance(event, StartedEvent):
            return event
        if isinstance(event, FinishedEvent) and event.error is not None:
            raise event.error
    return None
