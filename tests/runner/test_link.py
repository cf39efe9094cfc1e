"""The stream between hosts over real sockets: what a stranger, a thief and a dead peer come to."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

import pytest

from jaxserve.errors import GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner import link
from jaxserve.runner.link import MAX_FRAME_BYTES, MAX_HELLO_BYTES, Link

PATIENCE_S = 10.0


@pytest.fixture
def connect() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Makes connected pairs, and closes what a test leaves open."""
    made: list[socket.socket] = []

    def pair() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        made.extend((ours, theirs))
        return ours, theirs

    yield pair
    for each in made:
        each.close()


def greet(
    ours: socket.socket, theirs: socket.socket, *, secrets: tuple[bytes, bytes] = (b"s", b"s")
) -> tuple[Link, Link]:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Link, theirs, secret=secrets[1], leads=False, timeout_s=2.0)
        leader = Link(ours, secret=secrets[0], leads=True, timeout_s=2.0)
        return leader, other.result()


@pytest.fixture
def sockets(connect) -> tuple[socket.socket, socket.socket]:
    return connect()


def agreement(value: int) -> pb.Envelope:
    return pb.Envelope(agreement=pb.Agreement(name="n", value=value))


def test_messages_arrive_in_order_in_both_directions(sockets) -> None:
    leader, follower = greet(*sockets)
    for value in range(3):
        leader.send(agreement(value))
        follower.send(agreement(-value))
    assert [follower.receive().agreement.value for _ in range(3)] == [0, 1, 2]
    assert [leader.receive().agreement.value for _ in range(3)] == [0, -1, -2]


def test_another_secret_is_noticed_with_the_first_message(sockets) -> None:
    leader, follower = greet(*sockets, secrets=(b"one", b"two"))
    follower.send(agreement(1))
    with pytest.raises(GroupError, match="is the group's secret the same here"):
        leader.receive()


def test_a_recorded_message_cannot_be_played_again(sockets) -> None:
    ours, theirs = sockets
    leader, follower = greet(ours, theirs)
    leader.send(agreement(7))
    frame = theirs.recv(4096, socket.MSG_PEEK)
    assert follower.receive().agreement.value == 7
    ours.sendall(frame)
    with pytest.raises(GroupError, match="code is wrong"):
        follower.receive()


def test_a_message_cannot_be_sent_back_to_its_sender(sockets) -> None:
    ours, theirs = sockets
    leader, _ = greet(ours, theirs)
    leader.send(agreement(7))
    theirs.sendall(theirs.recv(4096))
    with pytest.raises(GroupError, match="code is wrong"):
        leader.receive()


def test_a_changed_byte_is_noticed(sockets) -> None:
    ours, theirs = sockets
    leader, follower = greet(ours, theirs)
    leader.send(agreement(7))
    frame = bytearray(theirs.recv(4096))
    frame[-1] ^= 1
    ours.sendall(bytes(frame))
    with pytest.raises(GroupError, match="code is wrong"):
        follower.receive()


def test_a_stranger_may_not_announce_much_before_it_is_known(sockets) -> None:
    ours, theirs = sockets
    leader, _ = greet(ours, theirs)
    theirs.sendall(struct.pack(">I", MAX_HELLO_BYTES + 1))
    with pytest.raises(
        GroupError, match=f"{MAX_HELLO_BYTES + 1} bytes came; {MAX_HELLO_BYTES} may"
    ):
        leader.receive()


def test_a_message_that_is_too_long_is_not_sent(sockets, monkeypatch) -> None:
    leader, _ = greet(*sockets)
    monkeypatch.setattr(link, "MAX_FRAME_BYTES", 10)
    with pytest.raises(GroupError, match="over 10"):
        leader.send(pb.Envelope(goodbye=pb.Goodbye(failure="x" * 20)))
    assert MAX_FRAME_BYTES == 64 * 2**20


def test_authentic_bytes_that_are_no_message_are_refused(sockets) -> None:
    ours, theirs = sockets
    leader, follower = greet(ours, theirs)
    data = b"\xff\xff\xff"
    code = follower._code(data, 0, from_leader=False)
    theirs.sendall(struct.pack(">I", len(data)) + code + data)
    with pytest.raises(GroupError, match="a message cannot be read"):
        leader.receive()


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: somewhere\r\n", "is not a jaxserve host; check --coordinator"),
        (struct.pack(">8sH16s", b"JAXSERVE", 9, b""), "version 9 .* and this host 1; install one"),
        (b"", "no greeting came"),
    ],
    ids=["http", "version", "silence"],
)
def test_what_does_not_greet_is_refused(sockets, greeting: bytes, message: str) -> None:
    ours, theirs = sockets
    theirs.sendall(greeting)
    with pytest.raises(GroupError, match=message):
        Link(ours, secret=b"", leads=True, timeout_s=0.3)


def dribble(connection: socket.socket, data: bytes, every_s: float) -> None:
    with suppress(OSError):
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(every_s)


def test_a_stranger_that_greets_byte_by_byte_has_no_more_time(sockets) -> None:
    ours, theirs = sockets
    slow = threading.Thread(target=dribble, args=(theirs, b"JAXSERVE", 0.25))
    slow.start()
    start = time.monotonic()
    with pytest.raises(GroupError, match="no greeting came: timed out"):
        Link(ours, secret=b"", leads=True, timeout_s=0.5)
    assert time.monotonic() - start < 1.0
    theirs.close()
    slow.join()


def test_a_first_message_that_comes_byte_by_byte_has_no_more_time(connect) -> None:
    ours, theirs = connect()
    theirs.sendall(struct.pack(">8sH16s", b"JAXSERVE", 1, b""))
    leader = Link(ours, secret=b"", leads=True, timeout_s=0.5)
    slow = threading.Thread(target=dribble, args=(theirs, bytes(10), 0.25))
    slow.start()
    start = time.monotonic()
    with pytest.raises(GroupError, match=r"nothing came for 0\.5 s"):
        leader.receive()
    assert time.monotonic() - start < 1.0
    theirs.close()
    slow.join()


def test_later_messages_have_a_timeout_each(connect) -> None:
    leader, follower = greet(*connect())
    follower.send(agreement(1))
    leader.receive()
    assert leader._socket.gettimeout() == 2.0


def test_heartbeats_keep_a_quiet_link_and_silence_loses_it(connect) -> None:
    ours, theirs = connect()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Link, theirs, secret=b"", leads=False, timeout_s=0.5)
        leader = Link(ours, secret=b"", leads=True, timeout_s=0.5)
        follower = other.result()
    lost: SimpleQueue[GroupError] = SimpleQueue()
    stopped = threading.Event()
    leader.start(lambda message: None, lost.put)
    # The follower answers by hand, as long as it lives.
    beat = pb.Envelope(heartbeat=pb.Heartbeat())
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        follower.send(beat)
        assert follower.receive().WhichOneof("body") == "heartbeat"
    assert lost.empty(), "three timeouts have passed with nothing but heartbeats"
    stopped.set()
    assert str(lost.get(timeout=PATIENCE_S)) == "nothing came for 0.5 s"
    leader.close()
    follower.close()


def test_a_peer_that_closes_is_lost_at_once_and_one_that_we_close_is_not(connect) -> None:
    lost: SimpleQueue[GroupError] = SimpleQueue()
    leader, follower = greet(*connect())
    leader.start(lambda message: None, lost.put)
    follower.close()
    assert str(lost.get(timeout=PATIENCE_S)) == "the connection was closed"

    leader, follower = greet(*connect())
    leader.start(lambda message: None, lost.put)
    leader.close()
    leader.close()
    with pytest.raises(GroupError):
        follower.receive()
    assert lost.empty()


def test_a_handler_that_refuses_a_message_loses_the_link(connect) -> None:
    lost: SimpleQueue[GroupError] = SimpleQueue()
    leader, follower = greet(*connect())

    def refuse(message: pb.Envelope) -> None:
        raise GroupError("not now")

    leader.start(refuse, lost.put)
    follower.send(agreement(1))
    assert str(lost.get(timeout=PATIENCE_S)) == "not now"
    leader.close()
    follower.close()


def test_a_handler_that_breaks_on_a_message_loses_the_link_too(connect) -> None:
    lost: SimpleQueue[GroupError] = SimpleQueue()
    leader, follower = greet(*connect())

    def stumble(message: pb.Envelope) -> None:
        raise ValueError("no such row")

    leader.start(stumble, lost.put)
    follower.send(agreement(1))
    error = lost.get(timeout=PATIENCE_S)
    assert str(error) == "a message could not be taken: ValueError: no such row"
    assert isinstance(error.__cause__, ValueError)
    leader.close()
    follower.close()


def test_sending_to_a_peer_that_is_gone_says_so(connect) -> None:
    leader, follower = greet(*connect())
    follower.close()

    def send_on() -> None:
        for _ in range(100):
            leader.send(agreement(1))
            time.sleep(0.01)

    with pytest.raises(GroupError, match="the connection was closed"):
        send_on()
    leader.close()
