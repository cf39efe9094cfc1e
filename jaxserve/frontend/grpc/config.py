"""Limits and times of the gRPC server, named and explained."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import is_loopback
from jaxserve.errors import ConfigError

MOST = 2_000_000.0
"""Of any number here: gRPC takes milliseconds and bytes as 32-bit integers."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the server listens on and what it puts up with."""

    host: str = "127.0.0.1"
    """Address to listen on. ``0.0.0.0`` or ``::`` opens it to the network, unencrypted."""
    port: int = 50051
    """0 lets the system choose a free one; ``Server.start`` says which."""
    max_message_bytes: int = 4 * 1024 * 1024
    """Largest request. A prompt of 128k token ids is about 400 KiB. Too small refuses long prompts
    with RESOURCE_EXHAUSTED; too large lets one client fill the memory."""
    max_concurrent_streams: int = 1024
    """RPCs at a time on one connection; more wait in the client's library without an error. Too
    small starves clients behind a proxy that shares one connection."""
    keepalive_time_s: float = 20.0
    """Silence before the server pings a client."""
    keepalive_timeout_s: float = 10.0
    """A ping without an answer for this long ends the connection, and with it its requests. Too
    small loses clients that pause; too large keeps rows for machines that are gone."""
    min_ping_interval_s: float = 10.0
    """Clients that ping more often than this are sent away (``too_many_pings``)."""
    max_connection_age_s: float = 1800.0
    """Then a client is asked to connect anew, so that a load balancer can move it. Small costs
    handshakes; large keeps clients where they are when servers are added."""
    max_connection_age_grace_s: float = 3600.0
    """How long calls may go on after that; longer than the longest answer."""
    stall_timeout_s: float = 30.0
    """A stream whose client accepts nothing for this long ends with ABORTED, reason SLOW_READER.
    Too small ends clients that pause to think; too large keeps rows busy for nobody."""
    grace_s: float = 120.0
    """How long ``stop`` lets running requests finish. More than the load balancer needs to notice
    NOT_SERVING; the longest answer at best."""
    health_interval_s: float = 0.5
    """Time between two looks at the engine's health; how late grpc.health.v1 may be."""
    tokenizer_threads: int = 2
    """Threads for long prompts and chat templates."""

    def __post_init__(self) -> None:
        """Refuses what cannot work, all problems together."""
        problems = []
        if not 0 <= self.port <= 65_535:
            problems.append(f"port must be 0 to 65535, got {self.port}")
        if not 0 < self.max_message_bytes < 2**31:
            problems.append(
                f"max_message_bytes must be above 0 and below 2 GiB, got {self.max_message_bytes}"
            )
        if not self.host:
            problems.append("host is empty; use 127.0.0.1 for this machine only")
        positive = (
            "max_concurrent_streams",
            "keepalive_time_s",
            "keepalive_timeout_s",
            "min_ping_interval_s",
            "max_connection_age_s",
            "max_connection_age_grace_s",
            "stall_timeout_s",
            "health_interval_s",
            "tokenizer_threads",
        )
        problems += [
            f"{name} must be above 0 and at most {MOST:g}, got {getattr(self, name):g}"
            for name in positive
            if not 0 < getattr(self, name) <= MOST
        ]
        if not 0 <= self.grace_s <= MOST:
            problems.append(
                f"grace_s must be at least 0 and at most {MOST:g}, got {self.grace_s:g}"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def address(self) -> str:
        """Host and port as gRPC takes them."""
        return self.address_of(self.port)

    def address_of(self, port: int) -> str:
        """The host with another port; IPv6 addresses in brackets."""
        bare_ipv6 = ":" in self.host and not self.host.startswith("[")
        return f"[{self.host}]:{port}" if bare_ipv6 else f"{self.host}:{port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host.strip("[]"))

    def channel_options(self) -> list[tuple[str, int]]:
        """Returns these limits under gRPC's own names."""
        return [
            # Without this a second server on the same port would start and take half the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.keepalive_time_ms", round(self.keepalive_time_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_connection_age_ms", round(self.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", round(self.max_connection_age_grace_s * 1000)),
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                round(self.min_ping_interval_s * 1000),
            ),
        ]
