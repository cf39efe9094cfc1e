"""The hosts of a mesh as processes of their own, for tests that ask, stop and kill them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.frontend import client_wire as wire
from jaxserve.frontend.client_stubs import Stubs
from jaxserve.frontend.client_types import GenerateOptions

MODEL = "dummy:tiny-llama"
SIZES: dict[str, object] = {
    "max_rows": 8,
    "step_tokens": 32,
    "page_tokens": 32,
    "context_tokens": 512,
    "kv_memory_bytes": 4 * 2**20,
    "prompt_logprobs": False,
}
"""Of every group and of the service on one device that it is compared with: six programs."""
FLAGS = [
    *("--dtype", "float32", "--max-rows", "8", "--step-tokens", "32", "--page-tokens", "32"),
    *("--context-tokens", "512", "--kv-memory", "4MiB", "--no-prompt-logprobs"),
]
READY_S = 240.0
"""For a machine that is busy and has compiled nothing yet; twelve seconds when it has."""
END_S = 20.0
"""For a process that was killed, or has nothing left to do."""
PROBE_S = 1.0
PAUSE_S = 0.02
LONG = GenerateOptions(max_tokens=480, temperature=0.0, ignore_eos=True)
"""Takes several seconds, so that what happens meanwhile happens in its middle."""
PROVE = (
    pytest.mark.prove,
    pytest.mark.skipif(
        os.environ.get("JAXSERVE_PROVE_HOSTS") != "1", reason="runs in `make prove-hosts`"
    ),
)
"""Marks of what would make the default run too long."""
DEVICES = {"1x4": "cpu:2", "2x4": "cpu:4", "1x8": "cpu:4"}
"""Of each host, by mesh."""
GLOO_WORDS = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. Expected number of connected peer ranks is : "
    r"|\[host \d\] .*"
)
"""Every device writes "Rank A is connected to B peer ranks. Expected ... is : B" word by word, so
that lines of two devices, and of the launch itself, run into each other."""


def prove(test: Any) -> Any:
    """Marks a test as one that runs in `make prove-hosts` alone."""
    for mark in PROVE:
        test = mark(test)
    return test


def wait_until(condition: Callable[[], bool], within_s: float, what: Callable[[], str]) -> float:
    """Returns the time at which a condition held; fails the test when it does not in time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s:g} s: {what()}")
        time.sleep(PAUSE_S)
    return time.monotonic()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class HostProcess:
    """One host's `jaxserve launch`, with its output in two files."""

    def __init__(
        self, host_id: int, command: Sequence[str], directory: Path, environment: Mapping[str, str]
    ) -> None:
        self.host_id = host_id
        self._out = directory / f"host{host_id}.out"
        self._err = directory / f"host{host_id}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | environment,
                start_new_session=True,
            )
        self.ended_at = 0.0
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        self.process.wait()
        self.ended_at = time.monotonic()

    @property
    def status(self) -> int | None:
        """Of its exit; None while it runs."""
        return self.process.returncode if self.ended_at else None

    @property
    def ready_lines(self) -> list[str]:
        """One for each time that it became ready."""
        return re.findall(r"^ready .*$", self._out.read_text(), re.MULTILINE)

    @property
    def errors(self) -> str:
        """Everything on stderr."""
        return self._err.read_text()

    @property
    def failure(self) -> str:
        """The last line on stderr that names an error."""
        found = re.findall(
            rf"^(?:\[host {self.host_id}\] )?error: (.*)$", self.errors, re.MULTILINE
        )
        return found[-1] if found else ""

    @property
    def gloo_numbers(self) -> str:
        """The digits of every line of Gloo's, sorted: its rank, and twice how many peers it met."""
        lines = (self.errors + self._out.read_text()).splitlines()
        left = [GLOO_WORDS.sub("", line) for line in lines]
        return "".join(sorted("".join(line for line in left if line.isdigit())))

    def __str__(self) -> str:
        return (
            f"--- host {self.host_id}, status {self.status}\n{self._out.read_text()[-1000:]}\n"
            f"{self.errors[-4000:]}"
        )


class OpenStream:
    """A long request, read on a thread until it ends."""

    def __init__(self, stubs: Stubs, token_ids: Sequence[int], options: GenerateOptions) -> None:
        self.tokens = 0
        self.finished = False
        self.error: grpc.RpcError | None = None
        self.ended_at = 0.0
        request = wire.generate_request(None, token_ids, None, options)
        self._thread = threading.Thread(
            target=self._read, args=(stubs.generation.Generate, request), daemon=True
        )
        self._thread.start()

    def _read(self, method: Any, request: object) -> None:
        try:
            for response in method(request, timeout=READY_S):
                self.tokens += len(response.delta.token_ids)
                self.finished = response.HasField("finished")
        except grpc.RpcError as error:
            self.error = error
        self.ended_at = time.monotonic()

    @property
    def code(self) -> grpc.StatusCode | None:
        """Of the error that ended it."""
        return None if self.error is None else self.error.code()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def details(self) -> str:
        """The message of that error."""
        if self.error is None:
            return ""
        return self.error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]


class HostGroup:
    """Every host of a mesh on this machine. Killed at the end of its block, whatever happened."""

    def __init__(
        self,
        directory: Path,
        cache_dir: Path,
        *,
        mesh: str = "1x4",
        hosts: Sequence[int] = (0, 1),
        flags: Sequence[str] = (),
        flags_of: Mapping[int, Sequence[str]] | None = None,
        environment: Mapping[int, Mapping[str, str]] | None = None,
        prefix_of: Mapping[int, Sequence[str]] | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        """Prepares it; see ``start``.

        Args:
            directory: for their output.
            cache_dir: of compiled programs.
            mesh: over both hosts.
            hosts: which of the two are started.
            flags: for both, after those of every group.
            flags_of: for one, after all others.
            environment: for one.
            prefix_of: a command that runs one, such as `ip netns exec NAME`.
            address: of host 0.
        """
        port = free_port()
        self.address = f"{address}:{port}"
        self.coordinator = f"{address}:{free_port()}"
        self.hosts: dict[int, HostProcess] = {}
        self._channels: list[grpc.Channel] = []
        self._directory = directory
        self._commands: dict[int, list[str]] = {}
        self._environments: dict[int, dict[str, str]] = {}
        for host_id in hosts:
            self._commands[host_id] = [
                *(prefix_of or {}).get(host_id, ()),
                *(sys.executable, "-m", "jaxserve", "launch", MODEL, "--mesh", mesh),
                *("--device", DEVICES[mesh], "--hosts", "2", "--host-id", str(host_id)),
                *("--coordinator", self.coordinator, "--port", str(port), "--http-port", "none"),
                *(*FLAGS, *flags, *(flags_of or {}).get(host_id, ())),
            ]
            own = (environment or {}).get(host_id, {})
            self._environments[host_id] = {"JAXSERVE_CACHE": str(cache_dir), **own}

    def start(self) -> None:
        """Starts the processes."""
        for host_id, command in self._commands.items():
            environment = self._environments[host_id]
            self.hosts[host_id] = HostProcess(host_id, command, self._directory, environment)

    # -- while it runs -----------------------------------------------------------------------------

    def wait_ready(self, times: int = 1) -> float:
        """Waits until every host has become ready so many times; returns when that was."""

        def is_ready() -> bool:
            for host in self.hosts.values():
                if host.status is not None:
                    pytest.fail(f"host {host.host_id} ended before it was ready:\n{self}")
            return all(len(host.ready_lines) >= times for host in self.hosts.values())

        return wait_until(is_ready, READY_S, lambda: f"ready\n{self}")

    @property
    def is_whole(self) -> bool:
        """Whether every host's process runs."""
        return all(host.status is None for host in self.hosts.values())

    def open_streams(self, count: int, options: GenerateOptions = LONG) -> list[OpenStream]:
        """Asks for long answers and waits until each has begun."""
        channel = grpc.insecure_channel(self.address)
        self._channels.append(channel)
        streams = [
            OpenStream(Stubs(channel), [5 + number, 6, 7], options) for number in range(count)
        ]
        wait_until(
            lambda: all(stream.tokens > 3 or stream.ended_at for stream in streams),
            READY_S,
            lambda: f"streams that have begun\n{self}",
        )
        return streams

    def wait_streams(self, streams: Sequence[OpenStream], within_s: float) -> float:
        """Waits until each has ended; returns when the last did."""
        wait_until(
            lambda: all(stream.ended_at for stream in streams),
            within_s,
            lambda: f"streams that have ended\n{self}",
        )
        return max(stream.ended_at for stream in streams)

    def health(self) -> str:
        """SERVING, NOT_SERVING, or the status of a probe without an answer."""
        with grpc.insecure_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_S)
            except grpc.RpcError as error:
                return error.code().name  # pyright: ignore[reportAttributeAccessIssue]
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def signal(self, host_id: int, number: int) -> float:
        """Sends a signal to the process of a host; returns when that was."""
        os.kill(self.hosts[host_id].process.pid, number)
        return time.monotonic()

    def children(self, host_id: int) -> list[int]:
        """The processes that a host's process has started."""
        parent = self.hosts[host_id].process.pid
        return [pid for pid in self.left() if _parent_of(pid) == parent]

    # -- when it ends ------------------------------------------------------------------------------

    def wait_exit(self, within_s: float, *host_ids: int) -> dict[int, int | None]:
        """Waits until some hosts, or all, have ended; returns their statuses."""
        waited = [self.hosts[host_id] for host_id in host_ids or self.hosts]
        wait_until(
            lambda: all(host.status is not None for host in waited),
            within_s,
            lambda: f"exit\n{self}",
        )
        return {host.host_id: host.status for host in waited}

    def left(self) -> list[int]:
        """Every process that has this group's coordinator among its arguments."""
        marker = self.coordinator.encode()
        return [pid for pid in _pids() if marker in _arguments(pid)]

    def wait_nothing_left(self) -> None:
        """Waits until no process of the group is there, whoever started it."""
        wait_until(lambda: not self.left(), END_S, lambda: f"gone: processes {self.left()}")

    def close(self) -> None:
        """Kills what is left and makes sure that it is gone."""
        for channel in self._channels:
            channel.close()
        # Those that may start another first.
        for host in self.hosts.values():
            host.process.kill()
        self.wait_exit(END_S)
        for pid in self.left():
            _kill(pid)
        self.wait_nothing_left()

    def __enter__(self) -> HostGroup:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "\n".join(str(host) for host in self.hosts.values())


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _arguments(pid: int) -> list[bytes]:
    """Nothing of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
