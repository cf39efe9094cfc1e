"""Products of sorted rows with one stored matrix per group: the experts of a mixture.

``reference`` owns the meaning and XLA's ``ragged_dot``, ``native`` the speed on a CPU. Matrices are
stored as ``quantized_matmul`` says. Which row belongs to which group is the model's business.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul.native import grouped_matmul_native
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference, grouped_matmul_xla
from pallas_kernels.quantized_matmul import Matrix, Quantized
from pallas_kernels.quantized_matmul.matrix import check

__all__ = ["grouped_matmul"]

IMPLEMENTATIONS = {
    "native": grouped_matmul_native,
    "xla": grouped_matmul_xla,
    "reference": grouped_matmul_reference,
}
"""By name, best first."""


def grouped_matmul(
    x: Float[Array, "M I"],
    matrices: Matrix,
    sizes: Int[Array, " E"],
    *,
    layer: int | Int[Array, ""] | None = None,
    dtype: Any = None,
    implementation: str = "auto",
    narrow: bool = False,
) -> Float[Array, "M O"]:
    """Multiplies each row by the matrix of its group; rows of a group stand side by side.

    No row is dropped, however many a group has. Rows behind the last group give zeros. What a row
    gives depends on that row and its matrix alone: to the bit in the native implementation, and to
    the rounding of sums, whose order XLA may choose by the shape, in the others. A row that is not
    finite spoils no other; a matrix that is not finite may spoil all rows in ``xla``, which on some
    devices multiplies every matrix by zeros for rows of other groups.

    Args:
        x: Activations: the rows of the first group, then those of the second, and so on.
        matrices: Floats ``[E, O, I]``, or a ``Quantized`` of that shape without an order.
        sizes: Rows of each group, int32, none negative; their sum is at most M.
        layer: Given, ``matrices`` is a stack ``[L, E, O, I]`` of which this one is meant; a Python
            int or a traced scalar. One that is not there becomes the nearest.
        dtype: Of the result; that of ``x`` when None.
        implementation: A name in ``IMPLEMENTATIONS``, or ``"auto"`` for the first that accepts.
            ``xla`` widens quantized matrices in memory, those of all groups, at each call.
        narrow: As for ``quantized_matmul``.

    Raises:
        ValueError: Shapes or dtypes that no implementation could take.
        ExceptionGroup: Every implementation declined; it holds the reasons.
    """
    check(matrices)
    if isinstance(matrices, Quantized) and matrices.order is not None:
        # It is one for all matrices of a layer, and rows of x are of several.
        raise ValueError(
            f"the matrices have an order of their columns, {matrices.order.dtype}"
            f"{list(matrices.order.shape)}, and each group's would be its own; put the columns in "
            "the order of the activations, or give dequantized() numbers in that order"
        )
    axes = 3 if layer is None else 4
    if matrices.ndim != axes or matrices.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"the matrices are {list(matrices.shape)}; with activations {list(x.shape)} they must "
            f"be {'[E, O, I]' if layer is None else '[L, E, O, I]'} with I = {x.shape[-1]}"
        )
    groups = matrices.shape[-3]
    if sizes.shape != (groups,) or sizes.dtype != jnp.int32:
        raise ValueError(
            f"sizes are {sizes.dtype}{list(sizes.shape)}; there are {groups} matrices, so they "
            f"must be int32[{groups}]"
        )
    with jax.named_scope("grouped_matmul"):
        return dispatch(
            "grouped_matmul",
            IMPLEMENTATIONS,
            implementation,
            x,
            matrices,
            sizes,
            layer=layer,
            dtype=jnp.dtype(dtype or x.dtype),
            narrow=narrow,
        )
