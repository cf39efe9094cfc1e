"""What will run: a ``ServeConfig``, the model's config and the devices become a ``LaunchPlan``.

Everything here is decided before anything is compiled or loaded; ``launch`` builds what it says,
and ``jaxserve plan`` predicts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import ServeConfig, decode_buckets, prefill_buckets, score_buckets
from jaxserve.engine.step import CALL_PLACES, StepShape
from jaxserve.errors import ConfigError, MeshError
from jaxserve.models.config import ModelConfig
from jaxserve.models.layout import choose_layout
from jaxserve.planning.sizes import Sizes
from jaxserve.runner.memory import host_free_bytes
from jaxserve.weights.packed import Quantization, held_formats
from jaxserve.weights.source import DUMMY
from pallas_kernels import native
from pallas_kernels.families import parse_choices
from pallas_kernels.paged_attention import FORMATS
from pallas_kernels.quantized_matmul import Format
from pallas_kernels.target import is_hopper
from sharding.mesh import MeshShapeError, make_mesh, parse_mesh
from sharding.rules import ShardingRules

KV_FRACTION = 0.9  # The rest is for fragmentation and for what XLA does not report.
CPU_KV_BYTES = 2 * 2**30  # A laptop has other things to do with its memory.
# SmolLM2's prompts of 1, 64, 128 and 256 tokens take 21, 50, 84 and 170 ms in bfloat16, and 16, 38,
# 62 and 113 in int8: 10 ms more than their places, which take 0.64 and 0.42 ms each.
CPU_CALL_PLACES = 24
# Of a step. 32 streaming clients: first token after 571 ms and p99 of gaps 230 ms with 256, 746 and
# 525 with 512, at the same tokens/s; 128 cost 5 % of them with 64 requests at once.
CPU_STEP_TOKENS, STEP_TOKENS = 256, 512
CPU_PAGE_TOKENS, PAGE_TOKENS = 32, 64
CPU_UNROLLED_ROWS = 4  # One stream took 36 ms a step instead of 50, four 67 instead of 80.
BF16_CPU_ROWS = 16  # XLA's CPU backend has no fast bfloat16 product for fewer rows.


@dataclass(frozen=True, kw_only=True)
class LaunchPlan(Sizes):
    """What will run: no "auto" and no None is left. Page count excepted, see ``build``."""

    name: str
    model: ModelConfig
    mesh: Mesh
    platform: str


def configure_jax(config: ServeConfig) -> None:
    """Selects the devices and the persistent compilation cache. Before JAX is used, if possible.

    Raises:
        ConfigError: the device is unknown, JAX was initialised with others already, or there can be
            no cache.
    """
    kind, _, count = config.device.partition(":")
    simulated = kind == "cpu" and count.isdecimal() and int(count) > 0
    if kind not in ("auto", "cpu", "cuda") or (count and not simulated):
        raise ConfigError(
            f"device is {config.device!r}; choose auto, cpu, cpu:N (N simulated devices) or cuda"
        )
    if count:
        try:
            jax.config.update("jax_num_cpu_devices", int(count))
        except RuntimeError:
            if len(jax.devices("cpu")) < int(count):
                raise ConfigError(
                    f"device is {config.device!r} but JAX already runs with "
                    f"{len(jax.devices('cpu'))} CPU devices; restart the process"
                ) from None
    directory = config.cache_dir / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--cache-dir {config.cache_dir}: cannot make {directory}: {error.strerror}; give a "
            "directory that can be written"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Defaults leave out programs that compile in under a second, which most of a small model's do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def resolve(
    config: ServeConfig,
    model: ModelConfig,
    formats: Callable[[Quantization], dict[str, Format]] = lambda quantization: {},
) -> LaunchPlan:
    """Decides everything that can be decided before compiling.

    Args:
        config: what was asked for.
        model: its config.
        formats: says which weights are held quantized, as ``ModelSource`` does; without it none.

    Raises:
        MeshError: the mesh cannot be read or does not fit the devices.
        ConfigError: the context is longer than the model's.
        CheckpointError: the weights cannot be held as they should be.
    """
    mesh = _mesh(config)
    device = mesh.devices.flat[0]
    platform = device.platform
    sizes = resolve_sizes(
        config,
        model,
        platform,
        kind=device.device_kind,
        data_shards=mesh.shape["data"],
        tensor=mesh.shape["tensor"],
        formats=formats(resolve_quantization(config, platform)),
    )
    name = config.served_name or _served_name(config.model)
    return LaunchPlan(name=name, model=model, mesh=mesh, platform=platform, **vars(sizes))


def resolve_quantization(config: ServeConfig, platform: str) -> Quantization:
    """What becomes of ``auto``: a CPU without kernels would widen weights again in every step."""
    quantization = cast("Quantization", config.quantization)
    if quantization == "auto" and platform == "cpu" and not native.is_built():
        return "none"
    return quantization


def resolve_sizes(
    config: ServeConfig,
    model: ModelConfig,
    platform: str,
    *,
    kind: str = "",
    data_shards: int,
    tensor: int = 1,
    formats: dict[str, Format] | None = None,
) -> Sizes:
    """The part of ``resolve`` that asks for no device. Without ``formats`` no weight is quantized.

    Those are of the checkpoint; ``held_formats`` decides what they are on ``tensor`` devices.
    ``kind`` is how these call themselves.

    Raises:
        ConfigError: the context is longer than the model's.
    """
    dtype = _dtype(config, platform)
    context = config.context_tokens or model.context_tokens
    if context > model.context_tokens:
        raise ConfigError(
            f"context_tokens is {context} and the model's window is {model.context_tokens}; "
            "lower --context-tokens"
        )
    on_cpu = platform == "cpu"
    has_native = on_cpu and native.is_built()
    kernels = _kernels(config.kernels)
    smallest = BF16_CPU_ROWS if on_cpu and not has_native and dtype == jnp.bfloat16 else 1
    step_tokens = config.step_tokens or (CPU_STEP_TOKENS if on_cpu else STEP_TOKENS)
    page_tokens = config.page_tokens or (CPU_PAGE_TOKENS if on_cpu else PAGE_TOKENS)
    prefill = prefill_buckets(min(step_tokens, max(16, context)))
    step = StepShape(
        max_rows=config.max_rows,
        table_width=math.ceil(context / page_tokens),
        vocab_size=model.vocab_size,
        decode_buckets=decode_buckets(config.max_rows, smallest),
        prefill_buckets=prefill,
        score_buckets=score_buckets(prefill) if config.prompt_logprobs else (),
        embed_buckets=prefill if config.embeddings else (),
        data_shards=data_shards,
        call_places=CPU_CALL_PLACES if on_cpu else CALL_PLACES,
    )
    most_kv_bytes = None
    if config.kv_memory_fraction is None and on_cpu:
        most_kv_bytes = min(CPU_KV_BYTES, host_free_bytes() // 4)
    return Sizes(
        dtype=dtype,
        kv_dtype=_kv_dtype(config.kv_dtype, dtype),
        # Native products multiply by bfloat16 weights whatever x is, and the rest of a layer is
        # faster in float32; XLA's own need one dtype, of which AMX has no float32.
        activations=jnp.dtype(jnp.float32) if has_native and not native.has_amx() else dtype,
        formats=held_formats(
            formats or {},
            model,
            has_native=has_native and kernels.get("quantized_matmul", "native") == "native",
            tensor=tensor,
        ),
        # The kernel multiplies activations of 16 bits.
        repacked=is_hopper(platform, kind) and bool(formats) and dtype.itemsize == 2,
        kernels=kernels,
        unrolled_rows=max(smallest, CPU_UNROLLED_ROWS) if on_cpu and not has_native else 0,
        context_tokens=context,
        step=step,
        page_tokens=page_tokens,
        kv_bytes=config.kv_memory_bytes,
        kv_fraction=config.kv_memory_fraction or KV_FRACTION,
        most_kv_bytes=most_kv_bytes,
    )


def _kernels(text: str) -> dict[str, str]:
    try:
        return parse_choices(text)
    except ValueError as error:
        raise ConfigError(f"kernels is {text!r}: {error}") from error


def overlaps_steps(config: ServeConfig, plan: LaunchPlan) -> bool:
    """Whether the engine dispatches a step before the one before it is read."""
    if config.step_overlap != "auto":
        return config.step_overlap == "on"
    # Other hosts are told of a step while the one before it runs.
    return plan.platform != "cpu" or plan.mesh.is_multi_process


def is_ready_with_first(config: ServeConfig, plan: LaunchPlan) -> bool:
    """Whether serving begins with the first programs, and the others are made beside it.

    Raises:
        ConfigError: it is asked for where a program takes device memory when it first runs.
    """
    if config.ready_with == "first" and plan.platform != "cpu":
        raise ConfigError(
            f"ready_with is 'first' and the device {plan.platform}, which loads a program when it "
            "first runs, beside requests; choose --ready-with auto or all"
        )
    if config.ready_with != "auto":
        return config.ready_with == "first"
    # XLA times kernels while it compiles for a GPU, and would time them beside serving. Every host
    # must have the programs of a step. A program that was to be compiled ahead is missed at launch.
    may_follow = plan.platform == "cpu" and not plan.mesh.is_multi_process
    return may_follow and config.executables is None


def sharding_summary(plan: LaunchPlan) -> str:
    """One line on what is split, and what that pads or copies; empty on one device."""
    if plan.mesh.size == 1:
        return ""
    rules = ShardingRules()
    split = {
        name: axis
        for name in ("kv_heads", "q_heads", "ffn", "vocab")
        if (axis := rules.mesh_axis(name)) is not None
    }
    parts = [f"{name} over {axis}={plan.mesh.shape[axis]}" for name, axis in split.items()]
    return "; ".join(
        [", ".join(parts), *choose_layout(plan.model, plan.mesh.shape["tensor"]).notes()]
    )


def _mesh(config: ServeConfig) -> Mesh:
    try:
        shape = parse_mesh(config.mesh)
        backend = {"cpu": "cpu", "cuda": "cuda"}.get(config.device.partition(":")[0])
        return make_mesh(shape, jax.devices(backend))
    except MeshShapeError as error:
        raise MeshError(f"--mesh {config.mesh}: {error}") from error
    except RuntimeError as error:  # JAX: the platform is not there.
        raise ConfigError(
            f"device {config.device!r} is not available: {error}; try --device cpu, or install "
            "jaxserve[cuda13] for GPUs"
        ) from error


def _dtype(config: ServeConfig, platform: str) -> jnp.dtype:
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    if platform != "cpu" or native.is_built() or native.has_amx():
        return jnp.dtype(jnp.bfloat16)
    # XLA's float32 products are as fast as its bfloat16 ones there, and exact.
    return jnp.dtype(jnp.float32)


def _kv_dtype(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """``auto`` is that of the weights; head_dim is even in every model, as int4 needs it."""
    if name == "auto":
        return dtype
    return FORMATS[name].dtype if name in FORMATS else jnp.dtype(name)


def _served_name(model: str) -> str:
    if model.startswith(DUMMY) or not Path(model).exists():
        return model
    return Path(model).resolve().name.removesuffix(".gguf")
