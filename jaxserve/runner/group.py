"""The hosts of one mesh before they compute: who is there, whether they fit together, who is lost.

    host 0                                     every other host
    listens at --coordinator                   connects, until --join-timeout-s
        <── Hello: versions, mesh, model, flags, clock, machine, address
    Peers ──>                                  tries to reach every other host
        <── PeersReached
    Verdict ──> every problem of every host, or where the device runtime meets
    agree("pages", n) <──> the smallest; is_same(...): refused unless equal
        <── Ready

All of this is before weights are read. The links stay open: host 0 sends its steps over them
(``followers.py``), and a host that is lost is known by its link. A group shares its fate: whoever
loses host 0 ends, host 0 ends when it loses anyone, and every last line names the first to fail.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.config import GroupConfig
from jaxserve.errors import ConfigError, GroupError
from jaxserve.internal.v1 import group_pb2 as pb
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


@dataclass(eq=False)
class Member:
    """Another host, as this one sees it."""

    host_id: int
    name: str
    link: Link
    probe_address: str = ""
    """Where it accepts connections during preflight."""
    inbox: queue.SimpleQueue[pb.Envelope | GroupError] = field(
        default_factory=queue.SimpleQueue[pb.Envelope | GroupError]
    )

    def __str__(self) -> str:
        """Names the host as people know it."""
        return f"host {self.host_id} ({self.name})"

    def expect(self, body: str) -> pb.Envelope:
        """Waits for the next message, which has to be of one kind.

        Raises:
            GroupError: the host was lost or said something else.
        """
        message = self.inbox.get()
        if isinstance(message, GroupError):
            self.inbox.put(message)
            raise message
        if (came := message.WhichOneof("body")) != body:
            raise GroupError(f"{self} sent {came} where {body} was due")
        return message


class Group:
    """This host and the others. Made by ``lead`` or ``join``; then both sides run the same code."""

    def __init__(self, config: GroupConfig, address: str) -> None:
        """Begins with this host alone."""
        self.config = config
        self.others: list[Member] = []
        """Every follower on host 0, by its number; host 0 alone elsewhere."""
        self.address = address
        """Of this host, as the others reach it."""
        self.runtime_address = ""
        """Where the device runtime of host 0 waits for the others."""
        self.on_lost: Callable[[GroupError], None] = lambda error: None
        """Called once, on a link's thread, with the error that names the host; see ``tell``."""
        self.on_step: Callable[[Member, pb.Envelope], None] | None = None
        """Takes ``StepPlan`` and ``StepDone``, on a link's thread, once steps run."""
        self.failure: GroupError | None = None
        """What ended the group."""
        self._lock = threading.Lock()
        self._closed = False

    @property
    def leads(self) -> bool:
        """True on host 0."""
        return self.config.host_id == 0

    def tell(self, on_lost: Callable[[GroupError], None]) -> None:
        """Has ``on_lost`` called when the group fails, or at once if it has."""
        with self._lock:
            self.on_lost = on_lost
            failure = self.failure
        if failure is not None:
            on_lost(failure)

    def agree(self, name: str, value: int) -> int:
        """Returns the smallest of every host's values; every host has to ask in the same order.

        Raises:
            GroupError: a host was lost.
        """
        own = pb.Envelope(agreement=pb.Agreement(name=name, value=value))
        if not self.leads:
            (leader,) = self.others
            leader.link.send(own)
            return self._agreement(leader, name)
        smallest = min([value, *(self._agreement(member, name) for member in self.others)])
        self.broadcast(pb.Envelope(agreement=pb.Agreement(name=name, value=smallest)))
        return smallest

    def check_same(self, name: str, value: int, what: str) -> None:
        """Refuses to go on unless every host has the same value.

        Raises:
            GroupError: on every host; on those that differ it says what has to change.
        """
        smallest, negative = self.agree(name, value), -self.agree(f"-{name}", -value)
        if smallest != negative:
            raise GroupError(f"{what} differs between the hosts; make them alike")

    def ready(self, model_digest: str) -> None:
        """Waits until every host can execute steps; host 0 compares what they loaded.

        Raises:
            GroupError: a host was lost, or loaded another model.
        """
        if not self.leads:
            self.others[0].link.send(pb.Envelope(ready=pb.Ready(model_digest=model_digest)))
            return
        for member in self.others:
            theirs = member.expect("ready").ready.model_digest
            if theirs != model_digest:
                raise GroupError(
                    f"{member} loaded a model with digest {theirs[:12]} and host 0 one with "
                    f"{model_digest[:12]}; give every host the same files"
                )

    def broadcast(self, message: pb.Envelope) -> None:
        """Sends to every other host.

        Raises:
            GroupError: the first that could not be reached, by name.
        """
        for member in self.others:
            try:
                member.link.send(message)
            except GroupError as error:
                raise self._lose(member, error) from error

    def close(self, failure: str = "") -> None:
        """Says goodbye and ends every link. Safe to call again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        goodbye = pb.Envelope(goodbye=pb.Goodbye(failure=failure))
        for member in self.others:
            with suppress(GroupError):
                member.link.send(goodbye)
            member.link.close()

    # -- inside --------------------------------------------------------------------------------

    def _agreement(self, member: Member, name: str) -> int:
        answer = member.expect("agreement").agreement
        if answer.name != name:
            raise GroupError(f"{member} agrees on {answer.name!r} where {name!r} was due")
        return answer.value

    def add(self, member: Member) -> None:
        """Takes over a link that has greeted: reads it from now on, and answers for this host."""

        def take(message: pb.Envelope) -> None:
            body = message.WhichOneof("body")
            if body == "goodbye":
                self._part(member, message.goodbye.failure)
            elif body in ("step_plan", "step_done") and self.on_step is not None:
                self.on_step(member, message)
            else:
                member.inbox.put(message)

        self.others.append(member)
        self.others.sort(key=lambda other: other.host_id)

        def lose(error: GroupError) -> None:
            self._lose(member, error)

        member.link.start(take, lose)

    def _part(self, member: Member, failure: str) -> None:
        """The other side ends; without a failure only host 0 may, for all."""
        if not failure and not self.leads:
            goodbye = GroupGoodbye()
            member.inbox.put(goodbye)
            self.on_lost(goodbye)
            member.link.close()
            return
        self.fail(GroupError(failure or f"{member} was stopped"), member)

    def _lose(self, member: Member, error: GroupError) -> GroupError:
        return self.fail(GroupError(f"{member} was lost: {error}"), member)

    def fail(self, error: GroupError, member: Member | None = None) -> GroupError:
        """Ends the group; returns the first error there was.

        Args:
            error: names the host, if ``member`` does not.
            member: whoever waits for its next message hears of the error too.
        """
        with self._lock:
            first = self.failure is None and not self._closed
            if first:
                self.failure = error
        if member is not None:
            member.inbox.put(error)
        if first:
            self.on_lost(error)
        return self.failure or error


class GroupGoodbye(GroupError):
    """Host 0 has stopped in order; a follower ends without a failure."""

    def __init__(self) -> None:
        """Says so."""
        super().__init__("host 0 has stopped")


# -- host 0 ----------------------------------------------------------------------------------------


def lead(config: GroupConfig, host: HostFacts, say: Say) -> Group:
    """Waits for every other host and checks that they fit together.

    Args:
        config: of the group.
        host: this one.
        say: told what is being waited for.

    Raises:
        GroupError: a host did not come or was lost.
        ConfigError: with every problem of every host; they hear the same.
    """
    address, port = config.coordinator_address
    group = Group(config, address)
    try:
        with _listen(address, port) as listener:
            problems = _gather(group, host, listener, say)
            problems += _reach(group, listener)
    except GroupError as error:
        group.close(str(error))
        raise
    runtime = f"{_bracketed(address)}:{_free_port(address)}"
    group.broadcast(pb.Envelope(verdict=pb.Verdict(problems=problems, runtime_address=runtime)))
    if problems:
        group.close()
        raise ConfigError("; ".join(problems))
    group.runtime_address = runtime
    return group


def _gather(group: Group, host: HostFacts, listener: socket.socket, say: Say) -> list[str]:
    config = group.config
    problems: list[str] = []
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
                f"{config.coordinator} --hosts {config.hosts} and its --host-id"
            )
        if waited_s > NOTE_AFTER_S and not noted:
            noted = True
            say(f"waiting for {_hosts(missing)} to join at {config.coordinator}")
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
            problems += compare(member, hello, host, config, now)
    return problems


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


def compare(
    member: Member, hello: pb.Hello, host: HostFacts, config: GroupConfig, now: float
) -> list[str]:
    """Says what a host has that it should not have, or lacks.

    Args:
        member: names it.
        hello: what it said.
        host: host 0, whose facts count.
        config: of the group.
        now: host 0's clock when that was heard.
    """
    problems = [
        f"{member}: {name} is {theirs or 'not given'} and should be {ours or 'not given'}, as on "
        f"host 0 ({host.name})"
        for name in sorted({*host.facts, *hello.facts})
        if (theirs := hello.facts.get(name, "")) != (ours := host.facts.get(name, ""))
    ]
    ahead_s = hello.unix_seconds - now
    if abs(ahead_s) > MAX_CLOCK_DIFFERENCE_S:
        problems.append(
            f"{member}: its clock is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'} "
            f"and should be within {MAX_CLOCK_DIFFERENCE_S:g} s of host 0's; synchronise them"
        )
    if config.is_local and hello.machine_id != host.machine_id:
        problems.append(
            f"{member}: runs on another machine, and --coordinator {config.coordinator} is "
            "loopback; give an address of host 0 that every host reaches"
        )
    return problems


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
        GroupError: host 0 cannot be reached or was lost.
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
    hint = ""
    if config.is_local:
        hint = (
            f"; {config.coordinator} is loopback and reaches this machine only: if host 0 is "
            "another machine, give its address"
        )
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
