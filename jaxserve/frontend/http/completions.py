"""``/v1/completions``: texts or token ids in, text out, as evaluation harnesses need it too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import GenerationCall, check_prompts
from jaxserve.frontend.http.answering import DONE, Events, EventStream, answer, request_id_of, sse
from jaxserve.frontend.http.logprobs import CompletionLogprobs, ScoredToken, prompt_logprobs
from jaxserve.frontend.http.requests import GenerationRequest, refuse
from jaxserve.frontend.http.usage import Usage
from jaxserve.frontend.text_stream import Finished, Output, Started, TextStream

DEFAULT_MAX_TOKENS = 16
NAMES = {"token_ids": "prompt"}
"""What fields are called here, by what the engine calls them."""
"""OpenAI's."""


class CompletionRequest(GenerationRequest):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    """Accepted where it says the same as ``n``."""
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt.

        Raises:
            InvalidRequestError: there are none, or too many.
        """
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise InvalidRequestError("prompt is empty; send at least one token", field="prompt")
        check_prompts(len(given), field="prompt")
        return given


@dataclass(frozen=True)
class Asked:
    """A request of completions, checked as far as this door can."""

    calls: list[GenerationCall]
    n: int
    logprobs: int | None
    scores_only: bool
    """``max_tokens`` is 0: the prompt is wanted, and what it scores."""
    echo: bool


def asked_from(request: CompletionRequest, request_id: str) -> Asked:
    """Reads a request.

    Raises:
        InvalidRequestError: what this route does not offer.
    """
    request.refuse_what_changes_answers()
    refuse("suffix", request.suffix, (None, ""), "put the whole text into prompt")
    refuse(
        "best_of", request.best_of, (None, request.n or 1), "it has to be n; answers are not ranked"
    )
    if request.add_special_tokens is False:
        refuse(
            "add_special_tokens", False, (None, True), "send token ids, which are used as they are"
        )
    logprobs, echo = request.logprobs, bool(request.echo)
    if echo and logprobs is not None:
        why = "echo with logprobs scores the prompt as often as the answer"
        refuse("prompt_logprobs", request.prompt_logprobs, (None, logprobs), why)
    scores_only = request.max_tokens == 0
    if scores_only and not echo:
        raise InvalidRequestError(
            "max_tokens is 0, which without echo asks for nothing; set echo or at least 1",
            field="max_tokens",
        )
    default = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    sampling = request.sampling(
        max_tokens=1 if scores_only else default,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo and logprobs is not None else request.prompt_logprobs,
    )
    call = GenerationCall(
        sampling=sampling,
        echo=echo,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        grammar=request.grammar(),
    )
    prompts = request.prompts()
    calls = [
        replace(
            call,
            text=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            request_id=request_id if len(prompts) == 1 else f"{request_id[:112]}-{place}",
        )
        for place, prompt in enumerate(prompts)
    ]
    return Asked(calls, sampling.n, logprobs, scores_only, echo)


def routes(door: Door) -> APIRouter:
    """The route of completions."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
        """Completes one or several prompts."""
        request_id = request_id_of(http, request.request_id, "cmpl-")
        completion = Completion(door, request, request_id)
        if request.stream:
            return EventStream(door.calls, request_id, completion.events, names=NAMES)
        return await answer(http, door.calls, request_id, completion.body, names=NAMES)

    return router


class Completion:
    """One request of completions being answered."""

    def __init__(self, door: Door, request: CompletionRequest, request_id: str) -> None:
        """Does nothing yet."""
        self._door = door
        self._request = request
        self._head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": door.info.name,
        }
        self._usage = Usage()

    async def body(self) -> dict[str, Any]:
        """The whole answer."""
        asked, streams = await self._begin()
        choices: dict[int, dict[str, Any]] = {}
        prompts: list[list[ScoredToken]] = [[] for _ in streams]
        answers: dict[int, list[ScoredToken]] = {}
        async for place, output in self._door.outputs(streams):
            self._count(asked, place, output)
            if isinstance(output, Started):
                continue
            number = place * asked.n + output.choice
            choice = choices.setdefault(number, {"index": number, "text": "", "token_ids": []})
            if isinstance(output, Finished):
                choice["finish_reason"] = _reason(asked, output)
            elif output.prompt:
                choice["text"] += output.text
                prompts[place] += output.logprobs
            elif not asked.scores_only:
                choice["text"] += output.text
                choice["token_ids"] += output.token_ids
                answers.setdefault(number, []).extend(output.logprobs)
        for number, choice in choices.items():
            prompt = prompts[number // asked.n]
            self._add_logprobs(asked, choice, prompt, answers.get(number, []))
            if not self._request.return_token_ids:
                del choice["token_ids"]
        return {
            **self._head,
            "choices": [choices[number] for number in sorted(choices)],
            "usage": self._usage.shown(),
        }

    async def events(self) -> Events:
        """The answer in pieces."""
        asked, streams = await self._begin()
        return self._events(asked, streams)

    async def _events(self, asked: Asked, streams: Sequence[TextStream]) -> Events:
        options = self._request.stream_options
        tokenizer = self._door.text.tokenizer
        lists: dict[int, CompletionLogprobs] = {}
        async for place, output in self._door.outputs(streams):
            self._count(asked, place, output)
            if isinstance(output, Started):
                continue
            number = place * asked.n + output.choice
            if isinstance(output, Finished):
                yield self._chunk(number, "", None, _reason(asked, output), ())
                continue
            if asked.scores_only and not output.prompt:
                continue
            made = lists.setdefault(number, CompletionLogprobs(tokenizer, asked.logprobs or 0))
            logprobs = made.take(output.logprobs) if asked.logprobs is not None else None
            ids = () if output.prompt else output.token_ids
            if output.text or logprobs or self._request.return_token_ids:
                yield self._chunk(number, output.text, logprobs, None, ids)
        if options is not None and options.include_usage:
            yield sse({**self._head, "choices": [], "usage": self._usage.shown()})
        yield DONE

    async def _begin(self) -> tuple[Asked, list[TextStream]]:
        door = self._door
        door.info.check_name(self._request.model)
        asked = asked_from(self._request, self._head["id"])
        built = [await door.build(call) for call in asked.calls]
        with ExitStack() as undo:
            streams = [undo.enter_context(closing(door.open(each))) for each in built]
            undo.pop_all()  # From here on ``Door.outputs`` closes them.
        return asked, streams

    def _chunk(
        self,
        number: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        ids: Sequence[int],
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": number,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(ids)
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        options = self._request.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self._usage.shown()
        return sse(chunk)

    def _count(self, asked: Asked, place: int, output: Output) -> None:
        if isinstance(output, Started) or not asked.scores_only:
            self._usage.count(place, output)

    def _add_logprobs(
        self,
        asked: Asked,
        choice: dict[str, Any],
        prompt: list[ScoredToken],
        answer: list[ScoredToken],
    ) -> None:
        """A prompt is scored once; every choice shows it."""
        tokenizer = self._door.text.tokenizer
        choice["logprobs"] = None
        if asked.logprobs is not None:
            lists = CompletionLogprobs(tokenizer, asked.logprobs)
            choice["logprobs"] = lists.take([*prompt, *answer] if asked.echo else answer)
        if self._request.prompt_logprobs is not None:
            top = self._request.prompt_logprobs
            choice["prompt_logprobs"] = prompt_logprobs(prompt, tokenizer, top)


def _reason(asked: Asked, output: Finished) -> str:
    return "length" if asked.scores_only else output.reason.value
