"""The hosts of one mesh once they know each other: one member, one link each, and one fate.

    agree("pages", n) <──> the smallest
        <── Ready

``preflight.py`` brings them together; afterwards both sides run the same code. Host 0 sends its
steps over the links (``followers.py``), and a host that is lost is known by its link. Whoever loses
host 0 ends, host 0 ends when it loses anyone, and every last line names the first to fail.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from jaxserve.config import GroupConfig
from jaxserve.errors import GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner.link import Link


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
        self._end: GroupError | None = None
        """What ``on_lost`` has heard: a failure, or goodbye."""

    @property
    def leads(self) -> bool:
        """True on host 0."""
        return self.config.host_id == 0

    def tell(self, on_lost: Callable[[GroupError], None]) -> None:
        """Has ``on_lost`` called when the group ends, or at once if it has."""
        with self._lock:
            self.on_lost = on_lost
            end = self._end
        if end is not None:
            on_lost(end)

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
            with self._lock:
                on_lost = self._end_with(goodbye)
            member.inbox.put(goodbye)
            on_lost(goodbye)
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
            on_lost = self._end_with(error) if first else None
        if member is not None:
            member.inbox.put(error)
        if on_lost is not None:
            on_lost(error)
        return self.failure or error

    def _end_with(self, error: GroupError) -> Callable[[GroupError], None]:
        """Whom to tell, under the lock: whoever asks later hears of it from ``tell``."""
        if self._end is not None:
            return lambda error: None
        self._end = error
        return self.on_lost


class GroupGoodbye(GroupError):
    """Host 0 has stopped in order; a follower ends without a failure."""

    def __init__(self) -> None:
        """Says so."""
        super().__init__("host 0 has stopped")
