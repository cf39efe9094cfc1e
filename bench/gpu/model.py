"""Decode steps of whole models with random weights, through the ``Runner`` that serves.

Only the programs that are measured are compiled: a server's full grid would take longer than all
of its steps here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.gpu.limits import decode_limit_s
from bench.gpu.part import Number, Setting
from jaxserve.config import ServeConfig
from jaxserve.launch import open_configured
from jaxserve.models.decoder import Model, Params
from jaxserve.resolve import LaunchPlan, configure_jax, resolve
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.measure import decode_inputs
from jaxserve.runner.runner import Runner
from jaxserve.weights.source import ModelSource

ROWS = (1, 8, 64, 256)
TOKENS = 1024
"""Of each row."""
REPEATS = 3
COMMAND_BUFFERS = {
    "as XLA chooses": None,
    "none": "",
    "kernels": "FUSION,CUSTOM_CALL",
    "kernels and libraries": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL",
    "loops too": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE",
}
"""What may be recorded once and started as one: values of ``xla_gpu_enable_command_buffer``."""


def serve_config(setting: Setting, model: str, **sizes: Any) -> ServeConfig:
    """Returns what a launch is asked for.

    Args:
        setting: a dry run takes the tiny model and sizes of its own instead.
        model: a name for ``dummy:``.
        sizes: fields of ``ServeConfig``.
    """
    if setting.dry:
        model = "tiny-llama"
        sizes = {
            "context_tokens": 256,
            "max_rows": 4,
            "step_tokens": 16,
            "page_tokens": 16,
            "kv_memory_bytes": 2**23,
            "dtype": "float32",
            "device": "cpu",
        }
    unlimited = {"max_waiting_requests": 10**6, "max_waiting_tokens": 10**9}
    return ServeConfig(
        model=f"dummy:{model}",
        prompt_logprobs=False,
        ready_with="all",
        cache_dir=setting.cache_dir,
        assets_dir=setting.cache_dir,
        offline=True,
        **unlimited,
        **sizes,
    )


@dataclass(frozen=True)
class Decoding:
    """A model whose decode steps are measured, without programs or a pool yet."""

    plan: LaunchPlan
    source: ModelSource
    model: Model
    rows: tuple[int, ...]
    tokens: int
    """Of each row."""

    def runner(self, **options: Any) -> Runner:
        """Returns a runner of these rows; ``options`` are fields of ``RunnerConfig``."""
        plan = self.plan
        most = max(self.rows)
        step = replace(
            plan.step, max_rows=most, decode_buckets=self.rows, prefill_buckets=(), score_buckets=()
        )
        cache = CacheShape(
            num_pages=1 + most * -(-self.tokens // plan.page_tokens),
            page_tokens=plan.page_tokens,
            max_rows=most,
            dtype=plan.kv_dtype,
        )
        config = RunnerConfig(
            step=step,
            cache=cache,
            dtype=plan.dtype,
            **{"unrolled_rows": plan.unrolled_rows, **options},
        )
        return Runner(self.model, config, plan.mesh)

    def params(self, runner: Runner) -> Params:
        """Returns random weights, where the runner wants them."""
        return self.source.load(
            self.model,
            dtype=self.plan.dtype,
            shardings=runner.param_shardings,
            progress=lambda done, total: None,
        )

    def make_ready(self, runner: Runner, params: Params) -> float:
        """Compiles and allocates; returns the seconds that compiling took."""
        start_s = time.perf_counter()
        keys = [ProgramKey(0, "set_row", 1, 0)]
        keys += [ProgramKey(rows, "decode", rows, 1) for rows in self.rows]
        list(runner.compile(keys))
        seconds = time.perf_counter() - start_s
        runner.make_ready(params)
        return seconds

    def step_s(self, runner: Runner, rows: int, steps: int) -> tuple[float, float]:
        """Returns the seconds of a step in a row of them, and those that the host needs for it."""
        cache = runner.config.cache
        inputs = decode_inputs(
            runner.config.step, cache.num_pages, cache.page_tokens, rows, self.tokens
        )
        runner.dispatch(inputs).wait()
        device_s, host_s = [], []
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            handles = [runner.dispatch(inputs) for _ in range(steps)]
            host_s.append((time.perf_counter() - start_s) / steps)
            handles[-1].wait()
            device_s.append((time.perf_counter() - start_s) / steps)
        return statistics.median(device_s), min(host_s)


def open_decoding(setting: Setting, model: str, rows: tuple[int, ...], undo: ExitStack) -> Decoding:
    """Opens a model.

    Args:
        setting: of the run.
        model: a name for ``dummy:``.
        rows: of the decode programs, ascending; a dry run takes one of its own.
        undo: closes it.
    """
    config = serve_config(setting, model, context_tokens=TOKENS, max_rows=max(rows))
    configure_jax(config)
    source = open_configured(config)
    undo.callback(source.close)
    plan = resolve(config, source.model_config())
    layout = Model(plan.model, plan.mesh.shape["tensor"])
    return Decoding(plan, source, layout, setting.pick(rows, (4,)), setting.pick(TOKENS, 64))


def _decode(setting: Setting, model: str) -> Iterator[Number]:
    """Milliseconds of a step by rows, its device time and the host's part."""
    with ExitStack() as undo:
        decoding = open_decoding(setting, model, ROWS, undo)
        runner = decoding.runner()
        params = decoding.params(runner)
        yield Number("compile", decoding.make_ready(runner, params), "s")
        for rows in decoding.rows:
            step_s, host_s = decoding.step_s(runner, rows, setting.pick(16, 2))
            limit = None
            if setting.facts is not None:
                limit = decode_limit_s(runner, rows, decoding.tokens, setting.facts) * 1e3
            yield Number(f"step of {rows} rows at {decoding.tokens}", step_s * 1e3, "ms", limit)
            yield Number(f"dispatch of {rows} rows", host_s * 1e3, "ms")
        runner.close()


decode_1b = partial(_decode, model="llama-3.2-1b")
decode_8b = partial(_decode, model="llama-3.1-8b")


def layers(setting: Setting) -> Iterator[Number]:
    """A loop over stacked layers against one program with every layer in it."""
    with ExitStack() as undo:
        decoding = open_decoding(setting, "llama-3.2-1b", (1, 64), undo)
        params = decoding.params(decoding.runner())
        for name, unrolled_rows in {"loop": 0, "unrolled": max(decoding.rows)}.items():
            runner = decoding.runner(unrolled_rows=unrolled_rows)
            yield Number(f"{name}: compile", decoding.make_ready(runner, params), "s")
            for rows in decoding.rows:
                step_s, host_s = decoding.step_s(runner, rows, setting.pick(16, 2))
                yield Number(f"{name}: step of {rows} rows", step_s * 1e3, "ms")
                yield Number(f"{name}: dispatch of {rows} rows", host_s * 1e3, "ms")
            runner.close()


def command_buffers(setting: Setting) -> Iterator[Number]:
    """A decode step of few rows under each set of what XLA records in command buffers."""
    with ExitStack() as undo:
        decoding = open_decoding(setting, "llama-3.2-1b", (1, 8), undo)
        params = decoding.params(decoding.runner())
        for name in setting.pick(tuple(COMMAND_BUFFERS), ("as XLA chooses", "loops too")):
            kinds = COMMAND_BUFFERS[name]
            options = {} if kinds is None else {"xla_gpu_enable_command_buffer": kinds}
            runner = decoding.runner(compiler_options=options)
            decoding.make_ready(runner, params)
            for rows in decoding.rows:
                step_s, host_s = decoding.step_s(runner, rows, setting.pick(32, 2))
                yield Number(f"{name}: step of {rows} rows", step_s * 1e3, "ms")
                yield Number(f"{name}: dispatch of {rows} rows", host_s * 1e3, "ms")
            runner.close()
