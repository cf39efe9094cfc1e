"""``inference.GRPCInferenceService``: the subset of KServe's and Triton's protocol for text.

    ModelInfer        one request, one response; errors are statuses
    ModelStreamInfer  any number of requests on one stream, answered side by side; an error ends its
                      request and is told in its response, and the stream goes on

What is not here is UNIMPLEMENTED by gRPC itself: repositories, shared memory, traces.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from jaxserve.errors import InvalidRequestError, ModelNotFoundError
from jaxserve.frontend.calls import OpenCall, OpenCalls
from jaxserve.frontend.door import Door
from jaxserve.frontend.grpc import kserve_convert, kserve_facts
from jaxserve.frontend.grpc.answering import Context, answered, deadline_of, refuse_malformed, write
from jaxserve.frontend.grpc.status import to_grpc_status
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.third_party.triton import grpc_service_pb2 as pb
from jaxserve.third_party.triton import grpc_service_pb2_grpc

REQUESTS_PER_STREAM = 64
"""Answered at a time; more wait in the client, whose sends are then held up."""


class KserveServicer(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves one model. Belongs to the event loop of its ``door``."""

    def __init__(self, door: Door, info: ModelInfo, calls: OpenCalls) -> None:
        """Answers for one model."""
        self.calls = calls
        self._door = door
        self._engine = door.text.engine
        self._info = info

    @answered
    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context, call: OpenCall
    ) -> pb.ServerLiveResponse:
        """Says that the process answers."""
        return pb.ServerLiveResponse(live=True)

    @answered
    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context, call: OpenCall
    ) -> pb.ServerReadyResponse:
        """Says whether the engine makes progress and takes requests."""
        return pb.ServerReadyResponse(ready=self._engine.health().serving)

    @answered
    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context, call: OpenCall
    ) -> pb.ModelReadyResponse:
        """Says whether a model takes requests; one that is not served does not."""
        try:
            self._check(request.name, request.version)
        except ModelNotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._engine.health().serving)

    @answered
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context, call: OpenCall
    ) -> pb.ServerMetadataResponse:
        """Returns name and version of the server."""
        return kserve_facts.server_metadata(self._info)

    @answered
    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context, call: OpenCall
    ) -> pb.ModelMetadataResponse:
        """Returns what goes into the model and comes out."""
        self._check(request.name, request.version)
        return kserve_facts.model_metadata(self._info)

    @answered
    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context, call: OpenCall
    ) -> pb.ModelConfigResponse:
        """Returns the same as Triton's configuration has it."""
        self._check(request.name, request.version)
        return pb.ModelConfigResponse(config=kserve_facts.model_config(self._info))

    @answered
    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context, call: OpenCall
    ) -> pb.ModelInferResponse:
        """Returns one whole answer."""
        responses: list[pb.ModelInferResponse] = []

        async def take(response: pb.ModelInferResponse, final: bool) -> None:
            responses.append(response)

        await self._infer(request, call.request_id, context, take, streams=False)
        (response,) = responses
        return response

    # Clients keep streams open between requests, so a drain waits for those with requests alone.
    @answered(counts=False)
    async def ModelStreamInfer(
        self, requests: AsyncIterator[Any], context: Context, call: OpenCall
    ) -> None:
        """Answers the requests of a stream as they come."""
        places = asyncio.Semaphore(REQUESTS_PER_STREAM)
        turn = asyncio.Lock()  # gRPC takes one message of a stream at a time.
        running = 0

        async def send(message: pb.ModelStreamInferResponse) -> None:
            async with turn:
                await write(context, call, message)

        async def answer(request: Any) -> None:
            nonlocal running
            try:
                await self._answer(request, context, send)
            finally:
                running -= 1
                self.calls.count(call, running > 0)
                places.release()

        async with asyncio.TaskGroup() as answers:
            async for request in requests:
                await places.acquire()
                running += 1
                self.calls.count(call, True)
                answers.create_task(answer(request))

    async def _answer(
        self,
        request: Any,
        context: Context,
        send: Callable[[pb.ModelStreamInferResponse], Awaitable[None]],
    ) -> None:
        """Answers one request of a stream; an error is its last message."""
        request_id = uuid.uuid4().hex

        async def take(response: pb.ModelInferResponse, final: bool) -> None:
            await send(kserve_convert.stream_response(response, final))

        try:
            refuse_malformed(request)
            await self._infer(request, request_id, context, take, streams=True)
        except Exception as error:  # What an RPC is elsewhere: logged once, in to_grpc_status.
            text = to_grpc_status(error, request_id=request_id).details
            client_id = getattr(request, "id", "")
            await send(kserve_convert.stream_error(text, client_id, self._info))

    async def _infer(
        self,
        request: pb.ModelInferRequest,
        request_id: str,
        context: Context,
        take: Callable[[pb.ModelInferResponse, bool], Awaitable[None]],
        *,
        streams: bool,
    ) -> None:
        """Runs one request; hands on its responses, and with each whether it is the last."""
        self._check(request.model_name, request.model_version)
        asked = kserve_convert.read_inference(request, request_id, deadline_of(context))
        if asked.stream and not streams:
            raise InvalidRequestError(
                "stream is true, and ModelInfer has one response; call ModelStreamInfer",
                field="stream",
            )
        stream = await self._door.ask(asked.call)
        writer = kserve_convert.ResponseWriter(asked, self._door.text.tokenizer, self._info.name)
        try:
            while not stream.finished:
                for output in await self._door.next(stream):
                    writer.add(output)
                if stream.finished or (asked.stream and writer.has_news):
                    await take(writer.response(), stream.finished)
        finally:
            stream.close()

    def _check(self, name: str, version: str) -> None:
        self._info.check_name(name)
        if version not in ("", kserve_convert.VERSION):
            served = f"{self._info.name} version {kserve_convert.VERSION}"
            raise ModelNotFoundError(f"{self._info.name} version {version}", served)
