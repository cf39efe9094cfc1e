"""The client for event loops: ``client.Client`` with ``await``, method by method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Unpack

import grpc

from jaxserve.engine.stats import EngineStats
from jaxserve.frontend import client_wire as wire
from jaxserve.frontend.client_errors import broken_stream, read_failure
from jaxserve.frontend.client_session import Attempts, RetryPolicy, StreamFacts, StreamSession
from jaxserve.frontend.client_stubs import CHANNEL_OPTIONS, DEFAULT_ADDRESS, Stubs
from jaxserve.frontend.client_types import (
    Chunk,
    DrainProgress,
    GenerateOptions,
    Generation,
    HealthDetail,
    Score,
)
from jaxserve.frontend.client_wire import Messages
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import admin_pb2, generation_pb2, model_pb2


class AsyncStream(StreamFacts, AsyncIterator[Chunk]):
    """One answer as it is made. Close it, leave its ``async with`` block or read it to the end."""

    def __init__(self, open_call: Callable[..., Any], address: str, session: StreamSession) -> None:
        """Starts the call; ``open_call`` is the stub's method."""
        self._open_call = open_call
        self._address = address
        self._session = session
        self._closed = False
        self._call = self._begin()

    def __aiter__(self) -> AsyncStream:
        """Returns itself."""
        return self

    async def __anext__(self) -> Chunk:
        """Waits for the next chunk.

        Raises:
            JaxserveError: the request was refused, failed, or broke and cannot go on.
        """
        while not self._closed:
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                if not self._closed:
                    raise
                break  # Closed by another task.
            except grpc.RpcError as error:
                failure = read_failure(error, self._address)
            else:
                if response is not grpc.aio.EOF:
                    chunk = self._session.accept(response)
                    if chunk is not None:
                        return chunk
                    continue
                if self._session.finished:
                    break
                failure = broken_stream(self._address)
            await asyncio.sleep(self._session.after(failure))
            if not self._closed:  # By another task, meanwhile.
                self._call = self._begin()
        raise StopAsyncIteration

    def close(self) -> None:
        """Gives the request up, if it still runs. Safe to call again."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        """Returns itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def _begin(self) -> Any:
        return self._open_call(self._session.request, timeout=self._session.timeout_s)


class AsyncClient:
    """A client of one server for one event loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Prepares a connection; nothing is sent before the first call.

        Args:
            address: ``HOST:PORT``, or any target that gRPC understands.
            timeout_s: for every call that names none; None waits for ever.
            retry: how failed calls are tried again.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Returns a whole answer.

        Args:
            prompt: plain text; exactly one of this, ``token_ids`` and ``messages``.
            token_ids: tokens, used as they are.
            messages: dicts with ``role`` (system, user, assistant, tool) and ``content``.
            timeout_s: over all attempts; becomes the request's deadline.
            **options: sampling and other fields of the request.

        Raises:
            JaxserveError: the class that the server raised.
        """
        inner = wire.generate_request(prompt, token_ids, messages, options)
        request = generation_pb2.GenerateUnaryRequest(request=inner)
        response = await self._call(self._stubs.generation.GenerateUnary, request, timeout_s)
        return wire.generation_from(response)

    async def chat(
        self,
        messages: Messages | str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Returns the model's answer to a conversation, or to one user message."""
        return await self.generate(
            messages=wire.conversation(messages), timeout_s=timeout_s, **options
        )

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        timeout_s: float | None = None,
        resume: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Returns an answer as it is made; arguments as for ``generate``.

        Args:
            prompt: as for ``generate``.
            token_ids: as for ``generate``.
            messages: as for ``generate``.
            timeout_s: over all attempts and continuations.
            resume: continue a stream that breaks midway, at most three times; one choice
                only.
            **options: as for ``generate``.
        """
        request = wire.generate_request(prompt, token_ids, messages, options)
        session = StreamSession(request, self._attempts(timeout_s), resume=resume)
        return AsyncStream(self._stubs.generation.Generate, self.address, session)

    async def score(
        self,
        text: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        top_logprobs: int = 0,
        timeout_s: float | None = None,
    ) -> Score:
        """Returns the log-probability of every token of a text."""
        request = generation_pb2.ScoreRequest(top_logprobs=top_logprobs)
        wire.set_prompt(request, text, token_ids, messages)
        return wire.score_from(await self._call(self._stubs.generation.Score, request, timeout_s))

    async def embed(
        self,
        texts: Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> list[tuple[float, ...]]:
        """Returns what each text means: a vector of length 1."""
        request = wire.embed_request(texts, truncate_prompt_tokens)
        response = await self._call(self._stubs.generation.Embed, request, timeout_s)
        return [tuple(each.values) for each in response.embeddings]

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> list[int]:
        """Returns the token ids that ``generate`` would use."""
        request = generation_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
        wire.set_prompt(request, text, None, messages)
        return list(
            (await self._call(self._stubs.generation.Tokenize, request, timeout_s)).token_ids
        )

    async def tokens_of(
        self, text: str, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[tuple[int, str]]:
        """Returns the tokens of a text: id, and what it stands for."""
        request = generation_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
        wire.set_prompt(request, text)
        response = await self._call(self._stubs.generation.Tokenize, request, timeout_s)
        return list(zip(response.token_ids, response.token_texts, strict=True))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of tokens."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await self._call(self._stubs.generation.Detokenize, request, timeout_s)).text

    async def count_tokens(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Returns the length of a prompt in tokens."""
        request = generation_pb2.CountTokensRequest()
        wire.set_prompt(request, text, None, messages)
        return (await self._call(self._stubs.generation.CountTokens, request, timeout_s)).tokens

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> None:
        """Ends a live request.

        Raises:
            RequestNotFoundError: no live request has this id.
        """
        request = generation_pb2.AbortRequest(request_id=request_id)
        await self._call(self._stubs.generation.Abort, request, timeout_s)

    async def model(self, name: str = "", *, timeout_s: float | None = None) -> ModelInfo:
        """Returns the facts of the served model."""
        request = model_pb2.GetModelRequest(model=name)
        return wire.model_from(
            (await self._call(self._stubs.model.GetModel, request, timeout_s)).model
        )

    async def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Returns the facts of every served model."""
        request = model_pb2.ListModelsRequest()
        response = await self._call(self._stubs.model.ListModels, request, timeout_s)
        return [wire.model_from(model) for model in response.models]

    async def stats(self, *, timeout_s: float | None = None) -> EngineStats:
        """Returns the engine's counters."""
        request = model_pb2.GetStatsRequest()
        return wire.stats_from(await self._call(self._stubs.model.GetStats, request, timeout_s))

    async def watch_stats(self, interval_s: float = 1.0) -> AsyncIterator[EngineStats]:
        """Yields the engine's counters until the caller stops or the server does."""
        call = self._stubs.model.WatchStats(
            model_pb2.WatchStatsRequest(interval_seconds=interval_s)
        )
        try:
            async for response in call:
                yield wire.stats_from(response.stats)
        except grpc.RpcError as error:
            raise read_failure(error, self.address).error from None
        finally:
            call.cancel()

    async def health(self, *, timeout_s: float | None = None) -> HealthDetail:
        """Says whether the server serves, and why not."""
        request = admin_pb2.GetHealthDetailRequest()
        return wire.health_from(
            await self._call(self._stubs.admin.GetHealthDetail, request, timeout_s)
        )

    async def drain(self, *, wait_s: float = 0.0, timeout_s: float | None = None) -> DrainProgress:
        """Takes the server out of service; waits up to ``wait_s`` for running requests."""
        request = admin_pb2.DrainRequest(wait_seconds=wait_s)
        return wire.drain_from(await self._call(self._stubs.admin.Drain, request, timeout_s))

    async def close(self) -> None:
        """Closes the connection; open streams end."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        """Returns itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes."""
        await self.close()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s)

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        """Makes a unary call, again where that is safe and may help."""
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return await method(request, timeout=attempts.timeout_s)
            except grpc.RpcError as error:
                delay_s = attempts.after(read_failure(error, self.address))
            await asyncio.sleep(delay_s)
