"""ModelService and AdminService: what is served, how busy it is, and how to drain it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.calls import OpenCall, OpenCalls
from jaxserve.frontend.engine_api import EngineApi
from jaxserve.frontend.grpc import convert
from jaxserve.frontend.grpc.answering import Context, answered, write
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import admin_pb2, admin_pb2_grpc, model_pb2, model_pb2_grpc

DEFAULT_INTERVAL_S = 1.0
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.05, 3600.0
MAX_DRAIN_WAIT_S = 86_400.0
IDLE_POLL_S = 0.01


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Facts and counters, read-only."""

    def __init__(self, engine: EngineApi, info: ModelInfo, calls: OpenCalls) -> None:
        """Answers for one model."""
        self.calls = calls
        self._engine = engine
        self._info = info

    @answered
    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context, call: OpenCall
    ) -> model_pb2.GetModelResponse:
        """Returns the facts of the served model."""
        self._info.check_name(request.model)
        return model_pb2.GetModelResponse(model=convert.model_to_proto(self._info))

    @answered
    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context, call: OpenCall
    ) -> model_pb2.ListModelsResponse:
        """Returns the one served model."""
        return model_pb2.ListModelsResponse(models=[convert.model_to_proto(self._info)])

    @answered
    async def GetStats(
        self, request: model_pb2.GetStatsRequest, context: Context, call: OpenCall
    ) -> model_pb2.GetStatsResponse:
        """Returns the engine's counters."""
        self._info.check_name(request.model)
        return self._stats()

    # A watch ends with its client or with the server, so a drain must not wait for it.
    @answered(counts=False)
    async def WatchStats(
        self, request: model_pb2.WatchStatsRequest, context: Context, call: OpenCall
    ) -> None:
        """Sends the engine's counters again and again."""
        self._info.check_name(request.model)
        interval_s = DEFAULT_INTERVAL_S
        if request.HasField("interval_seconds"):
            interval_s = request.interval_seconds
        if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
            raise InvalidRequestError(
                f"interval_seconds must be {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g}, got "
                f"{interval_s:g}",
                field="interval_seconds",
            )
        while True:
            await write(context, call, model_pb2.WatchStatsResponse(stats=self._stats()))
            await asyncio.sleep(interval_s)

    def _stats(self) -> model_pb2.GetStatsResponse:
        return convert.stats_to_proto(self._engine.stats(), self._info.model_digest)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Drain and detailed health."""

    def __init__(
        self,
        engine: EngineApi,
        info: ModelInfo,
        calls: OpenCalls,
        *,
        drain: Callable[[], None],
    ) -> None:
        """Answers for one server; ``drain`` takes it out of service."""
        self.calls = calls
        self._engine = engine
        self._info = info
        self._drain = drain
        self._started_s = time.monotonic()

    @answered(counts=False)
    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context, call: OpenCall
    ) -> admin_pb2.DrainResponse:
        """Takes the server out of service and says how far it is."""
        wait_s = request.wait_seconds
        if not 0.0 <= wait_s <= MAX_DRAIN_WAIT_S:
            raise InvalidRequestError(
                f"wait_seconds must be 0 to {MAX_DRAIN_WAIT_S:g}, got {wait_s:g}",
                field="wait_seconds",
            )
        self._drain()
        end_s = time.monotonic() + wait_s
        if wait_s:
            await self.calls.wait_none(wait_s)
        # The request of a call that its client gave up lives until the engine's next step, of which
        # the engine tells nobody.
        while not self._engine.idle and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL_S)
        stats = self._engine.stats()
        return admin_pb2.DrainResponse(
            idle=self._engine.idle,
            rows_running=stats.rows_running,
            requests_waiting=stats.requests_waiting,
        )

    @answered
    async def GetHealthDetail(
        self, request: admin_pb2.GetHealthDetailRequest, context: Context, call: OpenCall
    ) -> admin_pb2.GetHealthDetailResponse:
        """Says whether the server serves, and why not."""
        health, stats = self._engine.health(), self._engine.stats()
        return admin_pb2.GetHealthDetailResponse(
            serving=health.serving,
            detail=health.detail,
            draining=stats.draining,
            last_step_age_seconds=stats.last_step_age_seconds,
            uptime_seconds=time.monotonic() - self._started_s,
            model_digest=self._info.model_digest,
        )
