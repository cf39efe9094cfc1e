"""Sends requests to an engine of this process and takes the answers, on the calling thread.

Requests go in where a notebook's do (``TextEngine``), so detokenising is counted.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Sequence

from bench.common import Answer
from bench.workloads import Ask
from jaxserve.engine.request import SamplingParams
from jaxserve.engine.stream import TokenStream
from jaxserve.frontend.generation import GenerationCall, TextEngine
from jaxserve.frontend.text_stream import Delta, Finished, Output, TextStream

POLL_S = 1.0


class Asking:
    """One run of requests."""

    def __init__(
        self,
        text: TextEngine,
        asks: Sequence[Ask],
        salt: str,
        *,
        arrivals_s: Sequence[float],
        clients: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            text: where to ask.
            asks: the requests, in the order in which they are sent.
            salt: of the prefix cache.
            arrivals_s: when each may be sent, in seconds from now, ascending.
            clients: requests that may be under way at once; None for all.
            seconds: how long to ask. What is not answered by then is given up, and the rest is
                never sent. None waits for every answer.
        """
        self._text = text
        self._salt = salt
        self._most = clients or len(asks)
        self._waiting = deque(enumerate(zip(asks, arrivals_s, strict=True)))
        self._live: dict[TokenStream, tuple[TextStream, Answer]] = {}
        self._answers: dict[int, Answer] = {}
        self._woken: queue.SimpleQueue[Sequence[TokenStream]] = queue.SimpleQueue()
        self._start_s = time.perf_counter()
        self._end_s = None if seconds is None else self._start_s + seconds
        self.delivered: list[tuple[float, int]] = []
        """When messages came, on the clock of ``time.perf_counter``, and the tokens of each."""

    def run(self) -> list[Answer]:
        """Returns the answers in the order of the requests; one given up has no ``end_s``."""
        while self._waiting or self._live:
            wait_s = self._send()
            if self._end_s is not None:
                wait_s = min(wait_s, self._end_s - time.perf_counter())
                if wait_s <= 0:
                    self._give_up()
                    break
            try:
                streams = self._woken.get(timeout=wait_s)
            except queue.Empty:
                if self._text.engine.health().serving:
                    continue
                raise RuntimeError(self._text.engine.health().detail) from None
            for stream in streams:
                self._read(stream)
        return [self._answers[number] for number in sorted(self._answers)]

    def wake(self, streams: Sequence[TokenStream]) -> None:
        """Called by the engine, after a step."""
        self._woken.put(streams)

    def _send(self) -> float:
        """Sends what is due; returns the seconds until the next is."""
        while self._waiting and len(self._live) < self._most:
            number, (ask, arrival_s) = self._waiting[0]
            now = time.perf_counter()
            if (early_s := self._start_s + arrival_s - now) > 0:
                return early_s
            self._waiting.popleft()
            call = GenerationCall(
                token_ids=ask.prompt,
                sampling=SamplingParams(
                    max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=True
                ),
                cache_salt=self._salt,
            )
            answer = self._answers[number] = Answer(now)
            stream = self._text.submit(call, self)
            self._live[stream.stream] = (stream, answer)
        return POLL_S

    def _give_up(self) -> None:
        """Leaves the engine to the next run, without any row of this one."""
        for stream in self._live:
            stream.close()
        self._live.clear()
        while not self._text.engine.idle:
            time.sleep(0.01)

    def _read(self, stream: TokenStream) -> None:
        if stream not in self._live:
            return
        text_stream, answer = self._live[stream]
        for output in text_stream.feed(stream.take()):
            self._note(output, answer)
        if text_stream.finished:
            answer.end_s = time.perf_counter()
            del self._live[stream]

    def _note(self, output: Output, answer: Answer) -> None:
        if isinstance(output, Delta) and output.token_ids:
            now, count = time.perf_counter(), len(output.token_ids)
            answer.tokens += count
            answer.arrivals_s.append(now)
            self.delivered.append((now, count))
        elif isinstance(output, Finished) and output.error is not None:
            raise output.error
