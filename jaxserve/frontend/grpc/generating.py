"""From a ``GenerationCall`` to the engine and back, for every servicer that generates text.

Protocols differ in their messages; tokenising off the loop, submitting and waiting do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from jaxserve.engine.stream import AsyncWaker
from jaxserve.frontend.generation import (
    Finished,
    GenerationCall,
    Output,
    Reading,
    TextEngine,
    TextStream,
)

INLINE_CHARS = 4096
"""Longer text is tokenised in a thread: about a microsecond a character would hold up all streams.
Chat always is, because a template may run up to its time limit."""

T = TypeVar("T")


class Generator:
    """Opens and reads streams on one event loop; ``executor`` is the caller's to shut down."""

    def __init__(self, text: TextEngine, executor: Executor) -> None:
        """Needs a running event loop, which the engine will wake."""
        self.text = text
        self.waker = AsyncWaker(asyncio.get_running_loop())
        self._executor = executor

    async def open(self, asked: GenerationCall, reading: Reading | None = None) -> TextStream:
        """Admits a request: everything that can be refused is refused here.

        Raises:
            JaxserveError: whatever ``TextEngine.build_request`` and ``Engine.submit`` raise.
        """
        built, echo_text = await self.off_loop(asked, lambda: self.text.build_request(asked))
        return self.text.open(built, echo_text, self.waker, reading=reading)

    async def next(self, stream: TextStream) -> Sequence[Output]:
        """Waits for the engine and returns all that has become ready meanwhile."""
        await self.waker.wait(stream.stream)
        return stream.feed(stream.stream.take())

    async def off_loop(self, asked: GenerationCall, work: Callable[[], T]) -> T:
        """Runs work on a prompt, in a thread when it may take long."""
        is_short = asked.messages is None and len(asked.text or "") <= INLINE_CHARS
        if is_short and asked.grammar is None:
            return work()
        return await self.in_thread(work)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs work that would hold up the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def raise_failure(output: Output) -> None:
    """Raises what a choice failed with; the whole call then ends with it."""
    if type(output) is Finished and output.error is not None:
        raise output.error
