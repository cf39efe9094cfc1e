"""The hosts of one mesh before they compute: who is there, and whether they fit together.

    host 0                                     every other host
    listens at --coordinator                   connects, until --join-timeout-s
        <── Hello: versions, mesh, model, flags, clock, machine, address
    Peers ──>                                  tries to reach every other host
        <── PeersReached
    Verdict ──> every problem of every host, or where the device runtime meets
    Goodbye ──> instead, if every problem is one that may pass by itself

All of this is before weights are read. The links stay open: they are the group's (``group.py``).
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import GroupConfig, is_loopback, is_unspecified
from jaxserve.errors import ConfigError, GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner.group import Group, Member
from jaxserve.runner.link import Link

MAX_CLOCK_DIFFERENCE_S = 30.0
"""Logs of several hosts cannot be read side by side beyond that."""
PROBE_TIMEOUT_S = 3.0
NOTE_AFTER_S = 10.0
"""Waiting for hosts is explained after this long."""
RETRY_S = 0.2
MAX_STRANGERS = 16
"""Connections that are being greeted at once."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class HostFacts:
    """What a host says of itself."""

    name: str
    machine_id: str
    facts: Mapping[str, str]
    """What has to be the same on every host, by name."""

    @classmethod
    def of_this_host(cls, facts: Mapping[str, str]) -> HostFacts:
        """Asks the operating system for the rest."""
        return cls(socket.gethostname(), _machine_id(), facts)


# -- host 0 ----------------------------------------------------------------------------------------


def lead(config: GroupConfig, host: HostFacts, say: Say) -> Group:
    """Waits for every other host and checks that they fit together.

    Args:
        config: of the group.
        host: this one.
        say: told what is being waited for.

    Raises:
        GroupError: a host did not come or was lost, or nothing is wrong but clocks and the network
            between hosts, which may be mended without a change here.
        ConfigError: with every problem of every host; they hear the same.
    """
    address, port = config.coordinator_address
    group = Group(config, address)
    try:
        with _listen(address, port) as listener:
            _refuse_unspecified(config, _own_address(listener))
            mistakes, troubles = _gather(group, host, listener, say)
            troubles += _reach(group, listener)
        if troubles and not mistakes:
            raise GroupError("; ".join(troubles))
    except GroupError as error:
        group.close(str(error))
        raise
    problems = mistakes + troubles
    runtime = f"{_bracketed(address)}:{_free_port(address)}"
    group.broadcast(pb.Envelope(verdict=pb.Verdict(problems=problems, runtime_address=runtime)))
    if problems:
        group.close()
        raise ConfigError("; ".join(problems))
    group.runtime_address = runtime
    return group


def _gather(
    group: Group, host: HostFacts, listener: socket.socket, say: Say
) -> tuple[list[str], list[str]]:
    """Waits for every host; returns what somebody has to change, and what may pass by itself."""
    config = group.config
    address = _own_address(listener)
    hint = _loopback_hint(config, address)
    mistakes: list[str] = []
    troubles: list[str] = []
    greeted = queue.SimpleQueue[tuple[Link, pb.Hello, float] | GroupError]()
    strangers = threading.Semaphore(MAX_STRANGERS)
    start = time.monotonic()
    noted = False
    listener.settimeout(RETRY_S)
    while len(group.others) < config.hosts - 1:
        if group.failure is not None:
            raise group.failure
        waited_s = time.monotonic() - start
        present = [member.host_id for member in group.others]
        missing = [number for number in range(1, config.hosts) if number not in present]
        if waited_s > config.join_timeout_s:
            raise GroupError(
                f"{_hosts(missing)} did not join within --join-timeout-s "
                f"{config.join_timeout_s:g}; start jaxserve there with --coordinator "
                f"{config.coordinator} --hosts {config.hosts} and its --host-id{hint}"
            )
        if waited_s > NOTE_AFTER_S and not noted:
            noted = True
            say(f"waiting for {_hosts(missing)} to join at {config.coordinator}{hint}")
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            if strangers.acquire(blocking=False):
                threading.Thread(
                    target=_greet, args=(connection, config, greeted, strangers), daemon=True
                ).start()
            else:
                connection.close()
        while not greeted.empty():
            came = greeted.get()
            if isinstance(came, GroupError):
                say(f"a connection was refused: {came}")
                continue
            link, hello, now = came
            if hello.host_id not in missing:
                link.close()
                say(
                    f"{hello.host_name} wants to be host {hello.host_id}, which is not awaited; "
                    f"--host-id runs from 0 to {config.hosts - 1}, each once"
                )
                continue
            missing.remove(hello.host_id)
            member = Member(hello.host_id, hello.host_name, link, hello.probe_address)
            group.add(member)
            mistakes += compare(member, hello, host)
            mistakes += compare_machines(member, hello, host, config, address)
            troubles += compare_clocks(member, hello, now)
    return mistakes, troubles


def _greet(
    connection: socket.socket,
    config: GroupConfig,
    greeted: queue.SimpleQueue[tuple[Link, pb.Hello, float] | GroupError],
    strangers: threading.Semaphore,
) -> None:
    try:
        link = Link(connection, secret=config.secret, leads=True, timeout_s=config.host_timeout_s)
        message = link.receive()
        if message.WhichOneof("body") != "hello":
            raise GroupError(f"it began with {message.WhichOneof('body')} and not with hello")
        greeted.put((link, message.hello, time.time()))
    except GroupError as error:
        connection.close()
        greeted.put(error)
    finally:
        strangers.release()


def compare(member: Member, hello: pb.Hello, host: HostFacts) -> list[str]:
    """Says what a host has that it should not have, or lacks.

    Args:
        member: names it.
        hello: what it said.
        host: host 0, whose facts count.
    """
    return [
        f"{member}: {name} is {theirs or 'not given'} and should be {ours or 'not given'}, as on "
        f"host 0 ({host.name})"
        for name in sorted({*host.facts, *hello.facts})
        if (theirs := hello.facts.get(name, "")) != (ours := host.facts.get(name, ""))
    ]


def compare_machines(
    member: Member, hello: pb.Hello, host: HostFacts, config: GroupConfig, address: str
) -> list[str]:
    """Says so if a host of another machine has come to loopback; ``address`` is host 0's."""
    if not is_loopback(address) or hello.machine_id == host.machine_id:
        return []
    return [
        f"{member}: runs on another machine, and --coordinator {config.coordinator} is "
        "loopback; give an address of host 0 that every host reaches"
    ]


def compare_clocks(member: Member, hello: pb.Hello, now: float) -> list[str]:
    """Says how far a clock is away; ``now`` is host 0's when the hello was heard."""
    ahead_s = hello.unix_seconds - now
    if abs(ahead_s) <= MAX_CLOCK_DIFFERENCE_S:
        return []
    return [
        f"{member}: its clock is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'} "
        f"and should be within {MAX_CLOCK_DIFFERENCE_S:g} s of host 0's; synchronise them"
    ]


def _reach(group: Group, listener: socket.socket) -> list[str]:
    """Has every host reach every other one; host 0 is reached by all already."""
    addresses = [_address_of(listener), *(member.probe_address for member in group.others)]
    group.broadcast(pb.Envelope(peers=pb.Peers(addresses=addresses)))
    problems = probe(addresses, 0)
    for member in group.others:
        problems += member.expect("peers_reached").peers_reached.problems
    return problems


# -- every other host ------------------------------------------------------------------------------


def join(config: GroupConfig, host: HostFacts, say: Say) -> Group:
    """Joins the group of host 0.

    Raises:
        GroupError: host 0 cannot be reached, was lost, or lets nobody in for what may pass.
        ConfigError: the hosts do not fit together.
    """
    connection = _connect(config, say)
    address = connection.getsockname()[0]
    link = Link(connection, secret=config.secret, leads=False, timeout_s=config.host_timeout_s)
    with _listen(address, 0) as listener:
        stop = threading.Event()
        threading.Thread(target=_accept_probes, args=(listener, stop), daemon=True).start()
        hello = pb.Hello(
            host_id=config.host_id,
            host_name=host.name,
            probe_address=_address_of(listener),
            facts=host.facts,
            unix_seconds=time.time(),
            machine_id=host.machine_id,
        )
        link.send(pb.Envelope(hello=hello))
        leader = Member(0, config.coordinator, link)
        group = Group(config, address)
        group.add(leader)
        try:
            peers = leader.expect("peers").peers
            found = probe(list(peers.addresses), config.host_id)
            reached = pb.PeersReached(problems=found)
            link.send(pb.Envelope(peers_reached=reached))
            verdict = leader.expect("verdict").verdict
        except GroupError as error:
            group.close()
            raise GroupError(
                f"host 0 did not let host {config.host_id} in: {error}; its log says why"
            ) from error
        finally:
            stop.set()
    if verdict.problems:
        group.close()
        raise ConfigError("; ".join(verdict.problems))
    group.runtime_address = verdict.runtime_address
    return group


def _connect(config: GroupConfig, say: Say) -> socket.socket:
    start = time.monotonic()
    noted = False
    found = _look_up(config.coordinator_address[0])
    _refuse_unspecified(config, found)
    hint = _loopback_hint(config, found)
    while True:
        try:
            return socket.create_connection(config.coordinator_address, PROBE_TIMEOUT_S)
        except OSError as error:
            waited_s = time.monotonic() - start
            why = f"host 0 cannot be reached at {config.coordinator}: {error}{hint}"
            if waited_s > config.join_timeout_s:
                raise GroupError(f"{why}; gave up after --join-timeout-s") from error
            if waited_s > NOTE_AFTER_S and not noted:
                noted = True
                say(f"{why}; trying on")
            time.sleep(RETRY_S)


def _accept_probes(listener: socket.socket, stop: threading.Event) -> None:
    with suppress(OSError):
        listener.settimeout(RETRY_S)
        while not stop.is_set():
            with suppress(TimeoutError):
                listener.accept()[0].close()


# -- both ------------------------------------------------------------------------------------------


def probe(addresses: list[str], host_id: int) -> list[str]:
    """Tries to reach every other host; returns a sentence for each that cannot be."""
    problems: list[str] = []
    for number, text in enumerate(addresses):
        # Host 0 has been reached: that is how we know of the others.
        if number in (0, host_id):
            continue
        address, _, port = text.rpartition(":")
        try:
            socket.create_connection((address.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()
        except OSError as error:
            problems.append(
                f"host {host_id} cannot reach host {number} at {address}: {error}; open the "
                "network between them to all ports"
            )
    return problems


def _listen(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
    except OSError as error:
        raise GroupError(
            f"cannot listen at {_bracketed(address)}:{port}: {error}; --coordinator has to be an "
            "address of host 0 with a free port"
        ) from error


def _free_port(address: str) -> int:
    with _listen(address, 0) as listener:
        return int(listener.getsockname()[1])


def _look_up(host: str) -> str:
    """The address that a name stands for here; the name itself while it stands for none."""
    with suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return host


def _refuse_unspecified(config: GroupConfig, address: str) -> None:
    if is_unspecified(address):
        raise ConfigError(
            f"--coordinator {config.coordinator} is {address}, which no other host can reach; give "
            "an address of host 0"
        )


def _loopback_hint(config: GroupConfig, address: str) -> str:
    if not is_loopback(address):
        return ""
    return (
        f"; {config.coordinator} is loopback and reaches this machine only: with several machines, "
        "give host 0's address"
    )


def _own_address(listener: socket.socket) -> str:
    return str(listener.getsockname()[0])


def _address_of(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    return f"{_bracketed(address)}:{port}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _hosts(numbers: list[int]) -> str:
    return f"host{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _machine_id() -> str:
    """The running kernel's: containers and network namespaces of one machine share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
