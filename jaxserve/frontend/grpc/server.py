"""The gRPC server: assembles the services, opens the port, and closes in the right order.

    start:  health NOT_SERVING -> port open -> first look at the engine -> SERVING
    stop:   health NOT_SERVING -> engine refuses new requests -> running ones finish within the
            grace period -> the rest end as resumable UNAVAILABLE -> port closed

A ``Server`` belongs to one event loop. ``ServerThread`` gives it a loop and a thread of its own,
beside the engine's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from jaxserve.errors import DrainingError, LaunchError
from jaxserve.frontend.calls import OpenCalls
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.decoding import RequestDecoding
from jaxserve.frontend.grpc.health import HealthReporter, add_reflection
from jaxserve.frontend.grpc.kserve_servicer import KserveServicer
from jaxserve.frontend.grpc.model_servicer import AdminServicer, ModelServicer
from jaxserve.frontend.grpc.servicer import GenerationServicer
from jaxserve.frontend.grpc.vllm_servicer import VllmServicer
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.frontend.http.server import HttpServer
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.sockets import listen_on
from jaxserve.third_party.triton import grpc_service_pb2_grpc
from jaxserve.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc

CLOSE_S = 2.0
"""For ended handlers to send their statuses, after the grace period."""


class Server:
    """One port, one model. Created, started and stopped on one event loop."""

    def __init__(
        self,
        text: TextEngine,
        info: ModelInfo,
        config: ServerConfig,
        http: HttpConfig | None = None,
    ) -> None:
        """Assembles the services; no port is open yet. Needs a running event loop.

        Args:
            text: what is served.
            info: its facts.
            config: of the gRPC door.
            http: of the HTTP door; None opens none.
        """
        self.config = config
        self._engine = text.engine
        self._calls = OpenCalls(stall_timeout_s=config.stall_timeout_s)
        self._executor = ThreadPoolExecutor(config.tokenizer_threads, "jaxserve-tokenizer")
        self._health = HealthReporter(text.engine, interval_s=config.health_interval_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self._server = grpc.aio.server(
            interceptors=(RequestDecoding(),), options=config.channel_options()
        )
        door = Door(text, info, self._calls, self._executor)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(door, info, self._calls), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(text.engine, info, self._calls), self._server
        )
        self._http: HttpServer | None = None
        if http is not None:
            self._http = HttpServer(door, http)
        self.http_address: str | None = None
        """Where HTTP is served, once it is."""
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(
            VllmServicer(door, info, self._calls, tells_pages=config.is_local), self._server
        )
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            KserveServicer(door, info, self._calls), self._server
        )
        self._health.add_to(self._server)
        if config.is_local:
            # Strangers must not drain the server or look around; there are no keys to tell them by.
            admin_pb2_grpc.add_AdminServiceServicer_to_server(
                AdminServicer(text.engine, info, self._calls, drain=self.drain), self._server
            )
            add_reflection(self._server)

    async def start(self) -> str:
        """Opens the port and returns the bound address, such as ``127.0.0.1:50051``.

        Raises:
            LaunchError: the port cannot be opened.
        """
        config = self.config
        try:
            port = self._server.add_insecure_port(config.address)
        except RuntimeError:
            self._executor.shutdown()
            problem = port_problem(config) or _cannot_listen(config, "gRPC gives no reason")
            raise LaunchError(problem) from None
        try:
            if self._http is not None:
                self.http_address = await self._http.start()
        except LaunchError:
            self._executor.shutdown()
            await self._server.stop(0)
            raise
        await self._server.start()
        await self._health.refresh()
        self._tasks = [
            asyncio.create_task(self._health.watch()),
            asyncio.create_task(self._calls.watch_stalls()),
        ]
        return config.address_of(port)

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on. Loop's thread only."""
        self._engine.drain()
        if not self._draining:
            self._draining = True
            self._tasks.append(asyncio.create_task(self._health.shut_down()))

    async def stop(self, grace_s: float | None = None) -> None:
        """Closes in the order at the top of this file. The engine itself goes on running.

        Args:
            grace_s: how long running requests may take to finish; None takes the configured time.
        """
        await self._health.shut_down()
        self._engine.drain()
        self._calls.end_all(DrainingError(), counts=False)
        await self._calls.wait_none(self.config.grace_s if grace_s is None else grace_s)
        self._calls.end_all(DrainingError())
        await self._calls.wait_none(CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(0)
        if self._http is not None:
            await self._http.stop()
        self._executor.shutdown()


class ServerThread:
    """A server with a thread and an event loop of its own; for processes that do other things."""

    def __init__(
        self,
        text: TextEngine,
        info: ModelInfo,
        config: ServerConfig,
        http: HttpConfig | None = None,
    ) -> None:
        """Prepares the thread; nothing runs yet. Arguments as of ``Server``."""
        self._parts = (text, info, config, http)
        self.http_address: str | None = None
        """Where HTTP is served, once it is."""
        self._started: Future[str] = Future()
        self._stop: asyncio.Future[float | None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._run, name="jaxserve-grpc", daemon=True)

    def start(self) -> str:
        """Starts the server and returns the bound address.

        Raises:
            LaunchError: the port cannot be opened.
        """
        self._thread.start()
        return self._started.result()

    def stop(self, grace_s: float | None = None) -> None:
        """Stops as ``Server.stop`` does and waits until the thread has ended."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ask_to_stop, grace_s)
        self._thread.join()

    def __enter__(self) -> str:
        """Starts; the address is the block's value."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stops without waiting for running requests."""
        self.stop(grace_s=0.0)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=_new_loop()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = self._loop.create_future()
        try:
            server = Server(*self._parts)
            address = await server.start()
        except BaseException as error:  # Handed to the thread that called start.
            self._started.set_exception(error)
            return
        self.http_address = server.http_address
        self._started.set_result(address)
        await server.stop(await self._stop)

    def _ask_to_stop(self, grace_s: float | None) -> None:
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(grace_s)


def _new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """Returns a factory for uvloop's event loop where it is installed (not on Windows)."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def port_problem(config: ServerConfig) -> str | None:
    """Tries the address without gRPC, which does not say why it cannot listen; None is fine."""
    try:
        listen_on(config.host, config.port, backlog=1).close()
    except OSError as error:
        return _cannot_listen(config, error.strerror or str(error))
    return None


def _cannot_listen(config: ServerConfig, reason: str) -> str:
    return (
        f"cannot listen on {config.address} ({reason}); stop the process that uses the port, or "
        "choose another with --port (0 takes any free one) or another --host"
    )
