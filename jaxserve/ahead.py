"""Compiles every program of a launch ahead of it, into a directory that launches load them from.

    decide mesh and sizes -> find the page count -> compile (or load) -> copy out of the cache

No weights are read: programs depend on their shapes and formats alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import ServeConfig
from jaxserve.launch import open_configured
from jaxserve.resolve import configure_jax, resolve
from jaxserve.runner.executables import check_new
from jaxserve.sizing import Report, compile_wanted, make_model, silent, size_pool


@dataclass(frozen=True, kw_only=True)
class CompiledAhead:
    """What was written."""

    path: Path
    programs: int
    file_bytes: int
    pages: int
    """Of each data shard, the null page included; a launch with these programs has as many."""
    seconds: float


def compile_ahead(config: ServeConfig, out: Path, report: Report = silent) -> CompiledAhead:
    """Compiles what a launch with this config would, and writes it to a new directory.

    Args:
        config: of the launch.
        out: must not exist.
        report: hears of the stage ``compile``.

    Raises:
        LaunchError: a flag, a file or the machine has to change; the message says which and how.
    """
    start_s = time.perf_counter()
    check_new(out)  # Before anything is compiled for nothing.
    configure_jax(config)
    source = open_configured(config)
    try:
        plan = resolve(config, source.model_config(), source.formats)
    finally:
        source.close()
    runner = size_pool(config, plan, make_model(plan), None, report)
    compile_wanted(config, runner, report)
    assert runner.executables is not None
    keys = runner.program_keys()
    return CompiledAhead(
        path=out,
        programs=len(keys),
        file_bytes=runner.executables.copy_to(out, [key.file_name for key in keys]),
        pages=runner.config.cache.num_pages,
        seconds=time.perf_counter() - start_s,
    )
