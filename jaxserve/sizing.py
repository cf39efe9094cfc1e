"""What a launch has before its weights: the page count, and a runner whose programs fit beside it.

The page count is part of every program's shape, and how many pages fit depends on what programs
need beside them; so the largest are compiled first, or loaded from where a launch has left them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxserve.config import ServeConfig
from jaxserve.errors import ExecutablesError, MemoryPlanError
from jaxserve.models.decoder import Model
from jaxserve.planning.memory import budget_of
from jaxserve.resolve import LaunchPlan
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.executables import (
    ExecutableFolder,
    ExecutableStore,
    check_key,
    open_written,
)
from jaxserve.runner.fingerprint import fingerprint
from jaxserve.runner.group import Group
from jaxserve.runner.memory import PageCountMemory, host_free_bytes, plan_memory
from jaxserve.runner.runner import Runner
from pallas_kernels import native

Report = Callable[[str, int, int, str], None]
"""``report(stage, done, total, detail)``; stages: ``compile``, ``weights``, ``ready``."""


Wanted = Callable[[Runner], list[ProgramKey]]
"""The programs that a launch is to have before it is ready; the largest are among them."""


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """A ``Report`` that says nothing."""


def make_model(plan: LaunchPlan) -> Model:
    """Lays the model out for the mesh, with the weights that are held quantized."""
    return Model(plan.model, plan.mesh.shape["tensor"], plan.formats)


def size_pool(
    config: ServeConfig,
    plan: LaunchPlan,
    model: Model,
    group: Group | None,
    report: Report,
    wanted: Wanted = Runner.program_keys,
) -> Runner:
    """Finds the page count: compiles the largest programs to learn what they need beside it.

    Of several hosts the one with the least room decides. ``wanted`` is what ``compile_wanted`` will
    be called with; here its programs are counted.

    Raises:
        LaunchError: what has to be held does not fit, or the programs that were compiled ahead are
            not those of this launch.
    """
    if config.executables is not None:
        return _sized_by(config.executables, plan, model, report, wanted)

    def agree(pages: int) -> int:
        return pages if group is None else group.agree("pages", pages)

    memory = PageCountMemory(config.cache_dir, _pages_key(config, plan, model))
    # Before anything is compiled, temporaries are unknown: the first guess takes none.
    num_pages = agree(memory.recall() or _fitting(plan, make_runner(plan, model, _least(plan)), 0))
    while True:
        runner = make_runner(plan, model, num_pages)
        if group is None:
            runner.use(ExecutableStore(config.cache_dir).folder(fingerprint(runner)))
        compile_largest(runner, report, wanted)
        fitting = agree(_fitting(plan, runner, runner.temporary_bytes()))
        if num_pages <= fitting:
            memory.remember(num_pages)
            return runner
        num_pages = fitting


def compile_largest(runner: Runner, report: Report, wanted: Wanted) -> None:
    """Makes the programs that need most beside their arguments."""
    largest, total = runner.largest_keys(), len(wanted(runner))
    report("compile", 0, total, " and ".join(map(str, largest)))
    for done, key in enumerate(runner.compile(largest), start=1):
        report("compile", done, total, str(key))


def compile_wanted(
    config: ServeConfig,
    runner: Runner,
    report: Report,
    wanted: Wanted = Runner.program_keys,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Makes the other programs that are wanted, small ones first.

    Args:
        config: names the store, which is tidied when every program is there.
        runner: has its largest programs.
        report: hears of each program.
        wanted: says which.
        meanwhile: called after each.
    """
    keys = wanted(runner)
    for done, key in enumerate(runner.compile(keys), start=1 + len(runner.largest_keys())):
        report("compile", done, len(keys), str(key))
        meanwhile()
    if not runner.missing_keys():
        tidy_store(config, runner)


def tidy_store(config: ServeConfig, runner: Runner) -> None:
    """Removes what was not launched for longest from the store that holds the programs, if any."""
    if runner.executables is not None and config.executables is None:
        ExecutableStore(config.cache_dir).evict(runner.executables)


def make_runner(plan: LaunchPlan, model: Model, num_pages: int) -> Runner:
    """Makes the runner of a launch with so many pages in each data shard."""
    cache = CacheShape(
        num_pages=num_pages,
        page_tokens=plan.page_tokens,
        max_rows=plan.step.max_rows,
        dtype=plan.kv_dtype,
        data_shards=plan.step.data_shards,
    )
    runner_config = RunnerConfig(
        step=plan.step,
        cache=cache,
        dtype=plan.dtype,
        activations=plan.activations,
        kernels=plan.kernels,
        unrolled_rows=plan.unrolled_rows,
        repacked=plan.repacked,
    )
    return Runner(model, runner_config, plan.mesh)


def free_bytes(plan: LaunchPlan) -> int:
    """What is free now on each device of a launch, or on the fullest."""
    if plan.platform == "cpu":
        return host_free_bytes() // plan.mesh.devices.size
    stats = [device.memory_stats() or {} for device in plan.mesh.local_devices]
    return min(entry["bytes_limit"] - entry["bytes_in_use"] for entry in stats)


def _sized_by(path: Path, plan: LaunchPlan, model: Model, report: Report, wanted: Wanted) -> Runner:
    """The runner of a directory that ``jaxserve compile`` has written, with its page count."""
    written = open_written(path)
    try:
        num_pages = int(written["cache.num_pages"])
    except (KeyError, ValueError) as error:
        raise ExecutablesError(
            f"--executables {path} does not say how many pages: {error}"
        ) from error
    runner = make_runner(plan, model, num_pages)
    needed = fingerprint(runner)
    check_key(path, written, needed)
    runner.use(ExecutableFolder(path, needed, must_hold=True))
    compile_largest(runner, report, wanted)
    least = _least(plan)
    budget = budget_of(runner, free_bytes(plan), plan, temporary_bytes=runner.temporary_bytes())
    left = budget.free_bytes - budget.weight_bytes - budget.row_state_bytes - budget.temporary_bytes
    held = num_pages * budget.page_bytes
    if held > left or num_pages < least:
        raise MemoryPlanError(
            f"--executables {path} was compiled for {num_pages} pages of "
            f"{budget.page_bytes / 2**20:,.2f} MiB, and {max(left, 0) / 2**20:,.0f} MiB are left "
            "for them here; compile again with a smaller --kv-memory, or free memory"
        )
    return runner


def _least(plan: LaunchPlan) -> int:
    return math.ceil(plan.context_tokens / plan.page_tokens) + 1


def _fitting(plan: LaunchPlan, runner: Runner, temporary_bytes: int) -> int:
    most = plan.step.max_rows * plan.step.table_width + 1
    budget = budget_of(runner, free_bytes(plan), plan, temporary_bytes=temporary_bytes)
    return plan_memory(budget, least_pages=_least(plan), most_pages=most)


def _pages_key(config: ServeConfig, plan: LaunchPlan, model: Model) -> str:
    """Names everything that the page count depends on, free memory excepted."""
    facts: list[Any] = [
        asdict(plan.model),
        str(plan.mesh.shape),
        plan.platform,
        plan.dtype.name,
        plan.kv_dtype.name,
        plan.activations.name,
        model.formats,
        asdict(plan.step),
        plan.page_tokens,
        config.kv_memory_bytes,
        config.kv_memory_fraction,
        plan.unrolled_rows,
        plan.repacked,
        plan.kernels,
        native.build_name(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
