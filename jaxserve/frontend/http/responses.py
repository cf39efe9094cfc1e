"""``/v1/responses``: OpenAI's newer form of a chat, whole or as named events. Nothing is kept."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from pydantic import Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.engine.request import FinishReason, SamplingParams
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.chats import Chat, ChatAnswer, ChatEngine
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.grammar import Grammar, take_grammar
from jaxserve.frontend.http.answering import Events, EventStream, answer, request_id_of, sse
from jaxserve.frontend.http.logprobs import chat_logprobs
from jaxserve.frontend.http.messages import (
    CalledFunction,
    Function,
    Message,
    ToolCall,
    choice_from,
    template_messages,
)
from jaxserve.frontend.http.requests import StrictModel, checked, refuse
from jaxserve.frontend.http.response_items import Event, Items
from jaxserve.frontend.parsing import Tool
from jaxserve.frontend.text_stream import Delta, Finished, Started, TextStream

LOGPROBS = "message.output_text.logprobs"
NAMES = {
    "chat.messages": "input",
    "chat": "input",
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}
"""What fields are called here, by what the engine calls them."""


class ReasoningOptions(StrictModel):
    """How much is thought; only the effort reaches the template."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(StrictModel):
    """What the answer has to be."""

    type: str
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(StrictModel):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class NamedFunction(Function):
    """A function that may be called."""

    type: str


class ResponsesRequest(StrictModel):
    """Body of ``/v1/responses``."""

    input: str | list[dict[str, Any]]
    model: str = ""
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    """``format``: text, json_object or json_schema."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    """``effort`` is given to the template."""
    include: list[str] | None = None
    """``message.output_text.logprobs`` is what can be included."""
    stream: bool | None = None
    truncation: str | None = None
    # Extras, as of chats.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    priority: int = 0
    cache_salt: str = ""
    request_id: str = ""
    # Harmless here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
    # Refused where ignoring them would change the answer.
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    background_options: dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    context_management: Any = None
    moderation: dict[str, Any] | None = None
    access_programs: Any = None
    image: Any = None

    def refuse_what_changes_answers(self) -> None:
        """Refuses values of known parameters that are not offered.

        Raises:
            InvalidRequestError: with the name and what is possible.
        """
        kept = "nothing is kept here; send the whole conversation as input"
        refuse("previous_response_id", self.previous_response_id, (None,), kept)
        refuse("conversation", self.conversation, (None,), kept)
        refuse("background", self.background, (None, False), kept)
        refuse("background_options", self.background_options, (None,), kept)
        refuse("prompt", self.prompt, (None,), kept)
        refuse("max_tool_calls", self.max_tool_calls, (None,), "tools are called by the client")
        refuse("context_management", self.context_management, (None, []), kept)
        refuse("moderation", self.moderation, (None,), "nothing is moderated")
        refuse("access_programs", self.access_programs, (None,), "it is OpenAI's own")
        refuse("image", self.image, (None,), "answers are text")
        refuse("truncation", self.truncation, (None, "disabled"), "send a shorter input")
        unknown = [name for name in self.include or () if name != LOGPROBS]
        refuse("include", unknown, ([],), f"only {LOGPROBS} can be included")

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


def chat_from(request: ResponsesRequest) -> tuple[Chat, SamplingParams, Grammar | None]:
    """Reads a request.

    Raises:
        InvalidRequestError: what this route does not offer.
    """
    request.refuse_what_changes_answers()
    messages = (
        [Message(role="system", content=request.instructions)] if request.instructions else []
    )
    if isinstance(request.input, str):
        messages.append(Message(role="user", content=request.input))
    else:
        messages += _messages(request.input)
    tools = [_tool(place, spec) for place, spec in enumerate(request.tools or ())]
    effort = checked(ReasoningOptions, request.reasoning or {}, "reasoning").effort
    chat = Chat(
        messages=template_messages(messages),
        tools=tools,
        tool_choice=choice_from(request.tool_choice, bool(tools)),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        template_variables={"reasoning_effort": effort} if effort else {},
    )
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "ignore_eos")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    sampling = SamplingParams(
        max_tokens=request.max_output_tokens,
        logprobs=(request.top_logprobs or 0) if request.wants_logprobs else None,
        **given,
    )
    return chat, sampling, _grammar(request.text)


def _messages(items: list[dict[str, Any]]) -> Iterator[Message]:
    for place, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            fields = {name: item.get(name) for name in ("role", "content")}
            yield _checked(place, **fields)
        elif kind == "function_call":
            function = CalledFunction(
                name=str(item.get("name", "")), arguments=str(item.get("arguments", ""))
            )
            call = ToolCall(id=str(item.get("call_id", "")), function=function)
            yield Message(role="assistant", tool_calls=[call])
        elif kind == "function_call_output":
            call_id = str(item.get("call_id", ""))
            yield _checked(place, role="tool", content=item.get("output"), tool_call_id=call_id)
        elif kind == "reasoning":
            continue  # Of an earlier turn; templates leave it out.
        else:
            raise InvalidRequestError(
                f"input[{place}] is of the type {str(kind)[:40]!r}; messages, function calls and "
                "their outputs are taken",
                field=f"input[{place}].type",
            )


def _checked(place: int, **fields: Any) -> Message:
    try:
        return Message(**fields)
    except ValidationError as error:
        raise InvalidRequestError(
            f"input[{place}] is no message: {error.errors()[0]['msg'][:200]}",
            field=f"input[{place}]",
        ) from None


def _tool(place: int, spec: dict[str, Any]) -> Tool:
    if spec.get("type") != "function" or not isinstance(spec.get("name"), str):
        raise InvalidRequestError(
            f"tools[{place}] is of the type {str(spec.get('type'))[:40]!r} or has no name; only "
            "functions can be called here",
            field=f"tools[{place}]",
        )
    named = checked(NamedFunction, spec, f"tools[{place}]")
    return Tool(named.name, named.description or "", named.parameters, strict=bool(named.strict))


def _grammar(text: dict[str, Any] | None) -> Grammar | None:
    given = checked(TextOptions, text or {}, "text")
    refuse("text.verbosity", given.verbosity, (None, "medium"), "ask for it in a message")
    match given.format:
        case None | TextFormat(type="text"):
            return None
        case TextFormat(type="json_object"):
            return Grammar("json_object", "", "text.format")
        case TextFormat(type="json_schema", schema_=dict() as schema):
            made = take_grammar({"json_schema": schema})
            assert made is not None
            return Grammar(made.kind, made.text, "text.format")
    raise InvalidRequestError(
        "text.format is none of text, json_object, and json_schema with a schema",
        field="text.format",
    )


def routes(door: Door, chats: ChatEngine) -> APIRouter:
    """The route of responses."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: HttpRequest) -> Response:
        """Answers a conversation, in the form of OpenAI's Responses."""
        request_id = request_id_of(http, request.request_id, "resp_")
        made = Responding(door, chats, request, request_id)
        if request.stream:
            return EventStream(door.calls, request_id, made.events, names=NAMES)
        return await answer(http, door.calls, request_id, made.body, names=NAMES)

    return router


class Responding:
    """One request being answered."""

    def __init__(
        self, door: Door, chats: ChatEngine, request: ResponsesRequest, request_id: str
    ) -> None:
        """Does nothing yet."""
        self._door = door
        self._chats = chats
        self._request = request
        self._id = request_id
        self._created = int(time.time())
        self._items = Items()
        self._answer: ChatAnswer | None = None
        self._finished: Finished | None = None

    async def body(self) -> dict[str, Any]:
        """The whole response."""
        stream = await self._begin()
        async for _ in self._run(stream):
            pass
        return self._response()

    async def events(self) -> Events:
        """The response as named events."""
        return self._events(await self._begin())

    async def _events(self, stream: TextStream) -> Events:
        number = 0
        for kind in ("response.created", "response.in_progress"):
            event = {"type": kind, "sequence_number": number, "response": self._response()}
            yield sse(event, event=kind)
            number += 1
        async for made in self._run(stream):
            yield sse({**made, "sequence_number": number}, event=made["type"])
            number += 1
        response = self._response()
        kind = f"response.{response['status']}"
        yield sse({"type": kind, "sequence_number": number, "response": response}, event=kind)

    async def _run(self, stream: TextStream) -> AsyncIterator[Event]:
        answer = self._answer
        assert answer is not None, "events come after the beginning"
        async for _, output in self._door.outputs([stream]):
            if isinstance(output, Started):
                continue
            if isinstance(output, Delta):
                logprobs = []
                if self._request.wants_logprobs:
                    top = self._request.top_logprobs or 0
                    logprobs = chat_logprobs(output.logprobs, self._door.text.tokenizer, top)
                for event in self._items.push(
                    answer.push(output.text, len(output.token_ids)), logprobs
                ):
                    yield event
            else:
                self._finished = output
                for event in self._items.push(answer.finish(), []):
                    yield event
                whole = output.reason is FinishReason.STOP
                for event in self._items.close("completed" if whole else "incomplete"):
                    yield event

    async def _begin(self) -> TextStream:
        request = self._request
        self._door.info.check_name(request.model)
        chat, sampling, grammar = chat_from(request)
        call = GenerationCall(
            sampling=sampling,
            request_id=self._id,
            priority=request.priority,
            cache_salt=request.cache_salt,
            grammar=grammar,
        )
        stream, [self._answer] = await self._chats.ask(self._door, chat, call)
        return stream

    def _response(self) -> dict[str, Any]:
        request, finished = self._request, self._finished
        cut = finished is not None and finished.reason is FinishReason.LENGTH
        status = "in_progress" if finished is None else "incomplete" if cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._door.info.name,
            "output": self._items.done if finished is not None else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any] | None:
        finished, answer = self._finished, self._answer
        if finished is None or answer is None:
            return None
        return {
            "input_tokens": finished.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": finished.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": finished.output_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": finished.prompt_tokens + finished.output_tokens,
        }
