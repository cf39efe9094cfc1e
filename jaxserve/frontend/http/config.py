"""Limits and times of the HTTP door, named and explained."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import is_loopback
from jaxserve.errors import ConfigError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """What the HTTP door listens on and what it puts up with."""

    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's opens it to the network, unencrypted."""
    port: int = 8000
    """0 lets the system choose a free one; ``HttpServer.start`` says which."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's ``Host`` may have, without a port. Empty: on this machine's own
    addresses its own names, so that no page of another site can ask by a name of its making
    (DNS rebinding); elsewhere any."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest request. Too small refuses long prompts; too large lets a client fill the memory."""
    max_connections: int = 1024
    """More are answered with 503. Too small starves clients; too large uses up descriptors."""
    receive_timeout_s: float = 30.0
    """For a request's head, and between two parts of its body; then the connection is closed. Too
    small loses clients on slow lines; too large keeps connections that say nothing."""
    keep_alive_s: float = 75.0
    """Idle connections are closed after this; longer than a proxy keeps its own."""

    def __post_init__(self) -> None:
        """Refuses what cannot work, all problems together."""
        checks = [
            (bool(self.host), "http host is empty; use 127.0.0.1 for this machine only"),
            (0 <= self.port <= 65_535, f"http_port must be 0 to 65535, got {self.port}"),
            (self.max_body_bytes > 0, f"max_body_bytes is {self.max_body_bytes}; give more than 0"),
            (self.max_connections > 0, f"max_connections is {self.max_connections}; at least 1"),
            (
                self.receive_timeout_s > 0,
                f"receive_timeout_s is {self.receive_timeout_s:g}; give seconds above 0",
            ),
            (self.keep_alive_s > 0, f"keep_alive_s is {self.keep_alive_s:g}; seconds above 0"),
        ]
        if problems := [text for ok, text in checks if not ok]:
            raise ConfigError("; ".join(problems))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host.strip("[]"))

    @property
    def served_hosts(self) -> tuple[str, ...] | None:
        """Names that ``Host`` may have, lower case; None accepts any."""
        if self.allowed_hosts:
            return tuple(name.lower() for name in self.allowed_hosts)
        return (*LOOPBACK_NAMES, self.host.lower()) if self.is_local else None


@dataclass(frozen=True)
class Doors:
    """The addresses that a server listens on."""

    grpc: str
    http: str | None = None
    """None when no HTTP door was asked for."""
