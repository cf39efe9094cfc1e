"""How a door on an event loop asks the text engine: off the loop to begin, woken to go on.

A ``Door`` is shared by all protocols of one server. It knows no protocol; what it gives are the
outputs of ``text_stream.py``, one list for each time that the engine has something to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, aclosing, closing
from typing import TypeVar

from jaxserve.engine.request import Request
from jaxserve.engine.stream import AsyncWaker
from jaxserve.frontend.calls import OpenCalls
from jaxserve.frontend.generation import GenerationCall, TextEngine
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.grammar_compiler import CompiledGrammar
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.text_stream import Finished, Output, TextStream, find_embedding

INLINE_CHARS = 4096
"""Longer text is tokenised in a thread: about a microsecond a character would hold up all streams.
Chats always go there, because a template may take its whole time."""

T = TypeVar("T")


class Door:
    """One text engine, seen from one event loop. ``executor`` is the caller's to shut down."""

    def __init__(
        self, text: TextEngine, info: ModelInfo, calls: OpenCalls, executor: Executor
    ) -> None:
        """Needs a running event loop, which the engine will wake."""
        self.text = text
        self.info = info
        self.calls = calls
        self._executor = executor
        self.waker = AsyncWaker(asyncio.get_running_loop())

    async def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compiles what an answer has to be: see ``GrammarCompiler.compile_async``.

        Raises:
            JaxserveError: it cannot be used.
        """
        return await self.text.compiler_of(grammar).compile_async(grammar)

    async def build(self, call: GenerationCall) -> tuple[Request, str | None]:
        """Compiles, renders and tokenises: see ``TextEngine.build_request``.

        Whoever waits for a grammar holds up nobody else: grammars have threads of their own.

        Raises:
            JaxserveError: the request cannot be used.
        """
        compiled = call.grammar and await self.compile(call.grammar)
        return await self.off_loop(call, lambda: self.text.build_request(call, compiled))

    def open(self, built: tuple[Request, str | None], *, with_text: bool = True) -> TextStream:
        """Submits what ``build`` returned; see ``TextEngine.open``."""
        request, echo_text = built
        return self.text.open(request, echo_text, self.waker, with_text=with_text)

    async def ask(self, call: GenerationCall, *, with_text: bool = True) -> TextStream:
        """Builds and opens: everything that can be refused is refused here.

        Raises:
            JaxserveError: whatever ``TextEngine.build_request`` and ``Engine.submit`` raise.
        """
        return self.open(await self.build(call), with_text=with_text)

    async def next(self, stream: TextStream) -> Sequence[Output]:
        """Waits for the engine and returns all that has become ready meanwhile."""
        await self.waker.wait(stream.stream)
        return stream.feed(stream.stream.take())

    async def outputs(self, streams: Sequence[TextStream]) -> AsyncGenerator[tuple[int, Output]]:
        """Yields (place of the stream, output) of several requests until all have finished.

        Ends all of them when a choice of one fails, or when it is closed itself.

        Raises:
            JaxserveError: what a choice failed with, behind all that came before.
        """
        try:
            if len(streams) == 1:
                stream = streams[0]
                while not stream.finished:
                    for output in await self.next(stream):
                        yield 0, sound(output)
                return
            async with aclosing(self._merged(streams)) as merged:
                async for item in merged:
                    yield item
        finally:
            for stream in streams:
                stream.close()

    async def _merged(self, streams: Sequence[TextStream]) -> AsyncGenerator[tuple[int, Output]]:
        ready: asyncio.Queue[tuple[int, Sequence[Output] | BaseException]] = asyncio.Queue()

        async def read(place: int, stream: TextStream) -> None:
            try:
                while not stream.finished:
                    ready.put_nowait((place, await self.next(stream)))
            except Exception as error:  # Raised again where the streams are one.
                ready.put_nowait((place, error))

        tasks = [asyncio.create_task(read(*item)) for item in enumerate(streams)]
        try:
            while not (all(stream.finished for stream in streams) and ready.empty()):
                place, outputs = await ready.get()
                if isinstance(outputs, BaseException):
                    raise outputs
                for output in outputs:
                    yield place, sound(output)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def embed(self, built: Sequence[tuple[Request, str | None]]) -> list[Sequence[float]]:
        """Returns what prompts mean, which ``build`` has made of calls with ``embed``.

        Raises:
            JaxserveError: one was refused, or failed; the others are given up.
        """
        with ExitStack() as open_streams:
            streams = [
                open_streams.enter_context(closing(self.text.engine.submit(request, self.waker)))
                for request, _ in built
            ]
            vectors: list[Sequence[float]] = []
            for stream in streams:
                found = None
                while found is None:
                    await self.waker.wait(stream)
                    found = find_embedding(stream.take())
                vectors.append(found.vector)
        return vectors

    async def encode(self, call: GenerationCall, *, add_special_tokens: bool) -> Sequence[int]:
        """Returns the tokens of a prompt.

        Raises:
            InvalidRequestError: see ``TextEngine.encode``.
        """
        return await self.off_loop(
            call, lambda: self.text.encode(call, add_special_tokens=add_special_tokens)[0]
        )

    async def off_loop(self, call: GenerationCall, work: Callable[[], T]) -> T:
        """Runs work on a call, in a thread when it may take long."""
        is_short = call.messages is None and len(call.text or "") <= INLINE_CHARS
        if is_short:
            return work()
        return await self.in_thread(work)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs work that would hold up the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def sound(output: Output) -> Output:
    """Raises what a choice failed with; the whole request then ends with it."""
    if type(output) is Finished and output.error is not None:
        raise output.error
    return output
