"""Steps on several hosts, with counting runners: their sums tell when a host computed otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.constraint import mask_words
from jaxserve.engine.engine import Engine, FatalStepError
from jaxserve.engine.publish import StepHandle
from jaxserve.engine.request import FinishedEvent, Request, SamplingParams
from jaxserve.engine.step import MaskUpdate, StepInputs
from jaxserve.engine.stream import ThreadWaker
from jaxserve.errors import EngineDeadError, GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner.followers import LeaderRunner, LineMirror, follow_steps
from jaxserve.runner.group import Group
from jaxserve.testing import CountingRunner, EngineSizes, expected_tokens
from tests.agreement.ways import events_of, tokens_of
from tests.runner.gathering import PATIENCE_S, cut

SIZES: dict[str, Any] = {"max_rows": 4, "data_shards": 2}


@dataclass
class Hosts:
    """An engine on host 0, and what became of the others."""

    engine: Engine
    groups: list[Group]
    runners: list[CountingRunner]
    followed: list[Future[None]]


@pytest.fixture
def start(groups: list[Group]) -> Iterator[Callable[[], Hosts]]:
    sizes = EngineSizes(**SIZES)
    runners = [
        CountingRunner(sizes.shape, num_pages=sizes.num_pages, page_tokens=sizes.page_tokens)
        for _ in groups
    ]
    pool = ThreadPoolExecutor(len(groups))
    started: list[Hosts] = []

    def run() -> Hosts:
        followed = [
            pool.submit(
                follow_steps,
                runner,
                group,
                sizes.shape,
                on_ready=partial(group.ready, "digest"),
            )
            for runner, group in zip(runners[1:], groups[1:], strict=True)
        ]
        groups[0].ready("digest")
        steps = LeaderRunner(runners[0], groups[0], sizes.shape)
        engine = sizes.engine(steps, time.monotonic, {"watchdog_s": 60.0})
        steps.watch_group(engine.fail)
        engine.start()
        started.append(Hosts(engine, groups, runners, followed))
        return started[0]

    yield run
    for hosts in started:
        hosts.engine.stop()
    groups[0].close()
    for hosts in started:
        wait(hosts.followed, PATIENCE_S)
    pool.shutdown()


def batch(count: int = 12) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(
            request_id=f"r{number}",
            prompt=rng.integers(0, 250, int(rng.integers(1, 30))).tolist(),
            sampling=SamplingParams(
                max_tokens=9, temperature=0.0, presence_penalty=0.5 if number % 3 == 0 else 0.0
            ),
        )
        for number in range(count)
    ]


def test_every_host_executes_the_steps_of_host_0(start: Callable[[], Hosts]) -> None:
    hosts = start()
    requests = batch()
    answers = [tokens_of(events) for events in events_of(hosts.engine, requests)]

    assert answers == [
        expected_tokens(
            request.prompt, 9, vocab_size=259, penalised=bool(request.sampling.presence_penalty)
        )
        for request in requests
    ]
    hosts.engine.stop()
    hosts.groups[0].close()
    for future in hosts.followed:
        assert future.result(PATIENCE_S) is None, "an orderly end is no failure"
    first, *others = hosts.runners
    for other in others:
        assert other.steps == first.steps > 0
        assert other._pool == first._pool
        assert other._last_token == first._last_token


def test_a_step_travels_unchanged_and_mostly_as_what_is_new(start: Callable[[], Hosts]) -> None:
    hosts = start()
    seen: list[StepInputs] = []
    hosts.runners[0].on_dispatch = seen.append
    events_of(hosts.engine, batch())

    shape = EngineSizes(**SIZES).shape
    there, back = LineMirror(shape), LineMirror(shape)
    sizes = []
    for number, inputs in enumerate(seen, 1):
        plan = pb.StepPlan.FromString(there.encode(inputs, number).SerializeToString())
        assert plan.sequence == number
        sizes.append((plan.ByteSize(), sum(call.buffer.nbytes for call in inputs.calls)))
        found = back.decode(plan)
        for call, same in zip(inputs.calls, found.calls, strict=True):
            assert (call.kind, call.bucket) == (same.kind, same.bucket)
            np.testing.assert_array_equal(call.buffer, same.buffer)
        for setup, same in zip(inputs.setups, found.setups, strict=True):
            assert setup.row == same.row
            np.testing.assert_array_equal(setup.counts, same.counts)
            np.testing.assert_array_equal(setup.bias, same.bias)
    decode = [sent for inputs, sent in zip(seen, sizes, strict=True) if not inputs.setups]
    assert sum(sent for sent, _ in decode) < 0.5 * sum(whole for _, whole in decode)


def test_masks_travel_with_their_rows() -> None:
    shape = EngineSizes(**SIZES).shape
    words = np.random.default_rng(5).integers(-(2**31), 2**31, (2, mask_words(shape.vocab_size)))
    masks = MaskUpdate([3, 0], words.astype(np.int32))
    there, back = LineMirror(shape), LineMirror(shape)
    for sent in (masks, None):
        plan = there.encode(StepInputs([], [], 0, 0, sent), 1).SerializeToString()
        found = back.decode(pb.StepPlan.FromString(plan)).masks
        if sent is None:
            assert found is None
        else:
            assert found is not None
            assert found.rows == sent.rows
            np.testing.assert_array_equal(found.words, sent.words)


def test_a_plan_whose_sizes_do_not_fit_is_refused() -> None:
    mirror = LineMirror(EngineSizes(**SIZES).shape)
    with pytest.raises(ValueError, match="cannot reshape"):
        mirror.decode(pb.StepPlan(calls=[pb.ProgramCall(kind="decode", rows=4, heads=b"1234")]))


# -- failures --------------------------------------------------------------------------------------


def ending(hosts: Hosts, break_it: Callable[[], None]) -> str:
    """Breaks something while a request runs; returns what its client hears."""
    stream = hosts.engine.submit(
        Request(request_id="long", prompt=[1, 2], sampling=SamplingParams(max_tokens=60)),
        waker := ThreadWaker(),
    )
    assert waker.wait(PATIENCE_S)
    break_it()
    events = stream.take()
    while not stream.finished or stream.pending:
        assert waker.wait(PATIENCE_S), "nobody told the client"
        events += stream.take()
    assert isinstance(events[-1], FinishedEvent)
    assert isinstance(events[-1].error, EngineDeadError)
    assert not hosts.engine.health().serving
    return str(events[-1].error)


def slow(hosts: Hosts) -> None:
    """Makes steps so slow that a request is still running when something breaks."""

    def pause() -> None:
        threading.Event().wait(0.05)

    for runner in hosts.runners:
        runner.on_wait = pause


def test_a_host_that_dies_ends_every_stream_with_its_name(start: Callable[[], Hosts]) -> None:
    hosts = start()
    slow(hosts)
    message = ending(hosts, lambda: cut(hosts.groups[1]))

    assert "host 1 (here) was lost: the connection was closed" in message


def test_a_host_that_fails_says_why_before_it_ends(start: Callable[[], Hosts]) -> None:
    hosts = start()
    slow(hosts)
    message = ending(hosts, lambda: hosts.groups[2].close("step 7 failed on host 2: no memory"))

    assert "step 7 failed on host 2: no memory" in message
    with pytest.raises(GroupError):
        hosts.followed[1].result(PATIENCE_S)


def test_a_host_that_samples_other_tokens_is_named(start: Callable[[], Hosts]) -> None:
    hosts = start()
    slow(hosts)

    def corrupt() -> None:
        hosts.runners[1]._pool[:] = [[5] * 4 for _ in hosts.runners[1]._pool]

    assert "host 1 (here) sampled other tokens than host 0 in step" in ending(hosts, corrupt)


def test_a_step_that_raises_on_host_0_ends_the_group(start: Callable[[], Hosts]) -> None:
    hosts = start()
    slow(hosts)

    def broken(inputs: StepInputs) -> None:
        raise MemoryError("no pages left on the device")

    def break_it() -> None:
        hosts.runners[0].on_dispatch = broken

    assert "a step failed on host 0: no pages left on the device" in ending(hosts, break_it)
    assert hosts.runners[0].resets == 0, "a group is not mended in place"


def test_a_step_that_raises_on_a_follower_ends_it_with_the_reason(
    start: Callable[[], Hosts],
) -> None:
    hosts = start()

    def broken(inputs: StepInputs) -> None:
        raise MemoryError("too much")

    hosts.runners[1].on_dispatch = broken
    hosts.engine.submit(Request(request_id="r", prompt=[1]), ThreadWaker())
    with pytest.raises(GroupError, match="step 1 failed on host 1: too much"):
        hosts.followed[0].result(PATIENCE_S)


def test_a_gap_in_the_steps_is_noticed(start: Callable[[], Hosts]) -> None:
    hosts = start()
    hosts.groups[0].broadcast(pb.Envelope(step_plan=pb.StepPlan(sequence=3)))
    for future in hosts.followed:
        with pytest.raises(GroupError, match="step 3 came from host 0 where 1 was due"):
            future.result(PATIENCE_S)


def test_a_report_of_a_step_that_was_not_due_ends_the_group(start: Callable[[], Hosts]) -> None:
    hosts = start()
    slow(hosts)
    done = pb.Envelope(step_done=pb.StepDone(sequence=99, digest=b"x"))
    message = ending(hosts, lambda: hosts.groups[1].others[0].link.send(done))

    assert "host 1 (here) was lost: it reports step 99 where" in message


def test_a_host_that_is_far_behind_ends_the_group(start: Callable[[], Hosts]) -> None:
    """Its digests could not be compared any more."""
    hosts = start()
    slow(hosts)
    steps = hosts.engine._runner
    assert isinstance(steps, LeaderRunner)

    def forget() -> None:
        with steps._lock:
            steps._digests.clear()
            steps._digests[10**6] = b""

    assert "was lost: it is more than 64 steps behind host 0" in ending(hosts, forget)


def test_only_host_0_may_send_steps(start: Callable[[], Hosts]) -> None:
    hosts = start()
    slow(hosts)
    plan = pb.Envelope(step_plan=pb.StepPlan(sequence=1))
    message = ending(hosts, lambda: hosts.groups[1].others[0].link.send(plan))

    assert "it sends steps, which only host 0 may" in message


def test_a_runner_of_a_group_does_not_start_anew(groups: list[Group]) -> None:
    sizes = EngineSizes(**SIZES)
    runner = CountingRunner(sizes.shape, num_pages=sizes.num_pages, page_tokens=4)
    with pytest.raises(FatalStepError, match="the group ends"):
        LeaderRunner(runner, groups[0], sizes.shape).reset()


class ToldMeanwhile(Future[None]):
    """Looks open to whoever asks, and is not."""

    def done(self) -> bool:
        return False


def test_a_loss_that_is_told_twice_at_once_fails_nobody(groups: list[Group]) -> None:
    failures: list[Exception] = []
    leader = LeaderRunner(
        CountingRunner(EngineSizes(**SIZES).shape, num_pages=8, page_tokens=4),
        groups[0],
        EngineSizes(**SIZES).shape,
    )
    leader._lost = ToldMeanwhile()
    leader._lost.set_exception(FatalStepError("host 1 was lost"))
    leader.watch_group(failures.append)
    groups[0].fail(GroupError("host 2 was lost"))
    assert [str(error) for error in failures] == ["host 2 was lost"]


def test_a_handle_that_never_comes_is_left_when_a_host_is_lost(groups: list[Group]) -> None:
    """A collective with a dead member may stand still for ever: nobody waits for it then."""

    class Stuck:
        compiles_after_ready = 0

        def dispatch(self, inputs: StepInputs) -> StepHandle:
            released.wait(PATIENCE_S)
            raise AssertionError("nobody wants this any more")

        def reset(self) -> None:
            pass

    released = threading.Event()
    failures: list[Exception] = []
    leader = LeaderRunner(Stuck(), groups[0], EngineSizes(**SIZES).shape)
    leader.watch_group(failures.append)
    handle = leader.dispatch(StepInputs([], [], 0, 0))
    cut(groups[2])
    with pytest.raises(FatalStepError, match=r"host 2 .* was lost"):
        handle.wait()
    released.set()
    assert isinstance(failures[0], FatalStepError)
