"""Routes beside generation: models, health, version, tokens."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxserve.errors import InvalidRequestError, ModelNotFoundError
from jaxserve.frontend.chats import Chat, ChatEngine
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.http.answering import answer, request_id_of
from jaxserve.frontend.http.errors import response_of
from jaxserve.frontend.http.messages import ChatFields, choice_from, template_messages, tools_from
from jaxserve.frontend.http.requests import StrictModel


class TokenizeRequest(ChatFields):
    """Body of ``/tokenize``: a prompt, or the messages of a chat."""

    model: str = ""
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictModel):
    """Body of ``/detokenize``."""

    model: str = ""
    tokens: list[int]
    skip_special_tokens: bool = False


def routes(door: Door, chats: ChatEngine) -> APIRouter:
    """The routes of this file."""
    router = APIRouter()
    created, info, text = int(time.time()), door.info, door.text

    def model() -> dict[str, Any]:
        return {
            "id": info.name,
            "object": "model",
            "created": created,
            "owned_by": "jaxserve",
            "root": info.name,
            "parent": None,
            "max_model_len": info.context_tokens,
            "digest": info.model_digest,
        }

    @router.get("/v1/models")
    async def models() -> Response:
        """Lists the served model."""
        return JSONResponse({"object": "list", "data": [model()]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """Describes one model."""
        if name != info.name:
            return response_of(ModelNotFoundError(name[:200], info.name))
        return JSONResponse(model())

    async def health() -> Response:
        """Says whether the engine serves; 503 when it does not."""
        report = text.engine.health()
        body = {"status": "serving" if report.serving else "not serving", "detail": report.detail}
        return JSONResponse(body, 200 if report.serving else 503)

    for path in ("/health", "/healthz", "/ready", "/readyz"):
        router.add_api_route(path, health, methods=["GET"], name=path[1:])
        # Probes ask so, too; the description has each once.
        router.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)

    @router.get("/version")
    async def version() -> Response:
        """Names this version."""
        return JSONResponse({"version": info.server_version})

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest, http: HttpRequest) -> Response:
        """Returns the tokens of a text or chat, as generation would use them."""

        async def work() -> dict[str, Any]:
            info.check_name(request.model)
            call, special = _prompt_of(request, chats)
            tokens = list(await door.encode(call, add_special_tokens=special))
            made = {
                "count": len(tokens),
                "max_model_len": info.context_tokens,
                "tokens": tokens,
            }
            if request.return_token_strs:
                made["token_strs"] = [text.tokenizer.token_text(token) for token in tokens]
            return made

        return await answer(http, door.calls, request_id_of(http, "", "tokenize-"), work)

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, http: HttpRequest) -> Response:
        """Returns the text of tokens."""

        async def work() -> dict[str, Any]:
            info.check_name(request.model)
            skips = request.skip_special_tokens
            return {"prompt": text.decode(request.tokens, skip_special_tokens=skips)}

        return await answer(http, door.calls, request_id_of(http, "", "detokenize-"), work)

    return router


def _prompt_of(request: TokenizeRequest, chats: ChatEngine) -> tuple[GenerationCall, bool]:
    if (request.prompt is None) == (not request.messages):
        raise InvalidRequestError("send exactly one of prompt and messages", field="prompt")
    if request.prompt is not None:
        special = request.add_special_tokens is not False
        return GenerationCall(text=request.prompt), special
    request.refuse_templates()
    tools = tools_from(request.tools or ())
    adds = request.add_generation_prompt
    chat = Chat(
        messages=template_messages(request.messages),
        tools=tools,
        tool_choice=choice_from(request.tool_choice, bool(tools)),
        template_variables=request.chat_template_kwargs or {},
        add_generation_prompt=adds if adds is not None else True,
        continue_final_message=bool(request.continue_final_message),
    )
    return chats.call_of(chat, GenerationCall()), False
