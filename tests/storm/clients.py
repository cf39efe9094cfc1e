"""The clients of the storm: one coroutine a request, over several connections, at most so many."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.client_errors import read_failure
from jaxserve.frontend.client_stubs import CHANNEL_OPTIONS, Stubs
from jaxserve.v1 import generation_pb2 as pb
from jaxserve.v1 import model_pb2
from tests.storm.answers import Transcript
from tests.storm.asks import EXPECTED, LEFT, OK, OVERLOAD, Ask, Behaviour

CONNECTIONS = 4
PATIENCE_S = 300.0
"""For anything that must come; far above what a loaded machine needs."""
PAUSE_S = 2.0
"""A client that waits for the progress of others goes on after this, should there be none."""
BACK_OFF_ENDINGS = 24
"""What a refused client waits for, so that a few are refused and not most."""
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
"""For the deaf: windows that do not grow."""


@dataclass
class Outcome:
    """How one request ended."""

    ask: Ask
    ending: str
    """OK, LEFT, or the reason of a jaxserve error."""
    transcript: Transcript


class Progress:
    """Lets clients wait for others to end, so that the storm has a rhythm without a clock."""

    def __init__(self) -> None:
        self._ended = 0
        self._changed = asyncio.Condition()

    async def tick(self) -> None:
        """One request that was taken in has ended."""
        async with self._changed:
            self._ended += 1
            self._changed.notify_all()

    async def wait(self, endings: int) -> None:
        """Waits until so many more have ended, or nothing happens any more."""
        goal = self._ended + endings
        try:
            async with asyncio.timeout(PAUSE_S), self._changed:
                await self._changed.wait_for(lambda: self._ended >= goal)
        except TimeoutError:
            return


class Clients:
    """Sends asks and records exactly one outcome for each."""

    def __init__(
        self, address: str, *, ends: Iterable[int], is_given_up: Callable[[str], bool]
    ) -> None:
        """Opens the connections lazily.

        Args:
            address: of the server.
            ends: the model's end tokens.
            is_given_up: whether the server has closed the stream of a request id.
        """
        self._address = address
        self._is_given_up = is_given_up
        self._ends = frozenset(ends)
        # Channels with equal options would share one connection.
        pools = [("grpc.use_local_subchannel_pool", 1)]
        options = [[*CHANNEL_OPTIONS, *pools] for _ in range(CONNECTIONS)]
        options.append([*CHANNEL_OPTIONS, *pools, *NARROW])
        self._channels = [grpc.aio.insecure_channel(address, options=each) for each in options]
        self._stubs = [Stubs(channel) for channel in self._channels]
        self.progress = Progress()
        self.outcomes: dict[int, Outcome] = {}
        self.side_endings: Counter[str] = Counter()
        """Of the second calls: aborts, and request ids sent twice."""

    async def storm(self, asks: Iterable[Ask], *, concurrent: int) -> None:
        """Sends everything, at most ``concurrent`` at a time."""
        waiting = iter(asks)

        async def worker() -> None:
            for ask in waiting:
                outcome = await self.ask(ask)
                assert ask.number not in self.outcomes
                self.outcomes[ask.number] = outcome
                if outcome.ending == OVERLOAD:
                    await self.progress.wait(BACK_OFF_ENDINGS)
                else:
                    await self.progress.tick()

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrent):
                group.create_task(worker())

    async def ask(self, ask: Ask) -> Outcome:
        """Asks once and behaves as the ask says; checks the ending."""
        transcript = Transcript(ask.request, ends=self._ends)
        try:
            async with asyncio.timeout(PATIENCE_S):
                ending = await self._ending(ask, transcript)
        except AssertionError as error:
            raise AssertionError(f"{ask.behaviour} {ask.request}: {error}") from error
        expected = EXPECTED[ask.behaviour]
        assert ending in expected, f"{ask.behaviour} ended {ending}, not {expected}: {ask.request}"
        return Outcome(ask, ending, transcript)

    async def stats(self) -> Any:
        """Returns the engine's counters."""
        return await self._stubs[0].model.GetStats(model_pb2.GetStatsRequest())

    async def close(self) -> None:
        """Closes every connection."""
        for channel in self._channels:
            await channel.close()

    async def _ending(self, ask: Ask, transcript: Transcript) -> str:
        deaf = ask.behaviour is Behaviour.DEAF
        generation = self._stubs[-1 if deaf else ask.number % CONNECTIONS].generation
        try:
            if ask.behaviour is Behaviour.UNARY:
                whole = pb.GenerateUnaryRequest(request=ask.request)
                transcript.add_unary(await generation.GenerateUnary(whole))
            else:
                call = generation.Generate(ask.request, timeout=ask.timeout_s)
                if await self._read(ask, call, transcript):
                    return LEFT
        except grpc.aio.AioRpcError as error:
            return self._refusal(ask, error)
        transcript.end()
        return OK

    async def _read(self, ask: Ask, call: Any, transcript: Transcript) -> bool:
        """Reads a stream as the ask says; returns whether the client has left."""
        if ask.behaviour is Behaviour.LEAVE_AT_ONCE:
            return await _leave(call)
        if ask.behaviour is Behaviour.LEAVE_QUEUED:
            await self.progress.wait(ask.messages)
            return await _leave(call)
        while (message := await call.read()) is not grpc.aio.EOF:
            transcript.add(message)
            if transcript.messages != ask.messages:
                continue
            match ask.behaviour:
                case Behaviour.LEAVE_MIDWAY:
                    return await _leave(call)
                case Behaviour.PAUSE:
                    await self.progress.wait(5)
                case Behaviour.ABORTED:
                    await self._abort(ask)
                case Behaviour.TWICE:
                    await self._ask_again(ask)
                case Behaviour.DEAF:
                    # The status of a call cannot overtake messages that nobody reads.
                    while not self._is_given_up(ask.request.request_id):
                        await self.progress.wait(1)
        return False

    async def _abort(self, ask: Ask) -> None:
        request = pb.AbortRequest(request_id=ask.request.request_id)
        try:
            await self._stubs[(ask.number + 1) % CONNECTIONS].generation.Abort(request)
        except grpc.aio.AioRpcError as error:
            ending = _reason(error, self._address)
            assert ending == "REQUEST_NOT_FOUND", ending
            self.side_endings["abort came too late"] += 1
        else:
            self.side_endings["aborted"] += 1

    async def _ask_again(self, ask: Ask) -> None:
        again = Transcript(ask.request, ends=self._ends)
        call = self._stubs[(ask.number + 1) % CONNECTIONS].generation.Generate(ask.request)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                again.add(message)
        except grpc.aio.AioRpcError as error:
            ending = _reason(error, self._address)
            assert ending in ("DUPLICATE_REQUEST_ID", OVERLOAD), ending
            self.side_endings[ending] += 1
        else:
            again.end()
            self.side_endings["second came too late"] += 1

    def _refusal(self, ask: Ask, error: grpc.aio.AioRpcError) -> str:
        failure = read_failure(error, self._address).error
        if ask.behaviour is Behaviour.REFUSED and ask.field:
            assert isinstance(failure, InvalidRequestError), failure
            assert failure.field == ask.field, f"{failure.field}: {failure}"
        return failure.reason


async def _leave(call: Any) -> bool:
    """Cancels, and sees that the call is over."""
    call.cancel()
    code = await call.code()
    # The server may have been faster, with an answer or with its refusal of one too many.
    harmless = (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert code in harmless, f"left, and the call ended {code}: {await call.details()}"
    return True


def _reason(error: grpc.aio.AioRpcError, address: str) -> str:
    return read_failure(error, address).error.reason
