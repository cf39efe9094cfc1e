"""One authenticated stream between two hosts of a group: framing, message codes, heartbeats.

    preamble   both: MAGIC, version (2 bytes), nonce (16 bytes)
    frame      both: length of the message (4 bytes), code (16 bytes), message (an ``Envelope``)

The code is keyed BLAKE2b (RFC 7693) over direction, frame number and message, under a key made
from the group's secret and both nonces: a stream cannot be forged, replayed, reordered or cut in
the middle without being noticed. Nothing is encrypted; a plan says which tokens are computed, so
hosts belong on a network of their own. Lengths are checked before anything is allocated.

Messages are read by a thread of the link's own, which also answers for the other side's life: a
peer from which nothing comes for the timeout is lost, whatever the reason.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from google.protobuf.message import DecodeError

from jaxserve.errors import GroupError
from jaxserve.internal.v1 import group_pb2 as pb

MAGIC = b"JAXSERVE"
VERSION = 1
"""Of preamble, frames and messages; raised with every change of one of them."""
MAX_FRAME_BYTES = 64 * 2**20
"""A step that sets the dense state of 64 rows of a large vocabulary has about that much."""
MAX_HELLO_BYTES = 64 * 2**10
"""Of a frame before the peer has shown that it knows the secret."""
HEARTBEATS_PER_TIMEOUT = 5
_PREAMBLE = struct.Struct(f">{len(MAGIC)}sH16s")
_LENGTH = struct.Struct(">I")
_COUNTER = struct.Struct(">BQ")
_CODE_BYTES = 16


class Link:
    """A connected stream. Any thread may send; ``on_message`` and ``on_lost`` run on the link's."""

    def __init__(
        self, connection: socket.socket, *, secret: bytes, leads: bool, timeout_s: float
    ) -> None:
        """Exchanges preambles; starts no thread.

        Args:
            connection: connected; the link owns it from here on.
            secret: known to every host of the group.
            leads: whether this side is host 0.
            timeout_s: silence that counts as loss. The greeting, which ends with the other side's
                first message, may take as long in all.

        Raises:
            GroupError: the other side speaks another version, or nothing of this kind.
        """
        self._socket = connection
        self._leads = leads
        self._timeout_s = timeout_s
        self._send_lock = threading.Lock()
        self._sent = self._received = 0
        self._most_bytes = MAX_HELLO_BYTES
        self._closed = threading.Event()
        self._greeted_by: float | None = time.monotonic() + timeout_s
        """None once the peer has shown that it knows the secret."""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(timeout_s)
            nonce = secrets.token_bytes(16)
            connection.sendall(_PREAMBLE.pack(MAGIC, VERSION, nonce))
            theirs = _read_preamble(self._receive(_PREAMBLE.size))
        except OSError as error:
            connection.close()
            raise GroupError(f"no greeting came: {error}") from error
        except GroupError:
            connection.close()
            raise
        nonces = nonce + theirs if leads else theirs + nonce
        self._key = hashlib.blake2b(nonces, key=hashlib.sha256(secret).digest()).digest()

    def send(self, message: pb.Envelope) -> None:
        """Sends one message; may block while the peer's buffer is full, up to the timeout.

        Raises:
            GroupError: it is too long, or the stream is broken.
        """
        data = message.SerializeToString()
        if len(data) > MAX_FRAME_BYTES:
            raise GroupError(f"a message of {len(data)} bytes is over {MAX_FRAME_BYTES}")
        with self._send_lock:
            code = self._code(data, self._sent, from_leader=self._leads)
            self._sent += 1
            try:
                self._socket.sendall(_LENGTH.pack(len(data)) + code + data)
            except OSError as error:
                raise GroupError(_describe(error, self._timeout_s)) from error

    def receive(self) -> pb.Envelope:
        """Waits for one message; on the thread that reads, or before there is one.

        Raises:
            GroupError: nothing came, the stream ended, or it does not hold what it should.
        """
        try:
            (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
            if length > self._most_bytes:
                raise GroupError(f"a message of {length} bytes came; {self._most_bytes} may")
            code = self._receive(_CODE_BYTES)
            data = self._receive(length)
        except OSError as error:
            raise GroupError(_describe(error, self._timeout_s)) from error
        expected = self._code(data, self._received, from_leader=not self._leads)
        if not hmac.compare_digest(code, expected):
            raise GroupError("a message's code is wrong: is the group's secret the same here?")
        self._received += 1
        if self._greeted_by is not None:
            self._greeted_by = None
            self._most_bytes = MAX_FRAME_BYTES
            self._socket.settimeout(self._timeout_s)
        try:
            return pb.Envelope.FromString(data)
        except DecodeError as error:
            raise GroupError(f"a message cannot be read: {error}") from error

    def start(
        self, on_message: Callable[[pb.Envelope], None], on_lost: Callable[[GroupError], None]
    ) -> None:
        """Reads on a thread from now on, and sends heartbeats from another.

        Args:
            on_message: called with everything but heartbeats; what it raises loses the link.
            on_lost: called once, unless the link was closed here.
        """

        def read() -> None:
            try:
                while True:
                    message = self.receive()
                    if message.WhichOneof("body") != "heartbeat":
                        on_message(message)
            except Exception as error:
                if not self._closed.is_set():
                    self._closed.set()
                    on_lost(_lost_by(error))

        def beat() -> None:
            message = pb.Envelope(heartbeat=pb.Heartbeat())
            # The reader finds out what is wrong when sending fails.
            with suppress(GroupError):
                while not self._closed.wait(self._timeout_s / HEARTBEATS_PER_TIMEOUT):
                    self.send(message)

        for name, run in (("read", read), ("heartbeat", beat)):
            threading.Thread(target=run, name=f"jaxserve-group-{name}", daemon=True).start()

    def close(self) -> None:
        """Ends the stream; the other side hears of it at once. Safe to call again."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            if self._greeted_by is not None:
                # A stranger that sends a byte now and then must not hold the place of a host.
                left_s = self._greeted_by - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError("timed out")
                self._socket.settimeout(left_s)
            part = self._socket.recv(min(count - len(parts), 2**20))
            if not part:
                raise ConnectionResetError("the other side closed the connection")
            parts += part
        return bytes(parts)

    def _code(self, data: bytes, number: int, *, from_leader: bool) -> bytes:
        code = hashlib.blake2b(
            _COUNTER.pack(from_leader, number), key=self._key, digest_size=_CODE_BYTES
        )
        code.update(data)
        return code.digest()


def _read_preamble(data: bytes) -> bytes:
    magic, version, nonce = _PREAMBLE.unpack(data)
    if magic != MAGIC:
        raise GroupError("what answers there is not a jaxserve host; check --coordinator")
    if version != VERSION:
        raise GroupError(
            f"it speaks version {version} of the group's protocol and this host {VERSION}; "
            "install one version of jaxserve on every host"
        )
    return nonce


def _lost_by(error: Exception) -> GroupError:
    if isinstance(error, GroupError):
        return error
    lost = GroupError(f"a message could not be taken: {type(error).__name__}: {error}")
    lost.__cause__ = error
    return lost


def _describe(error: OSError, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {timeout_s:g} s"
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return "the connection was closed"
    return str(error)
