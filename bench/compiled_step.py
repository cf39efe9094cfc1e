"""Compiles whole steps of a model for H200s that are not there, and reads what they consist of.

    python -m bench.compiled_step [--model llama-3.1-8b] [--out FILE]

Each step is the program that a launch on such a mesh would compile: 64 rows that decode, or 2,048
tokens of prompts, over pages of 64 tokens. It fails when the pool does not stay in place, when a
layer's matrix is copied out of its stack, when a layer has other than two all-reduces, when
attention, the append or a quantized product is not the Mosaic kernel, or, with the usual model,
when a layer takes more launches or the step more temporaries than ``STEPS`` says. It takes the
wheels of the extra ``aot-gpu``.

Nothing is tuned for a device that is not there: products are cuBLASLt's, as they would be chosen
without measuring.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before JAX is imported: nothing runs here.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp

from bench import common
from bench.machine_code import large_copies, loop_launches, more_than
from jaxserve.engine.step import StepShape
from jaxserve.models.decoder import Model
from jaxserve.models.presets import preset
from jaxserve.planning import aot
from jaxserve.planning.devices import device_facts
from jaxserve.runner.cache import CacheShape, abstract_state
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.runner import Runner
from jaxserve.weights.packed import held_formats, rounded_formats
from pallas_kernels.paged_attention import FORMATS
from pallas_kernels.quantized_matmul import Format
from sharding.mesh import parse_mesh

DEVICE = "h200"
ROWS, PLACES, PAGE_TOKENS, TABLE_WIDTH, PAGES = 64, 2048, 64, 128, 8192
USUAL_MODEL = "llama-3.1-8b"
"""That limits are of."""
NOT_INSTALLED = 3
"""The exit status where nothing can be compiled, as ``bench.compiled`` has it."""
COPY_BYTES = 1 << 20
"""A copy of more is of a matrix or of pages."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One program of one launch, and what it may take with the usual model.

    Limits are a little above what was measured when they were set: they are to be lowered with
    what they limit, and raised only with a reason.
    """

    mesh: str
    kv_dtype: str
    kind: str
    weights: Format | None = None
    """The format of quantized ones, which are repacked for the kernel."""
    most_launches: int
    """Of a turn of the loop over layers."""
    most_temporary_bytes: int

    @property
    def label(self) -> dict[str, str]:
        """Names it."""
        weights = self.weights or "bfloat16"
        return {"mesh": self.mesh, "kv_dtype": self.kv_dtype, "weights": weights}


MIB = 1 << 20
STEPS = (
    Step(
        mesh="1x1",
        kv_dtype="bfloat16",
        kind="decode",
        most_launches=23,
        most_temporary_bytes=164 * MIB,
    ),
    Step(
        mesh="1x1",
        kv_dtype="int8",
        kind="decode",
        most_launches=24,
        most_temporary_bytes=164 * MIB,
    ),
    Step(
        mesh="1x1",
        kv_dtype="fp8",
        kind="decode",
        most_launches=23,
        most_temporary_bytes=164 * MIB,
    ),
    Step(
        mesh="1x1",
        kv_dtype="bfloat16",
        kind="decode",
        weights="int4",
        most_launches=30,
        most_temporary_bytes=197 * MIB,
    ),
    Step(
        mesh="1x1",
        kv_dtype="bfloat16",
        kind="prefill",
        most_launches=23,
        most_temporary_bytes=194 * MIB,
    ),
    Step(
        mesh="1x4",
        kv_dtype="bfloat16",
        kind="decode",
        most_launches=26,
        most_temporary_bytes=42 * MIB,
    ),
    Step(
        mesh="1x4",
        kv_dtype="bfloat16",
        kind="prefill",
        most_launches=26,
        most_temporary_bytes=115 * MIB,
    ),
)


def make_runner(
    model: str, mesh: str, kv_dtype: str, weights: Format | None = None, pages: int = PAGES
) -> Runner:
    """Makes the runner of a mesh of H200s that are not there."""
    config, shape, facts = preset(model), parse_mesh(mesh), device_facts(DEVICE)
    formats = dict[str, Format]()
    if weights is not None:
        some = rounded_formats(config, model, weights)
        formats = held_formats(some, config, has_native=False, tensor=shape.tensor)
    step = StepShape(
        max_rows=ROWS,
        table_width=TABLE_WIDTH,
        vocab_size=config.vocab_size,
        decode_buckets=(ROWS,),
        prefill_buckets=((16, PLACES),),
        score_buckets=(),
        data_shards=shape.data,
    )
    cache = CacheShape(
        num_pages=pages,
        page_tokens=PAGE_TOKENS,
        max_rows=ROWS,
        dtype=FORMATS[kv_dtype].dtype if kv_dtype in FORMATS else jnp.dtype(kv_dtype),
        data_shards=shape.data,
    )
    runner_config = RunnerConfig(
        step=step,
        cache=cache,
        dtype=jnp.dtype(jnp.bfloat16),
        activations=jnp.dtype(jnp.bfloat16),
        repacked=bool(formats),
        # Without a device to time it on, XLA tiles Triton's products as nobody would.
        compiler_options={"xla_gpu_enable_triton_gemm": False},
    )
    laid_out = Model(config, shape.tensor, formats)
    return Runner(laid_out, runner_config, aot.absent_mesh(facts, shape))


def pool_bytes(runner: Runner) -> int:
    """Bytes of pages on each device."""
    pools = abstract_state(runner.config.cache, runner.model.config).pools
    return _bytes(pools) // runner.mesh_shape["tensor"]


def compile_step(runner: Runner, key: ProgramKey, limits: Step | None) -> dict[str, Any]:
    """Compiles one program and returns what it consists of.

    Args:
        runner: Of the launch.
        key: Of its program.
        limits: What it may take; None: anything.

    Raises:
        ValueError: it is not as it should be; says how.
    """
    began = time.monotonic()
    compiled = runner.trace(key).lower().compile(runner.compiler_options)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    pools = pool_bytes(runner)
    row = {
        "program": str(key),
        "kernels": runner.kernels(),
        "launches_of_a_layer": loop_launches(text),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "pool_bytes": pools,
        "seconds": round(time.monotonic() - began, 1),
    }
    wrong = [
        f"{bytes_} bytes are copied: {line}" for bytes_, line in large_copies(text, COPY_BYTES)
    ]
    if row["aliased_bytes"] < pools:
        wrong.append(f"{row['aliased_bytes']} of the pool's {pools} bytes stay in place")
    reduces = 2 if runner.mesh_shape["tensor"] > 1 else 0
    if row["launches_of_a_layer"].get("all-reduce", 0) != reduces:
        wrong.append(f"a layer has other than {reduces} all-reduces: {row['launches_of_a_layer']}")
    families = ("paged_attention", "rope_append")
    if runner.config.repacked:
        families += ("quantized_matmul",)
    wrong += [
        f"{family} is {row['kernels'].get(family)} and not Mosaic's alone"
        for family in families
        if row["kernels"].get(family) != ["mosaic"]
    ]
    if limits is not None:
        wrong += more_than(row, limits.most_launches, limits.most_temporary_bytes)
    if wrong:
        raise ValueError("; ".join(wrong))
    return row


def main(words: Sequence[str] | None = None) -> int:
    """Compiles the steps; returns the exit status: 1 if some are not as they should be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled_step", description="Whole steps, compiled for absent H200s."
    )
    parser.add_argument("--model", default=USUAL_MODEL, help="a preset; default: %(default)s")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args(words)
    if reason := aot.why_not(device_facts(DEVICE), parse_mesh("1x4")):
        print(f"{reason}; `make prove-compile` fetches what it takes", file=sys.stderr)
        return NOT_INSTALLED
    failed = 0
    for step in STEPS:
        about = {"model": options.model, "device": DEVICE, **step.label}
        try:
            runner = make_runner(options.model, step.mesh, step.kv_dtype, step.weights)
            (key,) = (key for key in runner.program_keys() if key.kind == step.kind)
            row = compile_step(runner, key, step if options.model == USUAL_MODEL else None)
        except Exception as error:
            failed += 1
            print(f"FAIL {about}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        else:
            common.write(about | row | {"commit": common.commit()}, options.out)
    return 1 if failed else 0


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main())
