"""Steps on several hosts, with counting runners: their sums tell when a host computed otherwise."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from jaxserve.config import GroupConfig
from jaxserve.engine.engine import Engine, FatalStepError
from jaxserve.engine.publish import StepHandle
from jaxserve.engine.request import FinishedEvent, Request, SamplingParams
from jaxserve.engine.step import StepInputs
from jaxserve.engine.stream import ThreadWaker
from jaxserve.errors import ConfigError, EngineDeadError, GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner import preflight
from jaxserve.runner.followers import LeaderRunner, LineMirror, follow_steps
from jaxserve.runner.group import Group, GroupGoodbye
from jaxserve.runner.preflight import HostFacts, compare_clocks, join, lead, probe
from jaxserve.testing import CountingRunner, EngineSizes, expected_tokens
from tests.agreement.ways import events_of, tokens_of

PATIENCE_S = 20.0
SIZES: dict[str, Any] = {"max_rows": 4, "data_shards": 2}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def configs(hosts: int, **values: Any) -> list[GroupConfig]:
    defaults = {"host_timeout_s": 10.0, "join_timeout_s": 20.0, "secret": b"s"}
    shared = {**defaults, "coordinator": f"127.0.0.1:{free_port()}", **values}
    return [GroupConfig(hosts=hosts, host_id=number, **shared) for number in range(hosts)]


def facts(**changed: str) -> HostFacts:
    return HostFacts("here", "machine", {"jax": "1", "--mesh": "1x2", **changed})


def say_nothing(text: str) -> None:
    pass


def gather(group_configs: Sequence[GroupConfig]) -> list[Group]:
    with ThreadPoolExecutor(len(group_configs)) as pool:
        first = pool.submit(lead, group_configs[0], facts(), say_nothing)
        others = [pool.submit(join, each, facts(), say_nothing) for each in group_configs[1:]]
        return [future.result(PATIENCE_S) for future in (first, *others)]


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    found = gather(configs(3))
    yield found
    for group in found:
        group.close()


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


def cut(group: Group) -> None:
    """Does what the kernel does for a killed process: closes its sockets, without a goodbye."""
    group.others[0].link._socket.shutdown(socket.SHUT_RDWR)


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


# -- preflight -------------------------------------------------------------------------------------


def test_hosts_agree_on_the_smallest_number(groups: list[Group]) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = [
            pool.submit(g.agree, "pages", v) for g, v in zip(groups, (30, 10, 20), strict=True)
        ]
        assert [future.result(PATIENCE_S) for future in found] == [10, 10, 10]
        asked = [pool.submit(groups[0].agree, "pages", 1), pool.submit(groups[1].agree, "rows", 1)]
        with pytest.raises(GroupError, match=r"host 1 .* agrees on 'rows' where 'pages' was due"):
            asked[0].result(PATIENCE_S)
        groups[0].close()
        with pytest.raises(GroupError):
            asked[1].result(PATIENCE_S)


def test_a_host_with_another_model_is_named(groups: list[Group]) -> None:
    groups[1].ready("a" * 64)
    groups[2].ready("b" * 64)
    with pytest.raises(GroupError, match=r"host 2 .* digest b{12} and host 0 one with a{12}"):
        groups[0].ready("a" * 64)


def test_a_message_that_is_not_due_is_refused(groups: list[Group]) -> None:
    groups[1].others[0].link.send(pb.Envelope(ready=pb.Ready()))
    with pytest.raises(GroupError, match=r"host 1 .* sent ready where agreement was due"):
        groups[0].agree("pages", 1)


def refusals(
    leader: HostFacts, follower: HostFacts, kind: type[Exception], **values: Any
) -> list[str]:
    first, second = configs(2, **values)
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(lead, first, leader, say_nothing),
            pool.submit(join, second, follower, say_nothing),
        ]
        messages = []
        for end in ends:
            with pytest.raises(kind) as caught:
                end.result(PATIENCE_S)
            messages.append(str(caught.value))
    return messages


def both_refused(leader: HostFacts, follower: HostFacts, **values: Any) -> str:
    messages = refusals(leader, follower, ConfigError, **values)
    assert messages[0] == messages[1], "both hosts say the same"
    return messages[0]


def test_a_host_that_differs_is_told_what_it_has_and_should_have() -> None:
    message = both_refused(facts(), facts(jax="2", **{"--rows": "4"}))

    assert message == (
        "host 1 (here): --rows is 4 and should be not given, as on host 0 (here); "
        "host 1 (here): jax is 2 and should be 1, as on host 0 (here)"
    )


def test_a_loopback_coordinator_is_for_one_machine() -> None:
    elsewhere = HostFacts("there", "another machine", facts().facts)

    assert "loopback; give an address of host 0" in both_refused(facts(), elsewhere)
    same_by_name = f"127.1:{free_port()}"
    message = both_refused(facts(), elsewhere, coordinator=same_by_name)
    assert f"--coordinator {same_by_name} is loopback; give an address" in message


@pytest.mark.parametrize("run", [lead, join])
def test_a_name_for_every_address_is_no_coordinator(run: Callable[..., Group]) -> None:
    config = configs(2, coordinator=f"0:{free_port()}")[0 if run is lead else 1]
    with pytest.raises(ConfigError, match=r"is 0\.0\.0\.0, which no other host can reach"):
        run(config, facts(), say_nothing)


@pytest.mark.parametrize(
    ("run", "message"), [(lead, "cannot listen at"), (join, "host 0 cannot be reached at")]
)
def test_a_name_that_stands_for_nothing_is_told(run: Callable[..., Group], message: str) -> None:
    here = configs(2, coordinator="nowhere.invalid:8476", join_timeout_s=0.1)
    with pytest.raises(GroupError, match=f"{message} nowhere.invalid:8476: "):
        run(here[0 if run is lead else 1], facts(), say_nothing)


def test_what_may_pass_by_itself_is_no_mistake_of_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a supervisor tries again; see ``--restart``."""
    monkeypatch.setattr(preflight, "MAX_CLOCK_DIFFERENCE_S", -1.0)
    ours, theirs = refusals(facts(), facts(), GroupError)
    assert "host 1 (here): its clock is" in ours
    assert theirs == f"host 0 did not let host 1 in: {ours}; its log says why"

    monkeypatch.setattr(preflight, "MAX_CLOCK_DIFFERENCE_S", 30.0)
    monkeypatch.setattr(preflight, "probe", lambda addresses, host_id: [f"{host_id} reaches none"])
    ours, theirs = refusals(facts(), facts(), GroupError)
    assert ours == "0 reaches none; 1 reaches none"
    assert ours in theirs


def test_a_mistake_among_what_may_pass_is_told_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "probe", lambda addresses, host_id: [f"{host_id} reaches none"])
    message = both_refused(facts(), facts(jax="2"))
    assert message == (
        "host 1 (here): jax is 2 and should be 1, as on host 0 (here); 0 reaches none; "
        "1 reaches none"
    )


@pytest.mark.parametrize(("ahead_s", "word"), [(45.0, "ahead"), (-45.0, "behind")])
def test_a_clock_that_is_wrong_is_told(ahead_s: float, word: str, groups: list[Group]) -> None:
    hello = pb.Hello(unix_seconds=1000 + ahead_s)

    assert compare_clocks(groups[0].others[0], hello, 1000.0) == [
        f"host 1 (here): its clock is 45 s {word} and should be within 30 s of host 0's; "
        "synchronise them"
    ]


def test_hosts_that_do_not_come_are_named() -> None:
    (config, *_) = configs(3, join_timeout_s=0.3)
    with pytest.raises(GroupError, match=r"hosts 1, 2 did not join within --join-timeout-s 0\.3"):
        lead(config, facts(), say_nothing)


@pytest.mark.parametrize("name", ["127.0.0.1", "127.1"])
def test_a_coordinator_that_is_not_there_is_told_with_the_remedy(name: str) -> None:
    (_, config) = configs(2, coordinator=f"{name}:{free_port()}", join_timeout_s=0.3)
    with pytest.raises(GroupError, match=r"cannot be reached at .* is loopback and reaches this"):
        join(config, facts(), say_nothing)


def test_a_coordinator_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            GroupError, match=r"cannot listen at .*an address of host 0 with a free"
        ):
            lead(configs(2, coordinator=address)[0], facts(), say_nothing)


def test_a_stranger_is_refused_and_the_group_still_starts() -> None:
    first, second = configs(2)
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(lead, first, facts(), said.append)
        wrong = GroupConfig(
            hosts=2, host_id=1, coordinator=first.coordinator, secret=b"x", join_timeout_s=5.0
        )
        with pytest.raises(GroupError, match="host 0 did not let host 1 in"):
            join(wrong, facts(), say_nothing)
        follower = pool.submit(join, second, facts(), say_nothing)
        groups = [leader.result(PATIENCE_S), follower.result(PATIENCE_S)]
    assert any("is the group's secret the same here" in text for text in said)
    for group in groups:
        group.close()


def test_a_number_that_is_taken_is_refused() -> None:
    first, second, third = configs(3)
    said: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        leader = pool.submit(lead, first, facts(), said.append)
        one = pool.submit(join, second, facts(), say_nothing)
        while not said:
            twin = pool.submit(join, second, facts(), say_nothing)
            loser = next(iter({one, twin} & set(finished(one, twin))))
            with pytest.raises(GroupError):
                loser.result(PATIENCE_S)
            one = twin if loser is one else one
        other = pool.submit(join, third, facts(), say_nothing)
        groups = [future.result(PATIENCE_S) for future in (leader, one, other)]
    assert "wants to be host 1, which is not awaited" in said[0]
    for group in groups:
        group.close()


def finished(*futures: Future[Any]) -> set[Future[Any]]:
    return set(wait(futures, PATIENCE_S, FIRST_COMPLETED).done)


def test_an_address_that_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        reachable = f"127.0.0.1:{there.getsockname()[1]}"
        gone = f"127.0.0.1:{free_port()}"
        problems = probe(["never asked", reachable, gone], 1)
    assert len(problems) == 1
    assert problems[0].startswith("host 1 cannot reach host 2 at 127.0.0.1: ")


def test_goodbye_of_host_0_is_no_failure(groups: list[Group]) -> None:
    heard: list[GroupError] = []
    came = threading.Event()

    def hear(error: GroupError) -> None:
        heard.append(error)
        came.set()

    groups[1].tell(hear)
    groups[0].close()
    assert came.wait(PATIENCE_S)
    assert isinstance(heard[0], GroupGoodbye)


def test_who_asks_late_hears_of_a_loss_too(groups: list[Group]) -> None:
    cut(groups[1])
    with pytest.raises(GroupError):
        groups[0].agree("pages", 1)
    heard: list[GroupError] = []
    groups[0].tell(heard.append)
    assert "host 1 (here) was lost" in str(heard[0])


class Between:
    """A lock; what is to happen after it was first let go happens then."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._todo = [happens]

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        while self._todo:
            self._todo.pop()()


def test_who_asks_while_the_group_fails_hears_of_it_once() -> None:
    heard: list[GroupError] = []
    group = Group(configs(2)[0], "127.0.0.1")
    between: Any = Between(lambda: group.tell(heard.append))
    group._lock = between
    error = group.fail(GroupError("it burns"))
    assert heard == [error]


def test_who_asks_late_hears_of_goodbye_and_of_no_loss_after_it(groups: list[Group]) -> None:
    groups[0].close()
    with pytest.raises(GroupGoodbye):
        groups[1].others[0].expect("agreement")
    heard: list[GroupError] = []
    groups[1].tell(heard.append)
    groups[1].fail(GroupError("the link of host 0 is closed"))
    assert [type(error) for error in heard] == [GroupGoodbye]


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hosts": 0}, "hosts is 0; choose 1 to 1024"),
        ({"hosts": 2, "host_id": 2}, "host_id is 2; with --hosts 2 choose 0 to 1"),
        ({"hosts": 2}, "coordinator is empty; with --hosts 2 give HOST:PORT of host 0"),
        ({"coordinator": "there"}, "coordinator is 'there'; write HOST:PORT"),
        ({"coordinator": "there:0"}, "coordinator is 'there:0'; write HOST:PORT"),
        ({"coordinator": "a..b:80"}, r"coordinator is 'a\.\.b:80'; write HOST:PORT"),
        ({"coordinator": "0.0.0.0:80"}, r"is '0\.0\.0\.0:80', which no other host can reach; give"),
        ({"coordinator": "[::]:80"}, r"is '\[::\]:80', which no other host can reach"),
        ({"coordinator": "[::ffff:0.0.0.0]:80"}, "which no other host can reach"),
        ({"join_timeout_s": 0.0}, "join_timeout_s is 0"),
        ({"host_timeout_s": -1.0}, "host_timeout_s is -1"),
    ],
)
def test_a_place_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupConfig(**values)


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
