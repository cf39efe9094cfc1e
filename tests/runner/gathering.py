"""Groups of hosts within one process."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxserve.config import GroupConfig
from jaxserve.runner.group import Group
from jaxserve.runner.preflight import HostFacts, join, lead

PATIENCE_S = 20.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def configs(hosts: int, **values: Any) -> list[GroupConfig]:
    defaults = {"host_timeout_s": 10.0, "join_timeout_s": 20.0, "secret": b"s"}
    shared = {**defaults, "coordinator": f"127.0.0.1:{free_port()}", **values}
    return [GroupConfig(hosts=hosts, host_id=number, **shared) for number in range(hosts)]


def facts(**changed: str) -> HostFacts:
    return HostFacts("here", "machine", {"jax": "1", "--mesh": "1x2", **changed})


def say_nothing(text: str) -> None:
    pass


def gather(group_configs: Sequence[GroupConfig]) -> list[Group]:
    with ThreadPoolExecutor(len(group_configs)) as pool:
        first = pool.submit(lead, group_configs[0], facts(), say_nothing)
        others = [pool.submit(join, each, facts(), say_nothing) for each in group_configs[1:]]
        return [future.result(PATIENCE_S) for future in (first, *others)]


def cut(group: Group) -> None:
    """Does what the kernel does for a killed process: closes its sockets, without a goodbye."""
    group.others[0].link._socket.shutdown(socket.SHUT_RDWR)
