"""Opens ports as both doors need them."""

from __future__ import annotations

import socket


def listen_on(host: str, port: int, *, backlog: int) -> socket.socket:
    """Returns a socket that listens. ``host`` may be an IPv6 address in brackets.

    Raises:
        OSError: the address cannot be listened on.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # Connections of an earlier server that linger are no obstacle.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        bound.listen(backlog)
    except OSError:
        bound.close()
        raise
    return bound
