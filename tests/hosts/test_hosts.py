"""A mesh of two hosts, each a real `jaxserve launch`: the same tokens, and one fate.

With ``1x4`` over two hosts of two devices every all-reduce of the layers crosses the hosts; with
``2x4`` over two hosts of four each host is a data shard; steps and results cross. The faults that
``make test`` leaves out run with JAXSERVE_PROVE_HOSTS=1, in ``make prove-hosts``.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve import Client, ServeConfig
from jaxserve.engine.request import Request
from jaxserve.frontend.client_types import GenerateOptions
from jaxserve.models.decoder import Model
from jaxserve.models.presets import preset
from jaxserve.resolve import configure_jax, resolve
from jaxserve.sizing import make_runner
from sharding import MeshShapeError, make_mesh, parse_mesh
from tests.agreement.ways import STYLES, ask_together, make_service, requests
from tests.hosts.group_process import MODEL, PROVE, SIZES, HostGroup, prove
from tests.runner.test_mesh import GROUPS

pytestmark = pytest.mark.slow

PROMPTS = 20
OUTPUT_TOKENS = 24
STREAMS = 3
LIMIT_S = 10.0
"""From a fault to everybody's knowing of it; --host-timeout-s is 6."""
SHORTER = GenerateOptions(max_tokens=100, temperature=0.0, ignore_eos=True)
"""Is read to its end."""
REFUSED_S = 120.0
"""For two processes that compile nothing, on a machine that is busy."""


class Groups:
    """At most one group at a time; tests that leave it whole leave it to the next."""

    def __init__(self, directory: Callable[[], Path], cache_dir: Path) -> None:
        self._directory = directory
        self._cache_dir = cache_dir
        self._mesh = ""
        self._group: HostGroup | None = None

    def make(self, **options: Any) -> HostGroup:
        """One for a block, which starts and ends it."""
        self.close()
        return HostGroup(self._directory(), self._cache_dir, **options)

    def serving(self, mesh: str) -> HostGroup:
        """One that serves: the last, if it has this mesh and still runs."""
        if self._group is None or self._mesh != mesh or not self._group.is_whole:
            self._group, self._mesh = self.make(mesh=mesh), mesh
            self._group.start()
            self._group.wait_ready()
        return self._group

    def close(self) -> None:
        """Kills what runs."""
        if self._group is not None:
            self._group.close()
        self._group = None


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Groups]:
    made = Groups(lambda: tmp_path_factory.mktemp("hosts"), cache_dir)
    yield made
    made.close()


# -- answers ---------------------------------------------------------------------------------------


def batch(vocab_size: int) -> list[Request]:
    """20 prompts greedily, and 20 with every filter and penalty and a seed each."""
    return [
        replace(
            request,
            request_id=f"{style}{number}",
            sampling=replace(request.sampling, max_tokens=OUTPUT_TOKENS),
        )
        for style, sampling in sorted(STYLES.items())
        for number, request in enumerate(requests(vocab_size, sampling)[:PROMPTS])
    ]


def ask_over_grpc(address: str, together: list[Request]) -> list[list[int]]:
    """All at once; the output tokens in order of the requests."""

    def ask(request: Request) -> list[int]:
        given = vars(request.sampling).items()
        options: Any = {
            name: value
            for name, value in given
            if name in GenerateOptions.__annotations__ and value not in (None, (), {})
        }
        answer = client.generate(token_ids=request.prompt, timeout_s=REFUSED_S, **options)
        return list(answer.choices[0].token_ids)

    with Client(address) as client, ThreadPoolExecutor(len(together)) as pool:
        return list(pool.map(ask, together))


@pytest.fixture(scope="module")
def alone(cache_dir: Path) -> Callable[[], tuple[list[Request], list[list[int]]]]:
    """What is asked, and what one device answers."""

    @cache
    def ask() -> tuple[list[Request], list[list[int]]]:
        with make_service(MODEL, cache_dir, cache_dir, **SIZES) as service:
            together = batch(service.plan.model.vocab_size)
            return together, ask_together(service.engine, together)

    return ask


def test_two_hosts_that_share_every_layer_answer_what_one_device_answers(
    groups: Groups, alone: Callable[[], tuple[list[Request], list[list[int]]]]
) -> None:
    together, expected = alone()
    group = groups.serving("1x4")
    assert ask_over_grpc(group.address, together) == expected
    assert len({tuple(tokens) for tokens in expected}) > PROMPTS, "the prompts have own answers"
    numbers = [group.hosts[host_id].gloo_numbers for host_id in (0, 1)]
    assert numbers[0] == "013333", "two of the four devices are here"
    assert numbers[1] == "233333", "and two there"


# -- where the mesh lies ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceOfHost:
    """What ordering a mesh needs to know of a device."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("mesh", "devices_of_host", "hosts_of_group"),
    [
        ("1x4", 2, [{0, 1}]),
        ("1x8", 4, [{0, 1}]),
        ("2x4", 4, [{0}, {1}]),
        ("4x2", 4, [{0}, {0}, {1}, {1}]),
    ],
)
def test_a_tensor_group_crosses_hosts_only_where_it_must(
    mesh: str, devices_of_host: int, hosts_of_group: list[set[int]]
) -> None:
    shape = parse_mesh(mesh)
    devices = [
        DeviceOfHost(number, number // devices_of_host) for number in range(2 * devices_of_host)
    ]
    rows = make_mesh(shape, devices[::-1]).devices.tolist()
    assert [{device.process_index for device in row} for row in rows] == hosts_of_group


def test_a_mesh_whose_tensor_group_would_cross_hosts_needlessly_is_refused() -> None:
    devices = [DeviceOfHost(number, number // 8) for number in range(16)]
    with pytest.raises(MeshShapeError, match="use data in multiples of 2, from 2x4 to 4x4"):
        make_mesh(parse_mesh("3x4"), devices)


def test_what_programs_exchange_runs_along_tensor_groups(cache_dir: Path) -> None:
    """So it crosses hosts in ``1x4`` over two of them, and does not in ``2x4``."""
    sizes: Any = SIZES
    config = ServeConfig(
        model=MODEL,
        mesh="1x4",
        device="cpu",
        dtype="float32",
        cache_dir=cache_dir,
        assets_dir=cache_dir,
        **sizes,
    )
    configure_jax(config)
    plan = resolve(config, preset(MODEL.removeprefix("dummy:")))
    runner = make_runner(plan, Model(plan.model, plan.mesh.shape["tensor"]), 32)
    key = next(key for key in runner.program_keys() if key.kind == "decode")
    assert list(runner.compile([key])) == [key]
    program = runner._compiled[key.kind, key.rows, key.tokens].as_text()
    assert len(GROUPS.findall(program)) >= 2 * plan.model.layers
    assert set(GROUPS.findall(program)) == {"'tensor'"}
    assert "replica_groups=mesh['data'=1,'tensor'=4]" in program


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_id", "number"),
    [
        pytest.param(1, signal.SIGKILL, id="kill-follower"),
        pytest.param(1, signal.SIGSTOP, id="stop-follower"),
        pytest.param(0, signal.SIGKILL, id="kill-leader", marks=PROVE),
        pytest.param(0, signal.SIGSTOP, id="stop-leader", marks=PROVE),
    ],
)
def test_a_fault_of_one_host_ends_the_streams_and_every_host(
    groups: Groups,
    host_id: int,
    number: signal.Signals,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    group = groups.serving("1x4")
    request.addfinalizer(groups.close)
    streams = group.open_streams(STREAMS)
    assert group.health() == "SERVING"
    start = group.signal(host_id, number)
    other = 1 - host_id
    while (health := group.health()) == "SERVING":
        assert time.monotonic() - start < LIMIT_S, group
    unhealthy_s = time.monotonic() - start
    assert unhealthy_s < LIMIT_S
    assert health in ("NOT_SERVING", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
    group.wait_exit(start + LIMIT_S - time.monotonic(), other)
    continued = start
    if number == signal.SIGSTOP:
        continued = group.signal(host_id, signal.SIGCONT)
    statuses = group.wait_exit(LIMIT_S)
    ended_s = group.wait_streams(streams, LIMIT_S) - start
    exits = {each: host.ended_at for each, host in group.hosts.items()}
    exits_s = {other: exits[other] - start, host_id: exits[host_id] - continued}
    after = "SIGCONT" if number == signal.SIGSTOP else "fault"
    line = (
        f"{request.node.callspec.id:14} health {health} {unhealthy_s:.1f} s, streams ended "
        f"{ended_s:.1f} s, host {other} exit {statuses[other]} {exits_s[other]:.1f} s, "
        f"host {host_id} exit {statuses[host_id]} {exits_s[host_id]:.1f} s after {after}"
    )
    print(f"\n{line}\n  {streams[0].details}\n  {[group.hosts[i].failure for i in (0, 1)]}")
    record_property("fault", line)

    assert all(exits_s[each] < LIMIT_S for each in exits_s), line
    assert 0 not in statuses.values(), line
    for stream in streams:
        assert stream.code is grpc.StatusCode.UNAVAILABLE, (stream.code, stream.details)
        if host_id != 0:
            assert re.search(r"host 1 \(.+\) was lost: ", stream.details), stream.details
    if host_id != 0:
        assert ended_s < LIMIT_S
    assert re.search(rf"host {host_id} \(.+\) was lost: ", group.hosts[other].failure), group
    if number == signal.SIGSTOP:
        assert group.hosts[host_id].failure, group
    group.wait_nothing_left()


@prove
def test_two_hosts_with_a_data_shard_each_answer_what_one_device_answers(
    groups: Groups, alone: Callable[[], tuple[list[Request], list[list[int]]]]
) -> None:
    together, expected = alone()
    group = groups.serving("2x4")
    assert ask_over_grpc(group.address, together) == expected
    for host_id, host in group.hosts.items():
        tensor_group = "0123" + 4 * "33"  # one of this host's four devices alone
        like_elsewhere = 4 * f"{host_id}11"  # each with its like of the other host: results
        assert host.gloo_numbers == "".join(sorted(tensor_group + like_elsewhere))


def test_sigterm_of_host_0_lets_a_stream_finish_and_every_host_exit_with_0(
    groups: Groups, request: pytest.FixtureRequest
) -> None:
    group = groups.serving("2x4")
    request.addfinalizer(groups.close)
    (stream,) = group.open_streams(1, SHORTER)
    start = group.signal(0, signal.SIGTERM)
    assert not stream.ended_at, "it runs"
    group.wait_streams([stream], REFUSED_S)
    assert stream.finished
    assert stream.error is None
    assert stream.tokens == SHORTER.get("max_tokens")
    assert group.wait_exit(REFUSED_S) == {0: 0, 1: 0}, group
    print(f"\nSIGTERM of host 0: finished and gone after {time.monotonic() - start:.1f} s")
    group.wait_nothing_left()


def test_supervised_hosts_serve_again_when_one_was_killed_and_stop_when_told(
    groups: Groups, record_property: Callable[[str, object], None]
) -> None:
    with groups.make(flags=["--restart", "3"]) as group:
        group.wait_ready()
        first = ask_one(group)
        (child,) = group.children(1)
        os.kill(child, signal.SIGKILL)
        start = time.monotonic()
        group.wait_ready(times=2)
        assert ask_one(group) == first
        again_s = time.monotonic() - start
        line = f"serving again {again_s:.1f} s after a host was killed"
        print(f"\n{line}\n  {[host.ready_lines[-1] for host in group.hosts.values()]}")
        record_property("restart", line)
        assert "host 1 (" in group.hosts[0].failure, group
        for host_id in group.hosts:
            assert "restart: ended with " in group.hosts[host_id].errors
            group.signal(host_id, signal.SIGTERM)
        assert group.wait_exit(REFUSED_S) == {0: 0, 1: 0}, group
        group.wait_nothing_left()


def ask_one(group: HostGroup) -> list[int]:
    with Client(group.address) as client:
        options = GenerateOptions(max_tokens=8, temperature=0.0, ignore_eos=True)
        answer = client.generate(token_ids=[5, 6, 7], timeout_s=REFUSED_S, **options)
    return list(answer.choices[0].token_ids)


# -- refusals --------------------------------------------------------------------------------------


def test_hosts_with_other_flags_are_refused_on_both_sides_with_what_to_change(
    groups: Groups,
) -> None:
    with groups.make(flags_of={1: ["--max-rows", "4", "--mesh", "2x2"]}) as group:
        assert group.wait_exit(REFUSED_S) == {0: 2, 1: 2}, group
        name = re.escape(socket.gethostname())
        for host in group.hosts.values():
            for flag, theirs, ours in (("--max-rows", "4", "8"), ("--mesh", "2x2", "1x4")):
                assert re.search(
                    rf"host 1 \({name}\): {flag} is {theirs} and should be {ours}, as on host 0 "
                    rf"\({name}\)",
                    host.failure,
                ), group
            assert "[compile]" not in host.errors


@prove
def test_a_host_with_another_secret_is_not_let_in(groups: Groups) -> None:
    with groups.make(
        flags_of={0: ["--join-timeout-s", "20"]},
        environment={0: {"JAXSERVE_GROUP_SECRET": "a"}, 1: {"JAXSERVE_GROUP_SECRET": "b"}},
    ) as group:
        assert group.wait_exit(REFUSED_S) == {0: 1, 1: 1}, group
        assert "host 0 did not let host 1 in" in group.hosts[1].failure
        assert "is the group's secret the same here?" in group.hosts[0].errors
        assert "host 1 did not join within --join-timeout-s 20" in group.hosts[0].failure


@prove
def test_host_0_says_who_did_not_come(groups: Groups) -> None:
    with groups.make(hosts=[0], flags=["--join-timeout-s", "1"]) as group:
        assert group.wait_exit(REFUSED_S) == {0: 1}, group
        failure = group.hosts[0].failure
        assert "host 1 did not join within --join-timeout-s 1; start jaxserve there" in failure
