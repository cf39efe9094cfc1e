"""Products on Hopper GPUs: quantized values go into the tensor cores as they come from memory.

XLA writes a matrix with scales of groups out in 16 bits at every product. ``mosaic_kernel.py``
reads it as it is stored; here is what stands before and behind, in XLA: the order of activations
and their dtype, the rows that fill a tile, the sum of parts.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.quantized_matmul.best import Best, best_of
from pallas_kernels.quantized_matmul.formats import FP8, MAX_FP8, MAX_INT8
from pallas_kernels.quantized_matmul.matrix import Matrix, Quantized
from pallas_kernels.quantized_matmul.mosaic_config import (
    FEW,
    Config,
    Problem,
    best_known,
    choose,
)
from pallas_kernels.quantized_matmul.mosaic_kernel import mosaic_product
from pallas_kernels.quantized_matmul.on_gpu import OnGpu, for_gpu
from pallas_kernels.quantized_matmul.reference import rounded_rows
from pallas_kernels.target import target

MOST_ROWS = 512
"""Of activations; with more, XLA's product of the widened matrix should be the faster one. By
arithmetic for an H200, to be timed: widening writes and reads 2 bytes a weight at 4.3 TB/s, which
is a third of what 512 rows take at 790 TFLOP/s, and a tenth of 2,400; tiles of 128 by 128 here are
held to about 60 % of that rate by what the second-level cache delivers."""
HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
HEADROOM = 14
"""The largest of a row of activations becomes a float16 of so many bits before the point."""


def quantized_matmul_mosaic(
    x: Float[Array, "*B I"],
    matrix: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,
    config: Config | None = None,
) -> Float[Array, "*B O"]:
    """Computes ``quantized_matmul``; see there for the arguments.

    Products are exact and sums are float32. A row's answer has the same bits in any company of up
    to ``FEW`` rows. ``narrow`` lets activations be rounded to the matrix's own
    8 bits, with a scale for each row, where the matrix has one scale a row.

    Args:
        x: bfloat16 or float16.
        matrix: ``OnGpu``, or a ``Quantized`` with one scale a row.
        layer: As there.
        dtype: As there.
        narrow: As there.
        config: How the work is cut; None for what is best known.

    Raises:
        NotImplementedError: The text says what the kernel was not written for.
    """
    given = _accepted(x, matrix, dtype)
    *batch, depth = x.shape
    rows = math.prod(batch)
    stack = given
    if layer is None:
        stack = jax.tree.map(lambda array: array[None], given)
    x, native = x.reshape(rows, depth), narrow and _by_row(given)
    problem = Problem(
        rows=rows,
        outs=stack.shape[-2],
        depth=depth,
        groups=stack.scale.shape[-2],
        values=stack.dtype,
        activations=stack.dtype if native else _widened(stack.dtype, x.dtype),
        has_minimum=stack.minimum is not None,
        scale=stack.scale.dtype,
        programs=mosaic.cores(),
    )
    config = config or best_known(problem, target().kind) or choose(problem)
    if reason := problem.why_not(config):
        raise NotImplementedError(reason)
    x, factor = _activations(stack.columns(x), problem.activations)
    if factor is not None and not problem.by_row:
        # With scales of groups nothing is left to do at the end but this.
        after, factor = factor, None
    else:
        after = None
    missing = -rows % config.tokens
    x = jnp.pad(x, ((0, missing), (0, 0)))
    sums_of_x = None
    if stack.minimum is not None and rows > FEW:
        groups = x.reshape(*x.shape[:-1], -1, stack.group)
        sums_of_x = groups.sum(axis=-1, dtype=jnp.float32).T
    parts = mosaic_product(
        x,
        stack.codes(),
        stack.scale,
        stack.minimum,
        sums_of_x,
        None if factor is None else jnp.pad(factor, (0, missing)),
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        config=config,
        dtype=dtype if config.parts == 1 and after is None else jnp.dtype(jnp.float32),
    )
    # One at a time: XLA may add up an axis in any order.
    out = sum(parts[1:], start=parts[0])[:rows]
    if after is not None:
        out = out * after[:, None]
    return out.astype(dtype).reshape(*batch, -1)


def best_product_mosaic(
    x: Float[Array, "B I"], matrix: Matrix, *, count: int | Int[Array, ""] | None, narrow: bool
) -> Best:
    """Computes ``best_product`` of the products of ``quantized_matmul_mosaic``."""
    dtype = jnp.dtype(jnp.float32)
    return best_of(quantized_matmul_mosaic(x, matrix, dtype=dtype, narrow=narrow), count)


def _accepted(x: Any, matrix: Matrix, dtype: jnp.dtype) -> OnGpu:
    """The matrix as the kernel takes it, or the reason why it does not."""
    mosaic.decline_elsewhere()
    if not isinstance(matrix, Quantized):
        raise NotImplementedError("the matrix is not quantized, and XLA multiplies it")
    if not isinstance(matrix, OnGpu) and matrix.kind != "int4" and matrix.scale.shape[-1] == 1:
        matrix = for_gpu(matrix)  # Moves nothing.
    if not isinstance(matrix, OnGpu):
        raise NotImplementedError(
            "a matrix with scales of groups must be repacked at load, see for_gpu"
        )
    rows = math.prod(x.shape[:-1])
    if not 0 < rows <= MOST_ROWS:
        raise NotImplementedError(
            f"XLA multiplies the widened matrix by more than {MOST_ROWS} rows, and by none; "
            f"there are {rows}"
        )
    if x.dtype not in HALVES:
        raise NotImplementedError(f"activations are bfloat16 or float16, got {x.dtype}")
    if dtype not in (*HALVES, jnp.float32):
        raise NotImplementedError(f"answers are float32, bfloat16 or float16, got {dtype}")
    return matrix


def _by_row(matrix: OnGpu) -> bool:
    return matrix.minimum is None and matrix.scale.shape[-2] == 1


def _widened(values: jnp.dtype, activations: Any) -> jnp.dtype:
    """The dtype in which the tensor cores multiply them."""
    if values == FP8:
        return jnp.dtype(jnp.float16)  # The processor makes no bfloat16 of float8.
    return jnp.dtype(activations)


def _activations(
    x: Float[Array, "B I"], dtype: jnp.dtype
) -> tuple[Array, Float[Array, " B"] | None]:
    """Activations in the dtype in which they are multiplied, and what scales the answers."""
    if x.dtype == dtype:
        return x, None
    if dtype == jnp.float16:
        wide = x.astype(jnp.float32)
        # bfloat16 has more exponents; a power of two changes nothing else.
        _, exponent = jnp.frexp(jnp.abs(wide).max(axis=-1))
        shift = jnp.clip(HEADROOM - exponent, -126, 126)
        return jnp.ldexp(wide, shift[:, None]).astype(dtype), jnp.ldexp(1.0, -shift)
    ratio, factor = rounded_rows(x, MAX_INT8 if dtype == jnp.int8 else MAX_FP8)
    return (jnp.rint(ratio) if dtype == jnp.int8 else ratio).astype(dtype), factor
