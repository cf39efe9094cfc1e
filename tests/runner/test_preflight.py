"""How hosts become a group, what they refuse each other, and how they part."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from jaxserve.config import GroupConfig
from jaxserve.errors import ConfigError, GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner import preflight
from jaxserve.runner.group import Group, GroupGoodbye
from jaxserve.runner.preflight import HostFacts, compare_clocks, join, lead, probe
from tests.runner.gathering import PATIENCE_S, configs, cut, facts, free_port, say_nothing


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
