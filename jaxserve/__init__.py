"""jaxserve serves language models from JAX over gRPC, from one continuous-batching loop.

Public names are loaded when they are first used, so that ``from jaxserve import Client`` does not
start an accelerator runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxserve.version import __version__

if TYPE_CHECKING:
    from jaxserve import errors
    from jaxserve.config import ServeConfig
    from jaxserve.engine.request import FinishReason, SamplingParams
    from jaxserve.errors import JaxserveError
    from jaxserve.frontend.client import AsyncClient, Client
    from jaxserve.llm import LLM

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "FinishReason",
    "JaxserveError",
    "SamplingParams",
    "ServeConfig",
    "__version__",
    "errors",
]

_HOME = {
    "LLM": "jaxserve.llm",
    "AsyncClient": "jaxserve.frontend.client",
    "Client": "jaxserve.frontend.client",
    "FinishReason": "jaxserve.engine.request",
    "JaxserveError": "jaxserve.errors",
    "SamplingParams": "jaxserve.engine.request",
    "ServeConfig": "jaxserve.config",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("jaxserve.errors")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
