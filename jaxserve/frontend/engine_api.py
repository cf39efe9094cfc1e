"""What a front end needs from an engine, and no more.

``jaxserve.engine.engine.Engine`` fits by shape. Front ends name these protocols instead of the
class, so that a scripted double can stand in for it and a front end can move to another process.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol, runtime_checkable

import numpy as np

from jaxserve.engine.measures import EngineMeasures
from jaxserve.engine.page_news import PageFeed
from jaxserve.engine.request import Request
from jaxserve.engine.stats import EngineStats
from jaxserve.engine.stream import TokenStream, Waker


@runtime_checkable
class LimitsApi(Protocol):
    """Sizes that are fixed at launch."""

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids go from 0 to this less 1."""
        ...


@runtime_checkable
class HealthApi(Protocol):
    """Whether the engine makes progress."""

    @property
    def serving(self) -> bool:
        """False when it is dead, draining or stuck."""
        ...

    @property
    def detail(self) -> str:
        """One sentence on why; empty when nothing is wrong."""
        ...


@runtime_checkable
class EngineApi(Protocol):
    """The engine as seen from a door. Every method may be called from any thread."""

    @property
    def limits(self) -> LimitsApi:
        """Sizes that are fixed at launch."""
        ...

    @property
    def idle(self) -> bool:
        """True when nothing is queued or running."""
        ...

    def submit(self, request: Request, waker: Waker) -> TokenStream:
        """Takes a request in without waiting, or raises the jaxserve error that says why not."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a live request, or raises ``RequestNotFoundError``."""
        ...

    def stats(self) -> EngineStats:
        """Returns the counters as of the last step."""
        ...

    def measures(self) -> EngineMeasures:
        """Returns the distributions of what has happened since the start."""
        ...

    def pages(self) -> Future[list[np.ndarray]]:
        """Asks for the state of every page; see ``Engine.pages``."""
        ...

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        ...

    def health(self) -> HealthApi:
        """Says whether the engine makes progress."""
        ...


@runtime_checkable
class PagesApi(Protocol):
    """An engine that tells which pages a prompt may find. Not every double has it."""

    def watch_pages(self, feed: PageFeed) -> None:
        """Gives a feed all pages that can be found, and every change from then on."""
        ...

    def unwatch_pages(self, feed: PageFeed) -> None:
        """Gives a feed nothing more."""
        ...
