"""``/v1/chat/completions``: messages and tools in; content, reasoning and tool calls out."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.engine.request import FinishReason, SamplingParams
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.chats import Chat, ChatAnswer, ChatEngine
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.http.answering import DONE, Events, EventStream, answer, request_id_of, sse
from jaxserve.frontend.http.logprobs import Scored, ScoredToken, chat_logprobs, prompt_logprobs
from jaxserve.frontend.http.messages import (
    ChatFields,
    choice_from,
    template_messages,
    tools_from,
)
from jaxserve.frontend.http.requests import GenerationRequest, StreamOptions, refuse
from jaxserve.frontend.http.usage import Usage
from jaxserve.frontend.parsing import (
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from jaxserve.frontend.text_stream import Finished, Started, TextStream


class ChatRequest(ChatFields, GenerationRequest):
    """Body of ``/v1/chat/completions``."""

    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Given to the template under this name; models that do not know it ignore it."""
    include_reasoning: bool | None = None
    echo: bool | None = None
    # Known to OpenAI's own service; harmless here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    """A guess at the answer, which speeds it up elsewhere and never changes it."""
    # Known, and refused where ignoring them would change the answer.
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None

    def refuse_what_changes_answers(self) -> None:
        """Also what only chats have."""
        super().refuse_what_changes_answers()
        self.refuse_templates()
        refuse("modalities", self.modalities, (None, ["text"]), "answers are text")
        refuse("audio", self.audio, (None,), "answers are text")
        refuse("moderation", self.moderation, (None,), "nothing is moderated")
        refuse("verbosity", self.verbosity, (None, "medium"), "ask for it in a message")
        refuse("web_search_options", self.web_search_options, (None,), "nothing is searched")
        refuse("functions", self.functions, (None, []), "it is the old name of tools; send tools")
        refuse("function_call", self.function_call, (None, "none"), "send tool_choice")
        refuse("echo", self.echo, (None, False), "it is offered by /v1/completions")


def chat_from(request: ChatRequest) -> tuple[Chat, SamplingParams]:
    """Reads a request.

    Raises:
        InvalidRequestError: what this route does not offer.
    """
    request.refuse_what_changes_answers()
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError(
            "top_logprobs is given without logprobs; set logprobs to true", field="top_logprobs"
        )
    limits = [n for n in (request.max_completion_tokens, request.max_tokens) if n is not None]
    if len({*limits}) > 1:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens say different things; send one of them",
            field="max_completion_tokens",
        )
    tools = tools_from(request.tools or ())
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    adds = request.add_generation_prompt
    chat = Chat(
        messages=template_messages(request.messages),
        tools=tools,
        tool_choice=choice_from(request.tool_choice, bool(tools)),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        template_variables=variables,
        add_generation_prompt=adds if adds is not None else True,
        continue_final_message=bool(request.continue_final_message),
    )
    sampling = request.sampling(
        max_tokens=limits[0] if limits else None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return chat, sampling


def routes(door: Door, chats: ChatEngine) -> APIRouter:
    """The route of chats."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Response:
        """Answers a conversation."""
        request_id = request_id_of(http, request.request_id, "chatcmpl-")
        completion = ChatCompletion(door, chats, request, request_id)
        names = {
            "chat.messages": "messages",
            "chat": "messages",
            "prompt": "messages",
            "logprobs": "top_logprobs",
            **({"max_tokens": "max_completion_tokens"} if request.max_tokens is None else {}),
        }
        if request.stream:
            return EventStream(door.calls, request_id, completion.events, names=names)
        return await answer(http, door.calls, request_id, completion.body, names=names)

    return router


class ChatCompletion:
    """One chat being answered."""

    def __init__(
        self, door: Door, chats: ChatEngine, request: ChatRequest, request_id: str
    ) -> None:
        """Does nothing yet."""
        self._door = door
        self._chats = chats
        self._request = request
        self._head = {
            "id": request_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": door.info.name,
        }
        self._answers: list[ChatAnswer] = []
        self._usage = Usage()

    async def body(self) -> dict[str, Any]:
        """The whole answer."""
        stream = await self._begin()
        choices = [_Gathered() for _ in self._answers]
        prompt: list[ScoredToken] = []
        async for _, output in self._door.outputs([stream]):
            self._usage.count(0, output)
            if isinstance(output, Started):
                continue
            gathered, answer = choices[output.choice], self._answers[output.choice]
            if isinstance(output, Finished):
                gathered.add(answer.finish())
                gathered.reason = _reason(output, answer)
            elif output.prompt:
                prompt += output.logprobs
            else:
                gathered.add(answer.push(output.text, len(output.token_ids)))
                gathered.scored += output.logprobs
                gathered.token_ids += output.token_ids
        made: dict[str, Any] = {
            **self._head,
            "choices": [self._choice(*item) for item in enumerate(choices)],
            "usage": self._shown_usage(),
        }
        if self._request.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(
                prompt, self._door.text.tokenizer, self._request.prompt_logprobs
            )
        return made

    async def events(self) -> Events:
        """The answer in pieces."""
        return self._events(await self._begin())

    async def _events(self, stream: TextStream) -> Events:
        options = self._request.stream_options or StreamOptions()
        chunks = _Chunks(
            {**self._head, "object": "chat.completion.chunk"},
            with_token_ids=bool(self._request.return_token_ids),
            usage=self._shown_usage if options.continuous_usage_stats else None,
        )
        shows = self._request.include_reasoning is not False
        async for _, output in self._door.outputs([stream]):
            self._usage.count(0, output)
            if isinstance(output, Started):
                for number in range(len(self._answers)):
                    yield chunks.make(number, {"role": "assistant", "content": ""})
                continue
            number, answer = output.choice, self._answers[output.choice]
            if isinstance(output, Finished):
                for delta in _deltas(answer.finish(), with_reasoning=shows):
                    yield chunks.make(number, delta)
                yield chunks.make(number, {}, reason=_reason(output, answer))
                continue
            parts = answer.push(output.text, len(output.token_ids))
            logprobs, token_ids = self._logprobs(output.logprobs), output.token_ids
            made = _deltas(parts, with_reasoning=shows)
            if not made and (logprobs or self._request.return_token_ids):
                made = [{"content": ""}]
            for delta in made:
                yield chunks.make(number, delta, logprobs=logprobs, token_ids=token_ids)
                logprobs, token_ids = None, ()  # They come once, with the first.
        if options.include_usage:
            yield sse({**chunks.head, "choices": [], "usage": self._shown_usage()})
        yield DONE

    async def _begin(self) -> TextStream:
        request = self._request
        self._door.info.check_name(request.model)
        chat, sampling = chat_from(request)
        call = GenerationCall(
            sampling=sampling,
            request_id=self._head["id"],
            truncate_prompt_tokens=request.truncate_prompt_tokens,
            priority=request.priority,
            cache_salt=request.cache_salt,
            grammar=request.grammar(),
        )
        stream, self._answers = await self._chats.ask(self._door, chat, call)
        return stream

    def _choice(self, number: int, gathered: _Gathered) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": number,
            "message": gathered.message(
                with_reasoning=self._request.include_reasoning is not False
            ),
            "logprobs": self._logprobs(gathered.scored),
            "finish_reason": gathered.reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = gathered.token_ids
        return choice

    def _logprobs(self, scored: Scored) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        top = self._request.top_logprobs or 0
        content = chat_logprobs(scored, self._door.text.tokenizer, top)
        return {"content": content, "refusal": None}

    def _shown_usage(self) -> dict[str, Any]:
        thoughts = sum(answer.reasoning_tokens for answer in self._answers)
        return {
            **self._usage.shown(),
            "completion_tokens_details": {"reasoning_tokens": thoughts},
        }


class _Chunks:
    """Writes the chunks of one stream. The path of a token: what stays the same is written once."""

    def __init__(
        self,
        head: dict[str, Any],
        *,
        with_token_ids: bool,
        usage: Callable[[], dict[str, Any]] | None,
    ) -> None:
        """``usage`` is asked for every chunk, where the client wants it in all of them."""
        self.head = head
        self._text = json.dumps(head, ensure_ascii=False)[:-1]
        self._with_token_ids = with_token_ids
        self._usage = usage

    def make(
        self,
        number: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        token_ids: Sequence[int] = (),
    ) -> bytes:
        """Returns one choice's delta as an event."""
        choice: dict[str, Any] = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if self._with_token_ids and token_ids:
            choice["token_ids"] = list(token_ids)
        rest = f', "usage": {json.dumps(self._usage())}' if self._usage is not None else ""
        text = json.dumps(choice, ensure_ascii=False)
        return f'data: {self._text}, "choices": [{text}]{rest}}}\n\n'.encode(errors="replace")


class _Gathered:
    """A choice being gathered into one message."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.scored: list[ScoredToken] = []
        self.token_ids: list[int] = []
        self.reason: str | None = None

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            match part:
                case Content(text):
                    self.content.append(text)
                case Reasoning(text):
                    self.reasoning.append(text)
                case ToolCallStarted(_, name):
                    self.tool_calls.append(_new_call(name))
                case ToolCallArguments(index, text):
                    self.tool_calls[index]["function"]["arguments"] += text

    def message(self, *, with_reasoning: bool) -> dict[str, Any]:
        text = "".join(self.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.tool_calls and not text else text,
            "refusal": None,
        }
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.reasoning and with_reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        return message


def _deltas(parts: list[Part], *, with_reasoning: bool) -> list[dict[str, Any]]:
    """What a stream tells of the next parts."""
    deltas: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Content(text):
                deltas.append({"content": text})
            case Reasoning(text):
                if with_reasoning:
                    deltas.append({"reasoning_content": text})
            case ToolCallStarted(index, name):
                deltas.append({"tool_calls": [{"index": index, **_new_call(name)}]})
            case ToolCallArguments(index, text):
                function = {"arguments": text}
                deltas.append({"tool_calls": [{"index": index, "function": function}]})
    return deltas


def _new_call(name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _reason(output: Finished, answer: ChatAnswer) -> str:
    if answer.ends_with_calls and output.reason is FinishReason.STOP:
        return "tool_calls"
    return output.reason.value
