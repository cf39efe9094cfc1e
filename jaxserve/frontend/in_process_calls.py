"""Requests of this process, waited for on threads: one stream, many at once, or one score.

What ``grpc/servicer.py`` is to an event loop, this is to a notebook. Answers are built by
``in_process.py``; prompts and their parameters come ready as ``GenerationCall``.
"""

from __future__ import annotations

import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from jaxserve.engine.stream import TokenStream
from jaxserve.errors import EngineDeadError, QueueFullError
from jaxserve.frontend.client_types import Chunk, Generation, Score
from jaxserve.frontend.engine_api import EngineApi
from jaxserve.frontend.generation import GenerationCall, TextEngine
from jaxserve.frontend.in_process import AnswerBuilder, chunk_from, score_from
from jaxserve.frontend.text_stream import (
    Output,
    Started,
    TextStream,
    find_embedding,
    find_started,
)

HEALTH_INTERVAL_S = 1.0
"""How often a waiting call looks whether the engine is still alive."""


class Inbox:
    """A ``Waker`` that keeps what it is told, for the one thread that waits."""

    def __init__(self) -> None:
        """Nothing is there yet."""
        self._woken: queue.SimpleQueue[Sequence[TokenStream]] = queue.SimpleQueue()

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Hands streams over; called by the engine."""
        self._woken.put(streams)

    def wait(self, engine: EngineApi) -> Sequence[TokenStream]:
        """Waits for streams with something to read.

        Raises:
            EngineDeadError: nothing will come any more.
        """
        while True:
            try:
                return self._woken.get(timeout=HEALTH_INTERVAL_S)
            except queue.Empty:
                health = engine.health()
                if not health.serving:
                    raise EngineDeadError(health.detail) from None


class Stream(Iterator[Chunk]):
    """One answer as it is made. Close it, leave its ``with`` block or read it to the end."""

    def __init__(self, text: TextEngine, call: GenerationCall) -> None:
        """Submits the request."""
        self._text = text
        self._inbox = Inbox()
        self._stream = text.submit(call, self._inbox)
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
            self._inbox.wait(self._text.engine)
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
            self._chunks.append(chunk_from(output, self._text.tokenizer))


class Batch:
    """Requests that are computed together: as many submitted as the queue takes."""

    def __init__(
        self,
        text: TextEngine,
        model_digest: str,
        calls: Sequence[GenerationCall],
        report: Callable[[int, int], None],
    ) -> None:
        """Prepares; ``report`` hears how many answers of how many there are."""
        self._text = text
        self._model_digest = model_digest
        self._report = report
        self._inbox = Inbox()
        self._waiting = deque(enumerate(calls))
        self._live: dict[TokenStream, tuple[int, TextStream, AnswerBuilder]] = {}
        self._answers: dict[int, Generation] = {}
        self._total = len(calls)

    def run(self) -> list[Generation]:
        """Returns the answers in the order of the calls."""
        try:
            while self._waiting or self._live:
                self._submit()
                for stream in self._inbox.wait(self._text.engine):
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
                stream = self._text.submit(call, self._inbox)
            except QueueFullError:
                if not self._live:
                    raise  # Others fill the queue; nothing of ours will make room.
                return
            self._waiting.popleft()
            builder = AnswerBuilder(self._text.tokenizer, self._model_digest)
            self._live[stream.stream] = (number, stream, builder)

    def _read(self, stream: TokenStream) -> None:
        number, text_stream, builder = self._live[stream]
        for output in text_stream.feed(stream.take()):
            builder.add(output)
        if text_stream.finished:
            del self._live[stream]
            self._answers[number] = builder.generation()
            self._report(len(self._answers), self._total)


def score(text: TextEngine, model_digest: str, call: GenerationCall) -> Score:
    """Returns the log-probabilities of a prompt that asks for them.

    Raises:
        JaxserveError: the request was refused or failed.
    """
    request, _ = text.build_request(call)
    inbox = Inbox()
    stream = text.engine.submit(request, inbox)
    try:
        started = None
        while started is None:
            inbox.wait(text.engine)
            started = find_started(stream.take())
    finally:
        stream.close()  # The one token that would come next is of no use.
    return score_from(request.prompt, started, text.tokenizer, model_digest)


def embed(text: TextEngine, calls: Sequence[GenerationCall]) -> list[Sequence[float]]:
    """Returns what prompts mean that ask for it, computed together.

    Raises:
        JaxserveError: one was refused or failed; the others are given up.
    """
    inbox, vectors = Inbox(), dict[int, Sequence[float]]()
    waiting = deque(enumerate(calls))
    live: dict[TokenStream, int] = {}
    try:
        while waiting or live:
            while waiting:
                request, _ = text.build_request(waiting[0][1])
                try:
                    stream = text.engine.submit(request, inbox)
                except QueueFullError:
                    if not live:
                        raise  # Others fill the queue; nothing of ours will make room.
                    break
                live[stream] = waiting.popleft()[0]
            for stream in inbox.wait(text.engine):
                if stream in live and (found := find_embedding(stream.take())) is not None:
                    vectors[live.pop(stream)] = found.vector
                    stream.close()
    finally:
        for stream in live:
            stream.close()
    return [vectors[number] for number in range(len(calls))]
