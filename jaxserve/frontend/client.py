"""The Python client: ``Client`` blocks, ``AsyncClient`` awaits; otherwise they are the same.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The sky is", max_tokens=8).text)
        for chunk in client.stream(messages=[{"role": "user", "content": "Hello"}]):
            print(chunk.text, end="")

Results are dataclasses (``client_types``), errors those of ``jaxserve.errors``. A call that reached
no server, or one that was full or draining, is tried again; a stream is, as long as nothing has
arrived. With ``resume=True`` a stream that breaks midway continues where it was, on any server of
the same model. No accelerator runtime is imported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import grpc

from jaxserve.engine.stats import EngineStats
from jaxserve.frontend import client_wire as wire
from jaxserve.frontend.async_client import AsyncClient, AsyncStream
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

__all__ = ["AsyncClient", "AsyncStream", "Client", "RetryPolicy", "Stream"]


class Stream(StreamFacts, Iterator[Chunk]):
    """One answer as it is made. Close it, leave its ``with`` block or read it to the end."""

    def __init__(self, open_call: Callable[..., Any], address: str, session: StreamSession) -> None:
        """Starts the call; ``open_call`` is the stub's method."""
        self._open_call = open_call
        self._address = address
        self._session = session
        self._closing = threading.Event()
        self._call = self._begin()

    def __iter__(self) -> Stream:
        """Returns itself."""
        return self

    def __next__(self) -> Chunk:
        """Waits for the next chunk.

        Raises:
            JaxserveError: the request was refused, failed, or broke and cannot go on.
        """
        while not self._closed:
            try:
                response = next(self._call)
            except StopIteration:
                if self._session.finished:
                    break
                failure = broken_stream(self._address)
            except grpc.RpcError as error:
                if self._closed:  # By another thread.
                    break
                failure = read_failure(error, self._address)
            else:
                chunk = self._session.accept(response)
                if chunk is not None:
                    return chunk
                continue
            self._closing.wait(self._session.after(failure))
            self._call = self._begin()
            if self._closed:  # By another thread, which cancelled the call before.
                self._call.cancel()
        raise StopIteration

    @property
    def _closed(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        """Gives the request up, if it still runs. Any thread; safe to call again."""
        self._closing.set()
        self._call.cancel()

    def __enter__(self) -> Stream:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def _begin(self) -> Any:
        return self._open_call(self._session.request, timeout=self._session.timeout_s)


class Client:
    """A blocking client of one server. Safe to share between threads."""

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
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)

    def generate(
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
        response = self._call(self._stubs.generation.GenerateUnary, request, timeout_s)
        return wire.generation_from(response)

    def chat(
        self,
        messages: Messages | str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Returns the model's answer to a conversation, or to one user message."""
        return self.generate(messages=wire.conversation(messages), timeout_s=timeout_s, **options)

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        timeout_s: float | None = None,
        resume: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
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
        return Stream(self._stubs.generation.Generate, self.address, session)

    def score(
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
        return wire.score_from(self._call(self._stubs.generation.Score, request, timeout_s))

    def embed(
        self,
        texts: Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> list[tuple[float, ...]]:
        """Returns what each text means: a vector of length 1."""
        request = wire.embed_request(texts, truncate_prompt_tokens)
        response = self._call(self._stubs.generation.Embed, request, timeout_s)
        return [tuple(each.values) for each in response.embeddings]

    def tokenize(
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
        return list(self._call(self._stubs.generation.Tokenize, request, timeout_s).token_ids)

    def tokens_of(
        self, text: str, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[tuple[int, str]]:
        """Returns the tokens of a text: id, and what it stands for."""
        request = generation_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
        wire.set_prompt(request, text)
        response = self._call(self._stubs.generation.Tokenize, request, timeout_s)
        return list(zip(response.token_ids, response.token_texts, strict=True))

    def detokenize(
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
        return self._call(self._stubs.generation.Detokenize, request, timeout_s).text

    def count_tokens(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Returns the length of a prompt in tokens."""
        request = generation_pb2.CountTokensRequest()
        wire.set_prompt(request, text, None, messages)
        return self._call(self._stubs.generation.CountTokens, request, timeout_s).tokens

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> None:
        """Ends a live request.

        Raises:
            RequestNotFoundError: no live request has this id.
        """
        request = generation_pb2.AbortRequest(request_id=request_id)
        self._call(self._stubs.generation.Abort, request, timeout_s)

    def model(self, name: str = "", *, timeout_s: float | None = None) -> ModelInfo:
        """Returns the facts of the served model."""
        request = model_pb2.GetModelRequest(model=name)
        return wire.model_from(self._call(self._stubs.model.GetModel, request, timeout_s).model)

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Returns the facts of every served model."""
        request = model_pb2.ListModelsRequest()
        response = self._call(self._stubs.model.ListModels, request, timeout_s)
        return [wire.model_from(model) for model in response.models]

    def stats(self, *, timeout_s: float | None = None) -> EngineStats:
        """Returns the engine's counters."""
        request = model_pb2.GetStatsRequest()
        return wire.stats_from(self._call(self._stubs.model.GetStats, request, timeout_s))

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[EngineStats]:
        """Yields the engine's counters until the caller stops or the server does."""
        call = self._stubs.model.WatchStats(
            model_pb2.WatchStatsRequest(interval_seconds=interval_s)
        )
        try:
            for response in call:
                yield wire.stats_from(response.stats)
        except grpc.RpcError as error:
            raise read_failure(error, self.address).error from None
        finally:
            call.cancel()

    def health(self, *, timeout_s: float | None = None) -> HealthDetail:
        """Says whether the server serves, and why not."""
        request = admin_pb2.GetHealthDetailRequest()
        return wire.health_from(self._call(self._stubs.admin.GetHealthDetail, request, timeout_s))

    def drain(self, *, wait_s: float = 0.0, timeout_s: float | None = None) -> DrainProgress:
        """Takes the server out of service; waits up to ``wait_s`` for running requests."""
        request = admin_pb2.DrainRequest(wait_seconds=wait_s)
        return wire.drain_from(self._call(self._stubs.admin.Drain, request, timeout_s))

    def close(self) -> None:
        """Closes the connection; open streams end."""
        self._channel.close()

    def __enter__(self) -> Client:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s)

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        """Makes a unary call, again where that is safe and may help."""
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.timeout_s)
            except grpc.RpcError as error:
                delay_s = attempts.after(read_failure(error, self.address))
            time.sleep(delay_s)
