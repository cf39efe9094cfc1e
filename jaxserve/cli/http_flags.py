"""The flags of the HTTP door."""

from __future__ import annotations

import argparse

from jaxserve.errors import ConfigError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.http.config import HttpConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--http-port",
        metavar="PORT",
        help=f"serve OpenAI's routes over HTTP here, on the same --host; 0 takes any free port, "
        f"none opens no HTTP door (default: {HttpConfig.port}, but 0 when --port is 0)",
    )
    group.add_argument(
        "--http-allowed-hosts",
        metavar="NAMES",
        default="",
        help="names, with commas between them, that a request's Host header may have (default: "
        "this machine's own names; any, when --host is reached by others)",
    )


def read_config(options: argparse.Namespace, server: ServerConfig) -> HttpConfig | None:
    """Makes the config; None opens no HTTP door.

    Raises:
        ConfigError: the port is no number, or out of range.
    """
    asked = options.http_port
    if asked == "none":
        return None
    if asked is None:
        port = HttpConfig.port if server.port else 0
    elif asked.isascii() and asked.isdecimal():
        port = int(asked)
    else:
        raise ConfigError(f"--http-port is {asked!r}; give a port, 0 for any free one, or none")
    names = tuple(name.strip() for name in options.http_allowed_hosts.split(",") if name.strip())
    return HttpConfig(host=server.host, port=port, allowed_hosts=names)
