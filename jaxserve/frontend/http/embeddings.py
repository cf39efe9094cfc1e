"""``/v1/embeddings``: what texts mean, as vectors of length 1."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.door import Door
from jaxserve.frontend.generation import EMBEDDING, GenerationCall, check_prompts
from jaxserve.frontend.http.answering import answer, request_id_of
from jaxserve.frontend.http.requests import StrictModel


class EmbeddingRequest(StrictModel):
    """Body of ``/v1/embeddings``."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = ""
    dimensions: int | None = None
    """Accepted where it is the model's own width: nothing is shortened."""
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0

    def calls(self, request_id: str) -> list[GenerationCall]:
        """A call for each text.

        Raises:
            InvalidRequestError: there are none, or too many.
        """
        given: Any = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        check_prompts(len(given), field="input")
        return [
            GenerationCall(
                text=prompt if isinstance(prompt, str) else None,
                token_ids=None if isinstance(prompt, str) else prompt,
                embed=True,
                sampling=EMBEDDING,
                request_id=f"{request_id[:112]}-{place}",
                truncate_prompt_tokens=self.truncate_prompt_tokens,
                priority=self.priority,
            )
            for place, prompt in enumerate(given)
        ]


def routes(door: Door) -> APIRouter:
    """The route of embeddings."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest, http: HttpRequest) -> Response:
        """Embeds one or several texts."""
        request_id = request_id_of(http, "", "embd-")

        async def work() -> dict[str, Any]:
            door.info.check_name(request.model)
            built = [await door.build(call) for call in request.calls(request_id)]
            vectors = await door.embed(built)
            width = len(vectors[0])
            if request.dimensions not in (None, width):
                raise InvalidRequestError(
                    f"dimensions is {request.dimensions} and this model's vectors have {width}; "
                    "leave it out",
                    field="dimensions",
                )
            tokens = sum(len(made.prompt) for made, _ in built)
            return {
                "object": "list",
                "model": door.info.name,
                "data": [
                    {
                        "object": "embedding",
                        "index": place,
                        "embedding": _encoded(vector, request.encoding_format),
                    }
                    for place, vector in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }

        names = {"token_ids": "input", "prompt": "input"}
        return await answer(http, door.calls, request_id, work, names=names)

    return router


def _encoded(vector: Any, form: str | None) -> Any:
    """Floats, or their bytes as OpenAI's client asks for them."""
    if form == "base64":
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return list(vector)
