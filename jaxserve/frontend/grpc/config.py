"""Limits and times of the gRPC server, named and explained."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the server listens on and what it puts up with."""

    host: str = "127.0.0.1"
    """Address to listen on. ``0.0.0.0`` or ``[::]`` opens it to the network, unencrypted."""
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
        if not self.host:
            problems.append("host is empty; use 127.0.0.1 for this machine only")
        positive = (
            "max_message_bytes",
            "max_concurrent_streams",
            "keepalive_time_s",
            "keepalive_timeout_s",
            "min_ping_interval_s",
            "stall_timeout_s",
            "health_interval_s",
            "tokenizer_threads",
        )
        problems += [
            f"{name} must be above 0, got {getattr(self, name):g}"
            for name in positive
            if not getattr(self, name) > 0
        ]
        if self.grace_s < 0:
            problems.append(f"grace_s must be at least 0, got {self.grace_s:g}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def address(self) -> str:
        """Host and port as gRPC takes them."""
        return f"{self.host}:{self.port}"

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
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                round(self.min_ping_interval_s * 1000),
            ),
        ]
