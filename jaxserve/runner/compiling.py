"""Counts what XLA compiles in this process, and refuses it when it must not happen.

``jax.monitoring`` reports every backend compilation and every persistent-cache hit and miss of the
whole process, whoever caused it, so the counter cannot be fooled by a program that the runner does
not know of.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_MISS_EVENT = "/jax/compilation_cache/cache_misses"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileAfterReadyError(RuntimeError):
    """Strict mode: something was compiled after the server had said it was ready."""


class CompileCounter:
    """Process-wide counts. ``instance()`` registers the listeners once."""

    _instance: CompileCounter | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        """Registers the listeners; use ``instance``, because they cannot be taken back."""
        self.compiles = 0
        """Programs handed to XLA or taken from the persistent cache."""
        self.unplanned = 0
        """Those of them that nobody meant to happen after ready."""
        self.cache_hits = 0
        self.cache_misses = 0
        self.strict = False
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    @classmethod
    def instance(cls) -> CompileCounter:
        """The process's counter; listeners cannot be taken back, so there is only one."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def _on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:  # Several threads compile, and a count that is lost is a false alarm.
                self.compiles += 1
                self.unplanned += not _this_thread.plans
            if self.strict and not _this_thread.plans:
                raise CompileAfterReadyError(
                    "a program was compiled after ready (strict mode): call compiled programs "
                    "with the shapes they were compiled for; JAX_LOG_COMPILES=1 names the function"
                )

    def _on_event(self, event: str, **_: object) -> None:
        self.cache_hits += event == _CACHE_HIT_EVENT
        self.cache_misses += event == _CACHE_MISS_EVENT


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def planned_compiles() -> Generator[None]:
    """Within the block what this thread compiles is meant to be, also after ready.

    Programs of the grid may be made beside serving (``late.py``); any other compilation after ready
    is still one that a request waits for.
    """
    before, _this_thread.plans = _this_thread.plans, True
    try:
        yield
    finally:
        _this_thread.plans = before


class _ThisThread(threading.local):
    plans = False


_this_thread = _ThisThread()
