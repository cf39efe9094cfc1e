from __future__ import annotations

import asyncio
import threading

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.request import FinishedEvent, FinishReason, Timing, TokenEvent
from jaxserve.engine.stream import AsyncWaker, ThreadWaker, TokenStream, Waker
from tests.engine.driving import Recorder


def make(waker: Waker | None = None, *, choices: int = 1) -> tuple[TokenStream, list[object]]:
    calls: list[object] = []
    stream = TokenStream(
        "r1",
        choices,
        waker or Recorder(),
        on_close=lambda name: calls.append(("close", name)),
        on_stop=lambda name, choice: calls.append(("stop", name, choice)),
    )
    return stream, calls


def token(index: int) -> TokenEvent:
    return TokenEvent(0, index, 100 + index)


def finish(choice: int = 0) -> FinishedEvent:
    return FinishedEvent(choice, FinishReason.LENGTH, 1, 1, 0, Timing(0.0, 0.0, 0.0))


def test_events_are_taken_in_order_and_once() -> None:
    stream, _ = make()
    for index in range(3):
        stream.put(token(index), ends_choice=False)

    assert stream.pending == 3
    assert stream.take() == [token(0), token(1), token(2)]
    assert (stream.take(), stream.pending) == ([], 0)


def test_only_the_event_that_ends_the_emptiness_asks_for_a_wake_up() -> None:
    stream, _ = make()

    assert [stream.put(token(index), ends_choice=False) for index in range(3)] == [
        True,
        False,
        False,
    ]
    stream.take()
    assert stream.put(token(3), ends_choice=False)


def test_a_stream_is_finished_with_its_last_choice_read_or_not() -> None:
    stream, _ = make(choices=2)
    stream.put(finish(0), ends_choice=True)
    assert not stream.finished

    stream.put(finish(1), ends_choice=True)

    assert stream.finished
    assert stream.pending == 2


def test_closing_asks_once_and_not_after_the_end() -> None:
    stream, calls = make()
    stream.close()
    stream.close()
    assert calls == [("close", "r1")]

    ended, calls = make()
    ended.put(finish(), ends_choice=True)
    ended.close()
    assert calls == []


def test_stopping_names_the_choice() -> None:
    stream, calls = make(choices=3)
    stream.stop(2)

    assert calls == [("stop", "r1", 2)]


@given(st.lists(st.booleans(), max_size=40))
def test_whoever_waits_after_an_empty_take_is_always_woken(puts: list[bool]) -> None:
    """The reader sleeps after it has emptied the stream; a put that finds it so must wake it."""
    stream, _ = make()
    awake, put, read = False, 0, 0
    for is_put in puts:
        if is_put:
            awake |= stream.put(token(put), ends_choice=False)
            put += 1
        elif awake:
            read += len(stream.take())
            awake = False
        assert awake or read == put, "events wait and nobody will come for them"


def test_a_thread_that_waits_misses_nothing() -> None:
    """A writer and a reader race; one lost wake-up would leave the reader waiting."""
    waker = ThreadWaker()
    stream, _ = make(waker)
    total = 20_000
    got: list[int] = []

    def read() -> None:
        while len(got) < total and waker.wait(timeout_s=10.0):
            got.extend(event.index for event in stream.take() if isinstance(event, TokenEvent))

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(total):
        if stream.put(token(index), ends_choice=False):
            waker.wake([stream])
    reader.join()

    assert got == list(range(total))


def test_a_thread_is_woken_once_for_each_wake_since_it_last_waited() -> None:
    waker = ThreadWaker()
    stream, _ = make(waker)
    waker.wake([stream])
    waker.wake([stream])

    assert waker.wait(timeout_s=0.0)
    assert not waker.wait(timeout_s=0.0)


def test_coroutines_wait_each_for_its_own_stream() -> None:
    async def main() -> list[list[int]]:
        waker = AsyncWaker(asyncio.get_running_loop())
        streams = [make(waker, choices=1)[0] for _ in range(20)]
        each = 200

        async def read(stream: TokenStream) -> list[int]:
            got: list[int] = []
            while len(got) < each:
                await waker.wait(stream)
                got.extend(event.index for event in stream.take() if isinstance(event, TokenEvent))
            return got

        def write() -> None:
            for index in range(each):
                waker.wake([s for s in streams if s.put(token(index), ends_choice=False)])

        writer = threading.Thread(target=write)
        readers = [asyncio.ensure_future(read(stream)) for stream in streams]
        writer.start()
        found = await asyncio.wait_for(asyncio.gather(*readers), timeout=30.0)
        writer.join()
        return found

    assert asyncio.run(main()) == [list(range(200))] * 20


def test_waiting_for_a_stream_that_has_events_returns_at_once() -> None:
    async def main() -> None:
        waker = AsyncWaker(asyncio.get_running_loop())
        stream, _ = make(waker)
        stream.put(token(0), ends_choice=False)
        await waker.wait(stream)

    asyncio.run(main())


def test_a_wake_up_between_the_check_and_the_registration_is_not_lost() -> None:
    async def main() -> None:
        waker = AsyncWaker(asyncio.get_running_loop())
        stream, _ = make(waker)
        create = waker._loop.create_future

        def create_late() -> asyncio.Future[None]:
            stream.put(token(0), ends_choice=False)  # Its wake-up finds nobody registered.
            waker._release([stream])
            return create()

        waker._loop.create_future = create_late  # type: ignore[method-assign]
        await asyncio.wait_for(waker.wait(stream), timeout=10.0)
        assert not waker._waiting

    asyncio.run(main())


def test_a_cancelled_coroutine_leaves_nothing_behind() -> None:
    async def main() -> None:
        waker = AsyncWaker(asyncio.get_running_loop())
        stream, _ = make(waker)
        waiting = asyncio.ensure_future(waker.wait(stream))
        await asyncio.sleep(0)
        assert list(waker._waiting) == [stream]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not waker._waiting
        waker._release([stream])

    asyncio.run(main())


def test_a_closed_loop_is_not_an_error_for_the_engine() -> None:
    loop = asyncio.new_event_loop()
    waker = AsyncWaker(loop)
    stream, _ = make(waker)
    loop.close()

    waker.wake([stream])
