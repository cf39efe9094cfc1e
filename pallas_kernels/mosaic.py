"""What the kernels for Hopper GPUs share, written with Pallas's Mosaic backend.

A kernel's one body is used three ways: compiled on such a GPU, compiled for one on a machine
without it (``compiled.py``), and run by JAX's interpreter of GPU kernels on a CPU, which models
thread blocks, barriers and asynchronous copies and reports races. The interpreter lacks a few
things; what stands in for them is here, so that kernels read as if it did not.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config as jax_config
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.target import target

SHARED_BYTES = 232_448
"""Shared memory that one thread block may have on Hopper, barriers included."""
CORES = 132
"""Multiprocessors of an H100 SXM or H200, for devices that do not say."""
LINES = 64
"""Rows of one warpgroup's product on the tensor cores."""


def is_interpreted() -> bool:
    """Whether what is being traced will be interpreted on a CPU.

    It is part of what JAX keys its traces by, so one function can be traced both ways.
    """
    # JAX offers a context manager that sets this, and nothing that reads it.
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def why_not() -> str | None:
    """Says why Mosaic kernels cannot run where this is traced for; None when they can."""
    if is_interpreted():
        return None
    here = target()
    if here.platform != "gpu":
        return f"Mosaic kernels run on Hopper GPUs, and this program is for {here.platform}"
    if not here.is_hopper:
        return (
            f"Mosaic kernels need compute capability 9.0 (H100, H200, H800, H20, GH200), and this "
            f"program is for {here.kind}"
        )
    return None


def decline_elsewhere() -> None:
    """Raises NotImplementedError with ``why_not``'s reason, for ``dispatch`` to go on."""
    if reason := why_not():
        raise NotImplementedError(reason)


def cores() -> int:
    """Returns how many thread blocks of a persistent kernel run at once, at one a core."""
    return target().cores or CORES


def transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """Says how a tile of rows of this width lies in shared memory for the tensor cores."""
    bits = jax.dtypes.itemsize_bits(dtype)
    swizzle = plgpu.find_swizzle(width * bits)
    # As Any: pyright takes these dataclasses for abstract.
    tiled, swizzled = cast(Any, plgpu.TilingTransform), cast(Any, plgpu.SwizzleTransform)
    return tiled((8, 8 * swizzle // bits)), swizzled(swizzle)


def tile(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory for tiles of operands of the tensor cores; leading axes count tiles.

    ``columns`` are those that one warpgroup reads, if not all: whole swizzles.
    """
    return plgpu.SMEM(shape, dtype, transforms=transforms(columns or shape[-1], dtype))


def product(
    acc: Array | None,
    a: Any,
    b: Any,
    shape: tuple[int, int],
    *,
    transposed: bool = False,
    dtype: Any = jnp.float32,
) -> Array:
    """Computes ``acc + a b``, or ``acc + a b^T``, on the tensor cores.

    The interpreter knows neither accumulators that begin with something nor operands in registers,
    and it does not see races with what the tensor cores read. There operands are read as plain
    memory, which it does check; ``release`` is the other half of that.

    Args:
        acc: What to add to; None for nothing.
        a: ``[M, K]``, in shared memory or in registers.
        b: ``[K, N]`` in shared memory, or ``[N, K]`` when transposed; of 8 bits: transposed only.
        shape: ``(M, N)``.
        transposed: See ``b``.
        dtype: Of the sums: float32, or int32 for operands of int8.
    """
    if is_interpreted():
        left = a if isinstance(a, jax.Array) else a[...]
        right = b[...]
        right = right.T if transposed else right
        alone = jnp.dot(left, right, preferred_element_type=dtype)
        return alone if acc is None else acc + alone
    right = b.transpose((1, 0)) if transposed else b

    def multiply(into: Any) -> None:
        plgpu.wgmma(into, a, right)

    if acc is not None:
        summed: Any = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))
        return summed

    def from_nothing(into: Any) -> Array:
        multiply(into)
        return into[...]

    return pl.run_scoped(from_nothing, plgpu.WGMMAAccumulatorRef(shape, dtype))


def rounded(numbers: Array, dtype: Any) -> Array:
    """Rounds float32 numbers to what ``dtype`` can say, and leaves them float32."""
    if is_interpreted():
        # XLA may leave out a cast that is undone at once (``xla_allow_excess_precision``).
        info = jnp.finfo(dtype)
        return lax.reduce_precision(numbers, info.nexp, info.nmant)
    return numbers.astype(dtype).astype(jnp.float32)


def release(barrier: Any) -> None:
    """Arrives at the barrier that says that tiles which ``product`` has read may be overwritten."""
    if is_interpreted():
        # There they were plain reads, which an asynchronous copy must be kept behind.
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def drain(barriers: Any, count: Array | int, stages: int) -> None:
    """Waits for what has arrived at a ring's barriers and that nobody has waited for.

    A thread block must not end before its barriers have been observed as often as they completed.

    Args:
        barriers: of the ring, one a stage.
        count: How often the ring has been filled, in all.
        stages: Of the ring.
    """
    end = jnp.asarray(count, jnp.int32)

    def one(i: Array, _: None) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(end - stages, 0), end, one, None)
