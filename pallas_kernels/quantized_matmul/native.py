"""Products in C++ on the CPU: the matrix is read once, in the format it is stored in.

XLA widens a quantized matrix in memory before it multiplies, copies a layer's matrices out of their
stack in each turn of a loop, and has no fast product of bfloat16 with few rows. ``matmul.h``
describes the method.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import native
from pallas_kernels.quantized_matmul.best import Best
from pallas_kernels.quantized_matmul.formats import GROUP, SCALE_DTYPE
from pallas_kernels.quantized_matmul.matrix import Matrix, Quantized

DEPTH_STEP = 16
"""What a sum runs over at a time; kernel.h has the same number."""
AMX_ROWS = 16
"""From so many rows on XLA is faster where the CPU multiplies bfloat16 matrices in hardware."""


def quantized_matmul_native(
    x: Float[Array, "*B I"],
    matrix: Matrix,
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,
) -> Float[Array, "*B O"]:
    """Computes ``quantized_matmul``; see there for the arguments.

    Everything is float32 once it is loaded, or less if that is allowed, as ``panels.h`` and
    ``halves.h`` say; what float16 cannot hold is computed again in float32. A number of the answer
    has the same bits alone, beside any other rows and on any number of threads; another instruction
    set may round otherwise.
    """
    decline(x, matrix, dtype)
    rows = math.prod(x.shape[:-1])
    stack = matrix if layer is not None else matrix[None]
    (out,) = native.call(
        "jaxserve_matmul",
        [jax.ShapeDtypeStruct((rows, stack.shape[-2]), dtype)],
        x.reshape(rows, x.shape[-1]),
        *operands(stack),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        narrow=np.bool_(narrow),
    )
    return out.reshape(*x.shape[:-1], -1)


def best_product_native(
    x: Float[Array, "B I"], matrix: Matrix, *, count: int | Int[Array, ""] | None, narrow: bool
) -> Best:
    """Computes ``best_product``; see there for the arguments.

    A product has the bits that it has in ``quantized_matmul_native`` as float32, but is written
    nowhere: the best are kept while a panel's products are in the cache.
    """
    decline(x, matrix, jnp.dtype(jnp.float32))
    rows = (x.shape[0],)
    return Best(
        *native.call(
            "jaxserve_best",
            [jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.float32, jnp.int32, jnp.bool_)],
            x,
            *operands(matrix[None]),
            jnp.asarray(matrix.shape[0] if count is None else count, jnp.int32),
            narrow=np.bool_(narrow),
        )
    )


def operands(stack: Matrix) -> tuple[Any, Any, Any]:
    """A stack as the handlers take it: values, scale and minimum."""
    # Never read. Not empty: XLA crashes on an empty operand where there are several devices.
    none = np.zeros((1,), SCALE_DTYPE)
    if not isinstance(stack, Quantized):
        return stack, none, none
    return stack.values, stack.scale, none if stack.minimum is None else stack.minimum


def decline(
    x: Float[Array, "*B I"] | jax.ShapeDtypeStruct, matrix: Matrix, dtype: jnp.dtype
) -> None:
    """Says what the kernel was not written for, and what XLA does faster; while tracing only.

    Raises:
        NotImplementedError: The text is the reason.
    """
    decline_types(x, matrix, dtype)
    is_bfloat16 = not isinstance(matrix, Quantized) and matrix.dtype == jnp.bfloat16
    if is_bfloat16 and math.prod(x.shape[:-1]) >= AMX_ROWS and native.has_amx():
        raise NotImplementedError(f"XLA multiplies {AMX_ROWS} rows or more with AMX")


def decline_types(
    x: Float[Array, "*B I"] | jax.ShapeDtypeStruct, matrix: Matrix, dtype: jnp.dtype
) -> None:
    """Says what the kernel was not written for; runs while tracing only.

    Raises:
        NotImplementedError: The text is the reason.
    """
    if reason := native.why_not():
        raise NotImplementedError(reason)
    dtypes = [jnp.dtype(x.dtype).name, jnp.dtype(dtype).name]
    if isinstance(matrix, Quantized):
        step = GROUP
        if type(matrix) is not Quantized:
            raise NotImplementedError("the matrix was repacked for GPUs")
        if matrix.kind == "fp8" or matrix.group != GROUP or matrix.order is not None:
            raise NotImplementedError(
                f"quantized matrices are int8 and int4 in groups of {GROUP} without an order, got "
                f"{matrix.kind} in groups of {matrix.group}"
            )
    else:
        step = DEPTH_STEP
        dtypes.append(jnp.dtype(matrix.dtype).name)
    if x.shape[-1] % step:
        raise NotImplementedError(f"the last axis must be a multiple of {step}, got {x.shape[-1]}")
    for name in dtypes:
        if name not in ("float32", "bfloat16", "float16"):
            raise NotImplementedError(f"dtypes are float32, bfloat16 and float16, got {name}")
        if name == "float16" and native.isa() is native.Isa.PORTABLE:
            raise NotImplementedError("float16 needs AVX2 at least")
