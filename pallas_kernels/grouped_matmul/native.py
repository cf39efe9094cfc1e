"""Grouped products in C++ on the CPU: a matrix is read if its group has rows, as it is stored.

A group's rows are one product of ``quantized_matmul``'s kernels, whose threads share its panels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import native
from pallas_kernels.quantized_matmul import Matrix
from pallas_kernels.quantized_matmul.native import decline_types, operands


def grouped_matmul_native(
    x: Float[Array, "M I"],
    matrices: Matrix,
    sizes: Int[Array, " E"],
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: jnp.dtype,
    narrow: bool,
) -> Float[Array, "M O"]:
    """Computes ``grouped_matmul``; see there for the arguments.

    Products are those of ``quantized_matmul_native``: a number of the answer has the same bits
    alone, beside any other rows and on any number of threads.
    """
    decline_types(x, matrices, dtype)
    *_, out_rows, depth = matrices.shape
    (out,) = native.call(
        "jaxserve_grouped_matmul",
        [jax.ShapeDtypeStruct((x.shape[0], out_rows), dtype)],
        x,
        *operands(matrices.reshape(-1, out_rows, depth)),
        sizes,
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        narrow=np.bool_(narrow),
    )
    return out
