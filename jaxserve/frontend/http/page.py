"""``/``: a page to talk to the model and to watch the engine. It loads nothing from elsewhere.

The files are plain HTML, CSS and JavaScript modules in ``page/``, served as they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    # Scripts, styles and requests of this server only, and none that stand within the page: what a
    # model writes can never become one.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def files() -> dict[str, tuple[bytes, str]]:
    """Returns name -> content and media type of every file of the page."""
    folder = resources.files("jaxserve.frontend.http") / "page"
    return {
        item.name: (item.read_bytes(), TYPES[item.name.rpartition(".")[2]])
        for item in folder.iterdir()
        if item.name.rpartition(".")[2] in TYPES
    }


def routes() -> APIRouter:
    """The page and each of its files, read once: no path that a client sends is ever opened."""
    router = APIRouter()
    for name, (content, media_type) in files().items():
        path = "/" if name == "index.html" else f"/page/{name}"
        answer = _answering(content, media_type)
        router.add_api_route(path, answer, methods=["GET"], include_in_schema=False)
    return router


def _answering(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, headers={**HEADERS, "content-type": media_type})

    return answer
