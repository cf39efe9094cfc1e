"""A server's whole life in one process: build, open the port, watch, drain, exit.

    check the port -> build (launch.py) -> port open -> on_ready -> watch
        SIGTERM, SIGINT     refuse new requests, let running ones finish, close     -> no reason
        the same again      give the running ones up, close                         -> no reason
        engine dead, stuck  end the streams with an error, close                    -> the reason

The main thread only watches; the engine and the port have threads of their own.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from jaxserve.config import GroupConfig, ServeConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import GroupError, LaunchError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread, port_problem
from jaxserve.frontend.http.config import Doors, HttpConfig
from jaxserve.frontend.http.server import listen
from jaxserve.launch import OnLost, Report, Service, build, follow, silent

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""How late a signal or a failure may be noticed."""
FAILURE_GRACE_S = 1.0
"""For streams to hear of a dead engine."""
CLOSE_LIMIT_S = 10.0
"""Closing may take this much longer than its grace period; then the process exits regardless."""


@dataclass(frozen=True)
class Ended:
    """How a server ended."""

    failure: str | None
    """Why it could not go on; None after a signal."""
    clean: bool
    """False when a thread hangs, or may hang because another host is gone: only ``os._exit`` is
    sure to end the process."""
    compiling: bool = False
    """Not clean only because a program is still being compiled, which nobody waits for any more."""


class StopSignals:
    """Counts SIGTERM and SIGINT while its block runs, in the main thread."""

    def __init__(self, before_ready: Callable[[int], None]) -> None:
        """Makes it; ``before_ready`` is called with signals that come before ``ready`` is set."""
        self.count = 0
        self.ready = False
        self._before_ready = before_ready
        self._previous: dict[int, Any] = {}

    def wait(self, timeout_s: float) -> bool:
        """Waits so long, unless one came before; says whether one has come."""
        if not self.count:
            time.sleep(timeout_s)  # Not on an Event: its lock may be held where a handler runs.
        return bool(self.count)

    def __enter__(self) -> StopSignals:
        """Takes the signals over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.ready:
            self._before_ready(number)
        self.count += 1


def serve(
    config: ServeConfig,
    server_config: ServerConfig,
    *,
    http_config: HttpConfig | None = None,
    on_ready: Callable[[Service, Doors], None],
    before_ready: Callable[[int], None],
    on_lost: OnLost = lambda error: None,
    hosts: GroupConfig | None = None,
    report: Report = silent,
) -> Ended:
    """Serves until a signal comes or the engine fails. In the main thread, of host 0.

    Args:
        config: what to build.
        server_config: where to listen.
        http_config: where to listen for HTTP; None does not.
        on_ready: called with the service and its addresses once requests are taken.
        before_ready: called with the number of a signal that comes earlier; should exit.
        on_lost: called when another host is lost before ready; should exit.
        hosts: the hosts of the mesh, when there are several.
        report: hears of the progress of the build.

    Raises:
        LaunchError: a flag, a file, the machine or the port has to change.
    """
    check_port(server_config)
    if http_config is not None:
        listen(http_config).close()
    with StopSignals(before_ready) as signals:
        service = build(
            config, report, hosts=hosts, on_lost=on_lost, measure=True, eager_grammars=True
        )
        server = ServerThread(service.text, service.info, server_config, http_config)
        try:
            address = server.start()
        except LaunchError as error:
            if service.group is not None:
                service.group.close(str(error))
            service.close()
            raise
        signals.ready = True
        on_ready(service, Doors(address, server.http_address))
        failure = watch(service.engine, signals)
        grace_s = server_config.grace_s if failure is None else FAILURE_GRACE_S

        def close() -> None:
            if service.late is not None:
                service.late.cancel()  # A program that is being compiled ends beside the grace.
            server.stop(grace_s)
            if service.group is not None:
                service.group.close(failure or "")
                if failure is not None:
                    return  # The device may wait for a lost host for ever.
            service.close()

        # An engine that stops cancels what runs: the streams end, and the grace period with them.
        clean = shut_down(close, service.engine.stop, signals, grace_s + CLOSE_LIMIT_S)
        late = service.late
        compiling = not clean and failure is None and late is not None and late.busy
        return Ended(failure, clean and service.group is None, compiling)


def serve_follower(
    config: ServeConfig,
    hosts: GroupConfig,
    *,
    on_ready: Callable[[float], None],
    before_ready: Callable[[int], None],
    on_lost: OnLost,
    report: Report = silent,
) -> Ended:
    """Executes the steps of host 0 until it stops or the group fails. In the main thread.

    The first SIGTERM or SIGINT after that is left to host 0, which whoever stops a group signals
    too: it lets requests finish. A second one ends this host, and with it the group.

    Args:
        config: the same as on host 0.
        hosts: the hosts of the mesh.
        on_ready: called with the seconds that it took, once steps can be taken.
        before_ready: called with the number of a signal that comes earlier, or again; should exit.
        on_lost: called when host 0 is lost, at any time; should exit.
        report: hears of the progress of the build.

    Raises:
        LaunchError: a flag, a file or the machine has to change.
        GroupError: a host did not come.
    """
    left_to_host_0 = False
    is_ready = False

    def stop(number: int) -> None:
        nonlocal left_to_host_0
        if not is_ready or left_to_host_0:
            before_ready(number)
            return
        left_to_host_0 = True
        logger.warning(
            "%s is left to host 0, which ends the group when it stops; a second one ends it now",
            signal.Signals(number).name,
        )

    def ready(seconds: float) -> None:
        nonlocal is_ready
        is_ready = True
        on_ready(seconds)

    with StopSignals(stop):
        try:
            follow(config, hosts, report, on_ready=ready, on_lost=on_lost)
        except GroupError as error:
            return Ended(str(error), clean=False)
    return Ended(None, clean=False)


def check_port(config: ServerConfig) -> None:
    """Finds out that a port is taken before a minute is spent on compiling.

    Raises:
        LaunchError: it cannot be listened on.
    """
    if problem := port_problem(config):
        raise LaunchError(problem)


def watch(engine: Engine, signals: StopSignals) -> str | None:
    """Waits for a signal, or for the engine to die or to stop making progress.

    Returns:
        Why the engine cannot go on; None after a signal.
    """
    while not signals.wait(POLL_S):
        if engine.dead is not None:
            return engine.health().detail
        age_s = engine.stats().last_step_age_seconds
        if age_s > engine.limits.watchdog_s:
            return (
                f"no step has finished for {age_s:.0f} s while work is waiting, and the limit is "
                f"--watchdog-s {engine.limits.watchdog_s:g}"
            )
    return None


def shut_down(
    close: Callable[[], None],
    give_up: Callable[[], None],
    signals: StopSignals,
    limit_s: float,
) -> bool:
    """Closes everything on another thread; a second signal gives running requests up.

    Args:
        close: waits for running requests as long as it likes, within the limit.
        give_up: cancels them, so that ``close`` has nothing to wait for.
        signals: is counting.
        limit_s: how long all of this may take.

    Returns:
        Whether everything has ended, rather than hangs.
    """
    closing = threading.Thread(target=close, name="jaxserve-close", daemon=True)
    closing.start()
    hurried = False
    while closing.is_alive() and limit_s > 0:
        closing.join(POLL_S)
        limit_s -= POLL_S
        if signals.count > 1 and not hurried:
            hurried, limit_s = True, CLOSE_LIMIT_S
            threading.Thread(target=give_up, daemon=True).start()
    return not closing.is_alive()
