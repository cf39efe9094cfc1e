"""The programs that a server is ready without: made beside serving, cheapest first.

    ready with few ──> one more is made ──> Engine.use_shape ──> ... ──> all are there
                            └─ or cannot be: that is said, and serving goes on with what there is

A program that is being compiled cannot be interrupted, so whoever closes waits for it; a server
that is stopped waits no longer than for anything else.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from jaxserve.config import ServeConfig
from jaxserve.engine.engine import Engine
from jaxserve.runner.compiling import cores
from jaxserve.runner.runner import Runner
from jaxserve.sizing import tidy_store

logger = logging.getLogger(__name__)

INTERPRETER_ENDS = (
    "cannot schedule new futures after interpreter shutdown",
    "cannot schedule new futures after shutdown",
    "can't start new thread at interpreter shutdown",
    "can't register atexit after shutdown",
)
"""What thread pools say then; Python has no public flag for it."""


class LatePrograms:
    """A thread that makes what is missing, and tells the engine of each program."""

    def __init__(self, config: ServeConfig, runner: Runner, engine: Engine) -> None:
        """Makes it; ``start`` begins.

        Args:
            config: names the store of programs.
            runner: is ready, with its first programs.
            engine: packs into their buckets.
        """
        self._config = config
        self._runner = runner
        self._engine = engine
        self._cancelled = threading.Event()
        self._complete = False
        self._thread = threading.Thread(
            target=self._run, name="jaxserve-late-programs", daemon=True
        )

    def start(self) -> None:
        """Begins with the cheapest."""
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Waits until no more will come, so long at most; returns whether all are there."""
        self._thread.join(timeout_s)
        return self._complete

    @property
    def busy(self) -> bool:
        """Whether a program is being made."""
        return self._thread.is_alive()

    def cancel(self) -> None:
        """Lets what has begun end, and begins no more. Does not wait."""
        self._cancelled.set()

    def close(self) -> None:
        """The same, and waits for what has begun. Safe to call again."""
        self.cancel()
        self._thread.join()

    def _run(self) -> None:
        start_s = time.perf_counter()
        total = len(self._runner.program_keys())
        try:
            self._make()
        except Exception as error:
            if str(error) in INTERPRETER_ENDS:
                return  # A script that closed nothing is ending.
            there = total - len(self._runner.missing_keys())
            logger.exception(
                "a program cannot be made; serving goes on with %d of %d", there, total
            )
            return
        if self._complete:
            seconds = time.perf_counter() - start_s
            logger.info("all %d programs are there, %.1f s after ready", total, seconds)

    def _make(self) -> None:
        runner = self._runner
        # Programs at a time: half of the cores have requests to serve.
        workers = max(1, cores() // 2)
        making = runner.compile(runner.missing_keys(), workers=workers)
        with contextlib.closing(making):
            while not self._cancelled.is_set() and next(making, None) is not None:
                self._engine.use_shape(runner.loaded_shape)
        if not runner.missing_keys():
            self._complete = True
            tidy_store(self._config, runner)
