"""grpc.health.v1 and server reflection, from grpcio's own packages.

Health follows the engine: a task asks it again and again, so a dead or stuck engine is NOT_SERVING
although the process answers.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from smg_grpc_proto.generated import vllm_engine_pb2

from jaxserve.frontend.engine_api import EngineApi
from jaxserve.third_party.triton import grpc_service_pb2
from jaxserve.v1 import admin_pb2, generation_pb2, model_pb2

VLLM = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name
KSERVE = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
SERVICES = (
    GENERATION,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    VLLM,
    KSERVE,
    health.SERVICE_NAME,
    reflection.SERVICE_NAME,
)
"""What reflection lists."""
WATCHED = ("", GENERATION, VLLM, KSERVE)
"""Names that health answers for; "" is the whole process."""
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

log = logging.getLogger(__name__)


class HealthReporter:
    """Keeps grpc.health.v1 equal to the engine's own idea of its health."""

    def __init__(self, engine: EngineApi, *, interval_s: float) -> None:
        """Begins NOT_SERVING for every name, until the first ``refresh``."""
        # Absent from the type stubs, as is reflection.aio.
        self.servicer: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._engine = engine
        self._interval_s = interval_s
        self._serving: bool | None = None

    async def refresh(self) -> None:
        """Asks the engine once and tells watchers of a change."""
        report = self._engine.health()
        if report.serving == self._serving:
            return
        if self._serving is not None or not report.serving:
            log.warning(
                "health is %s: %s", "SERVING" if report.serving else "NOT_SERVING", report.detail
            )
        self._serving = report.serving
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in WATCHED:
            await self.servicer.set(name, status.SERVING if report.serving else status.NOT_SERVING)

    async def watch(self) -> None:
        """Follows the engine until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._interval_s)

    async def shut_down(self) -> None:
        """Turns NOT_SERVING for good."""
        await self.servicer.enter_graceful_shutdown()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, server)


def add_reflection(server: grpc.aio.Server) -> None:
    """Offers reflection as v1alpha, which the package has, and as v1, which newer tools ask for.

    The two versions differ in nothing but the package name, so one servicer answers both.
    """
    servicer: Any = reflection.aio.ReflectionServicer(service_names=SERVICES)
    reflection.enable_server_reflection(SERVICES, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, handlers),)
    )
