"""``vllm.grpc.engine.VllmEngine``: the protocol by which gateways talk to their workers.

Token ids go in and out; the gateway has the tokenizer, which it may fetch here, renders chats and
makes text. Everything that is answered is answered by what answers ``GenerationService``; what
this server does not have ends with UNIMPLEMENTED and the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time

from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.errors import NotOfferedError, RequestNotFoundError
from jaxserve.frontend.calls import OpenCall, OpenCalls
from jaxserve.frontend.door import Door
from jaxserve.frontend.engine_api import PagesApi
from jaxserve.frontend.generation import EMBEDDING, GenerationCall
from jaxserve.frontend.grpc import vllm_convert, vllm_facts
from jaxserve.frontend.grpc.answering import Context, answered, deadline_of, write
from jaxserve.frontend.grpc.kv_events import KvEventWriter, LoopFeed
from jaxserve.frontend.grpc.tokenizer_bundle import CHUNK_BYTES, bundle_tokenizer
from jaxserve.frontend.model_info import ModelInfo


class VllmServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Serves one model. Belongs to the event loop of its ``door``."""

    def __init__(self, door: Door, info: ModelInfo, calls: OpenCalls, *, tells_pages: bool) -> None:
        """Answers for one model.

        Args:
            door: runs requests.
            info: of the model.
            calls: the server's open calls.
            tells_pages: whether whoever asks may hear of cached pages, and so of the tokens of
                every client's prompts.
        """
        self.calls = calls
        self._door = door
        self._text = door.text
        self._info = info
        self._tells_pages = tells_pages
        self._bundle: bytes | None = None
        self._started_s = time.monotonic()
        self._last_request_s = 0.0

    @answered
    async def Generate(self, request: pb.GenerateRequest, context: Context, call: OpenCall) -> None:
        """Sends one answer: in chunks when it streams, and each choice whole when it ends."""
        self._last_request_s = time.time()
        asked = vllm_convert.call_from_generate(
            request,
            call.request_id,
            deadline_of(context),
            context_tokens=self._text.engine.limits.context_tokens,
        )
        stream = await self._door.ask(asked, with_text=False)
        answer = vllm_convert.AnswerWriter(request)
        try:
            while not stream.finished:
                for output in await self._door.next(stream):
                    message = answer.write(output)
                    if message is not None:
                        await write(context, call, message)
        finally:
            stream.close()

    @answered
    async def Abort(
        self, request: pb.AbortRequest, context: Context, call: OpenCall
    ) -> pb.AbortResponse:
        """Ends live requests; their streams end with "abort". Others may have finished already."""
        for request_id in request.request_ids:
            with contextlib.suppress(RequestNotFoundError):
                self._text.engine.abort(request_id)
        return pb.AbortResponse()

    @answered
    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context, call: OpenCall
    ) -> pb.HealthCheckResponse:
        """Says whether the engine makes progress."""
        health = self._text.engine.health()
        return pb.HealthCheckResponse(healthy=health.serving, message=health.detail)

    @answered
    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context, call: OpenCall
    ) -> pb.GetModelInfoResponse:
        """Returns the facts of the model."""
        return vllm_facts.model_info(self._info, self._text.tokenizer)

    @answered
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context, call: OpenCall
    ) -> pb.GetServerInfoResponse:
        """Returns the facts of the server."""
        return vllm_facts.server_info(
            self._info,
            self._text.engine.stats(),
            started_s=self._started_s,
            last_request_s=self._last_request_s,
        )

    @answered
    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: Context, call: OpenCall
    ) -> pb.GetLoadsResponse:
        """Returns how busy every data shard is."""
        return vllm_facts.loads(request, self._info, self._text.engine.stats())

    @answered
    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: Context, call: OpenCall
    ) -> None:
        """Sends the tokenizer as a zip in pieces; the last has the SHA-256 of all."""
        if self._bundle is None:
            self._bundle = await self._door.in_thread(self._make_bundle)
        bundle = self._bundle
        for first in range(0, len(bundle), CHUNK_BYTES):
            last = first + CHUNK_BYTES >= len(bundle)
            chunk = common_pb2.GetTokenizerChunk(
                data=bundle[first : first + CHUNK_BYTES],
                sha256=hashlib.sha256(bundle).hexdigest() if last else "",
            )
            await write(context, call, chunk)

    # A subscription ends with its client or with the server, so a drain must not wait for it.
    @answered(counts=False)
    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: Context, call: OpenCall
    ) -> None:
        """Tells which pages a prompt may find, again and again."""
        engine = self._text.engine
        if not isinstance(engine, PagesApi):
            raise NotOfferedError("SubscribeKvEvents", "this engine tells nothing of its pages")
        if not self._tells_pages:
            raise NotOfferedError(
                "SubscribeKvEvents",
                "it would tell strangers the tokens of every prompt; listen on 127.0.0.1 and put a "
                "gateway on the same machine",
            )
        writer = KvEventWriter(
            request.start_sequence_number,
            page_tokens=engine.stats().page_tokens,
            shards=len(engine.stats().data_shards),
        )
        while True:  # Once more whenever the client was too slow.
            feed = LoopFeed(asyncio.get_running_loop())
            engine.watch_pages(feed)
            try:
                while not feed.lost:
                    for batch in await feed.wait():
                        for message in writer.write(batch):
                            await write(context, call, message)
            finally:
                engine.unwatch_pages(feed)
            writer.skip()

    @answered
    async def Embed(
        self, request: pb.EmbedRequest, context: Context, call: OpenCall
    ) -> pb.EmbedResponse:
        """Returns what a prompt means, where the server was launched with ``--embeddings``."""
        asked = GenerationCall(
            token_ids=tuple(request.tokenized.input_ids),
            embed=True,
            sampling=EMBEDDING,
            request_id=call.request_id,
            deadline_s=deadline_of(context),
        )
        built = await self._door.build(asked)
        (vector,) = await self._door.embed([built])
        return pb.EmbedResponse(
            embedding=vector, prompt_tokens=len(built[0].prompt), embedding_dim=len(vector)
        )

    @answered
    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: Context, call: OpenCall
    ) -> common_pb2.FlushCacheResponse:
        """Refuses."""
        raise NotOfferedError(
            "FlushCache", "cached pages give way by themselves; launch with --no-prefix-cache"
        )

    @answered
    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: Context, call: OpenCall
    ) -> common_pb2.ProfileResponse:
        """Refuses."""
        raise NotOfferedError("StartProfile", "profiles are not taken over the network")

    @answered
    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: Context, call: OpenCall
    ) -> common_pb2.ProfileResponse:
        """Refuses."""
        raise NotOfferedError("StopProfile", "profiles are not taken over the network")

    def _make_bundle(self) -> bytes:
        template = self._text.template
        return bundle_tokenizer(
            self._text.tokenizer,
            template.text if template is not None else None,
            self._info.eos_token_ids,
        )
