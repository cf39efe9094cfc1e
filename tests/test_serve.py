"""A server's life in this process: signals, a dead engine, a stuck one, a taken port."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jaxserve.serve as lifecycle
from jaxserve import Client
from jaxserve.config import GroupConfig, ServeConfig
from jaxserve.errors import EngineDeadError, JaxserveError, LaunchError
from jaxserve.frontend.client import RetryPolicy
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.http.config import Doors
from jaxserve.launch import Service
from jaxserve.serve import StopSignals, check_port, serve, shut_down


def tiny_config(**fields: Any) -> ServeConfig:
    settings: dict[str, Any] = {
        "model": "dummy:tiny-llama",
        "device": "cpu",
        "dtype": "float32",
        "context_tokens": 256,
        "max_rows": 4,
        "step_tokens": 16,
        "kv_memory_bytes": 4 * 2**20,
        "prompt_logprobs": False,
        "assets_dir": Path("unused"),
        "cache_dir": Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
        **fields,
    }
    return ServeConfig(**settings)


class Visitor:
    """Asks for one long answer from a thread, as soon as the server is ready."""

    def __init__(self, before: Callable[[Service], None]) -> None:
        self.outcome: Any = None
        self._before = before
        self._thread: threading.Thread | None = None

    def __call__(self, service: Service, doors: Doors) -> None:
        self._before(service)
        self._thread = threading.Thread(target=self._ask, args=(doors.grpc,))
        self._thread.start()

    def join(self) -> Any:
        assert self._thread is not None
        self._thread.join(60)
        return self.outcome

    def _ask(self, address: str) -> None:
        with Client(address, retry=RetryPolicy(attempts=1)) as client:
            try:
                self.outcome = client.generate("Hello", max_tokens=20, ignore_eos=True)
            except JaxserveError as error:
                self.outcome = error


def never(number: int) -> None:
    raise AssertionError(f"signal {number} came before ready")


@pytest.mark.slow
def test_a_dead_engine_ends_the_server_with_its_reason_and_its_streams_with_an_error() -> None:
    def sabotage(service: Service) -> None:
        def die(inputs: object) -> None:
            raise SystemExit("the device is on fire")  # No step failure: the thread ends.

        service.runner.dispatch = die  # pyright: ignore[reportAttributeAccessIssue]

    visitor = Visitor(sabotage)
    ended = serve(tiny_config(), ServerConfig(port=0), on_ready=visitor, before_ready=never)
    assert ended.failure is not None
    assert "the device is on fire" in ended.failure
    assert ended.clean
    assert isinstance(visitor.join(), EngineDeadError)


@pytest.mark.slow
def test_an_engine_without_progress_ends_the_server_although_its_thread_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle, "CLOSE_LIMIT_S", 0.5)
    monkeypatch.setattr(lifecycle, "FAILURE_GRACE_S", 0.1)
    release = threading.Event()
    services: list[Service] = []

    def sabotage(service: Service) -> None:
        services.append(service)
        dispatch = service.runner.dispatch

        def hang(inputs: Any) -> Any:
            release.wait(60)
            return dispatch(inputs)

        service.runner.dispatch = hang  # pyright: ignore[reportAttributeAccessIssue]

    visitor = Visitor(sabotage)
    config = tiny_config(watchdog_s=0.3)
    ended = serve(config, ServerConfig(port=0), on_ready=visitor, before_ready=never)
    release.set()
    assert ended.failure is not None
    assert "no step has finished for" in ended.failure
    assert "--watchdog-s 0.3" in ended.failure
    assert not ended.clean
    assert isinstance(visitor.join(), JaxserveError)
    services[0].close()


@pytest.mark.slow
def test_ctrl_c_ends_the_server_without_a_failure() -> None:
    def interrupt(service: Service) -> None:
        signal.raise_signal(signal.SIGINT)

    previous = signal.getsignal(signal.SIGINT)
    ended = serve(
        tiny_config(),
        ServerConfig(port=0),
        on_ready=lambda service, doors: interrupt(service),
        before_ready=never,
    )
    assert ended == lifecycle.Ended(None, clean=True)
    assert signal.getsignal(signal.SIGINT) is previous


def signals_that_came(count: int) -> StopSignals:
    signals = StopSignals(never)
    signals.count = count
    return signals


def test_a_second_signal_gives_running_requests_up() -> None:
    given_up = threading.Event()
    closed: list[bool] = []
    clean = shut_down(
        lambda: closed.append(given_up.wait(60)), given_up.set, signals_that_came(2), 90.0
    )
    assert clean
    assert closed == [True]


def test_one_signal_leaves_running_requests_their_time() -> None:
    given_up: list[str] = []
    assert shut_down(lambda: None, lambda: given_up.append("x"), signals_that_came(1), 1.0)
    assert given_up == []


def test_closing_that_hangs_is_left_behind() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(60)

    assert not shut_down(hang, release.clear, signals_that_came(1), 0.2)
    release.set()


def test_a_signal_before_ready_is_handed_on_and_later_ones_are_counted() -> None:
    early: list[int] = []
    with StopSignals(early.append) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert early == [signal.SIGTERM]
        signals.ready = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert early == [signal.SIGTERM]
        assert signals.count == 3
        assert signals.wait(0.0)


def test_a_free_port_passes_and_a_taken_one_is_named() -> None:
    check_port(ServerConfig(port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"cannot listen on 127.0.0.1:{port} \(Address al"):
            check_port(ServerConfig(port=port))
    with pytest.raises(LaunchError, match=r"cannot listen on 203.0.113.1:50051 \(Cannot assign"):
        check_port(ServerConfig(host="203.0.113.1"))


@pytest.mark.slow
def test_a_port_taken_while_the_model_compiled_closes_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle, "check_port", lambda config: None)
    built: list[Service] = []
    build = lifecycle.build
    group = FakeGroup()

    def building(*args: Any, **kwargs: Any) -> Service:
        built.append(build(*args, **kwargs))
        built[-1].group = group  # pyright: ignore[reportAttributeAccessIssue]
        return built[-1]

    monkeypatch.setattr(lifecycle, "build", building)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(port=taken.getsockname()[1])
        with pytest.raises(LaunchError, match="cannot listen on"):
            serve(tiny_config(), config, on_ready=lambda *_: None, before_ready=never)
    assert built[0].engine.draining
    assert built[0].runner.params is None
    assert "cannot listen on" in group.goodbyes[0], "before an orderly one: followers exit with 1"


class FakeGroup:
    """Keeps what the other hosts would be told at the end."""

    def __init__(self) -> None:
        self.goodbyes: list[str] = []

    def close(self, failure: str = "") -> None:
        self.goodbyes.append(failure)


def test_a_follower_leaves_the_first_signal_to_host_0_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    early: list[int] = []
    seen: list[list[int]] = []

    def following(*args: Any, on_ready: Callable[[float], None], **kwargs: Any) -> None:
        on_ready(1.0)
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            seen.append(list(early))

    monkeypatch.setattr(lifecycle, "follow", following)
    ended = lifecycle.serve_follower(
        tiny_config(),
        GroupConfig(hosts=2, host_id=1, coordinator="127.0.0.1:1"),
        on_ready=lambda seconds: None,
        before_ready=early.append,
        on_lost=lambda error: None,
    )
    assert ended.failure is None
    assert seen == [[], [signal.SIGTERM]]
    assert caplog.messages[0].startswith("SIGTERM is left to host 0, which ends the group when it")
