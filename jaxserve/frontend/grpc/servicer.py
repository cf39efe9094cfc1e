"""GenerationService: from a protobuf request to the engine and back, deciding nothing.

The life of a ``Generate`` call: read the message, render and tokenise (long text in a thread),
submit, then one loop of wait, take, assemble, write until every choice has finished. Whatever ends
the loop (done, client gone, deadline, stall, shutdown) passes ``finally``, which gives the pages
back.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.calls import OpenCall, OpenCalls
from jaxserve.frontend.door import Door, sound
from jaxserve.frontend.grpc import convert
from jaxserve.frontend.grpc.answering import Context, answered, deadline_of, write
from jaxserve.frontend.grpc.unary import AnswerCollector
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.text_stream import TextStream, find_started
from jaxserve.v1 import generation_pb2 as pb
from jaxserve.v1 import generation_pb2_grpc


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves one model. Belongs to the event loop of its ``door``."""

    def __init__(self, door: Door, info: ModelInfo, calls: OpenCalls) -> None:
        """Answers for one model."""
        self.calls = calls
        self._door = door
        self._text = door.text
        self._info = info

    @answered
    async def Generate(self, request: pb.GenerateRequest, context: Context, call: OpenCall) -> None:
        """Streams one answer."""
        stream = await self._open(request, context, call)
        tokenizer, digest = self._text.tokenizer, self._info.model_digest
        try:
            while not stream.finished:
                for output in await self._door.next(stream):
                    sound(output)
                    message = convert.response_from(output, tokenizer, digest)
                    await write(context, call, message)
        finally:
            stream.close()

    @answered
    async def GenerateUnary(
        self, request: pb.GenerateUnaryRequest, context: Context, call: OpenCall
    ) -> pb.GenerateUnaryResponse:
        """Returns one whole answer."""
        stream = await self._open(request.request, context, call)
        answer = AnswerCollector(self._text.tokenizer, self._info.model_digest)
        try:
            while not stream.finished:
                for output in await self._door.next(stream):
                    sound(output)
                    answer.add(output)
        finally:
            stream.close()
        return answer.response()

    @answered
    async def Score(
        self, request: pb.ScoreRequest, context: Context, call: OpenCall
    ) -> pb.ScoreResponse:
        """Returns the log-probability of every token of a text."""
        self._info.check_name(request.model)
        asked = convert.call_from_score(request, call.request_id, deadline_of(context))
        built, _ = await self._door.build(asked)
        stream = self._text.engine.submit(built, self._door.waker)
        try:
            started = None
            while started is None:
                await self._door.waker.wait(stream)
                started = find_started(stream.take())
        finally:
            stream.close()  # The one token that the engine would go on to make is of no use.
        return convert.score_response(
            built.prompt, started, self._text.tokenizer, self._info.model_digest
        )

    @answered
    async def Embed(
        self, request: pb.EmbedRequest, context: Context, call: OpenCall
    ) -> pb.EmbedResponse:
        """Returns what texts mean."""
        self._info.check_name(request.model)
        asked = convert.calls_from_embed(request, call.request_id, deadline_of(context))
        door = self._door
        built = [await door.build(each) for each in asked]
        vectors = await door.embed(built)
        return pb.EmbedResponse(
            embeddings=[
                pb.Embedding(values=vector, prompt_tokens=len(made.prompt))
                for vector, (made, _) in zip(vectors, built, strict=True)
            ],
            model_digest=self._info.model_digest,
        )

    @answered
    async def Tokenize(
        self, request: pb.TokenizeRequest, context: Context, call: OpenCall
    ) -> pb.TokenizeResponse:
        """Returns the tokens of a text or chat."""
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        ids = await self._encode(request, add_special_tokens=special)
        return pb.TokenizeResponse(
            token_ids=ids,
            token_texts=[self._text.tokenizer.token_text(token) for token in ids],
            model_digest=self._info.model_digest,
        )

    @answered
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context, call: OpenCall
    ) -> pb.DetokenizeResponse:
        """Returns the text of tokens."""
        self._info.check_name(request.model)
        text = self._text.decode(request.token_ids, skip_special_tokens=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text, model_digest=self._info.model_digest)

    @answered
    async def CountTokens(
        self, request: pb.CountTokensRequest, context: Context, call: OpenCall
    ) -> pb.CountTokensResponse:
        """Returns the length of a prompt."""
        ids = await self._encode(request, add_special_tokens=True)
        return pb.CountTokensResponse(
            tokens=len(ids),
            context_tokens=self._text.engine.limits.context_tokens,
            model_digest=self._info.model_digest,
        )

    @answered
    async def Abort(
        self, request: pb.AbortRequest, context: Context, call: OpenCall
    ) -> pb.AbortResponse:
        """Ends a live request of any client."""
        if not request.request_id:
            raise InvalidRequestError(
                "request_id is empty; send the id that `started` reported", field="request_id"
            )
        self._text.engine.abort(request.request_id)
        return pb.AbortResponse()

    async def _open(
        self, request: pb.GenerateRequest, context: Context, call: OpenCall
    ) -> TextStream:
        """Admits a request: everything that can be refused is refused here."""
        self._info.check_name(request.model)
        asked = convert.call_from_generate(request, call.request_id, deadline_of(context))
        return await self._door.ask(asked)

    async def _encode(
        self, request: pb.TokenizeRequest | pb.CountTokensRequest, *, add_special_tokens: bool
    ) -> Sequence[int]:
        self._info.check_name(request.model)
        asked = convert.call_from_prompt(request)
        return await self._door.off_loop(
            asked, lambda: self._text.encode(asked, add_special_tokens=add_special_tokens)[0]
        )
