"""The shapes of ``paged_attention`` with pages of each format; tests walk them.

Pages are drawn as floats and rounded, so that cells which no row may see, NaN, infinities and huge
numbers there, have scales of NaN and infinity here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.paged_attention.cases import CASES, LAYER, Case, Inputs
from pallas_kernels.paged_attention.formats import INT8, Format
from pallas_kernels.quantized_attention.reference import quantized

__all__ = ["CASES", "LAYER", "arrays"]


def arrays(
    case: Case,
    *,
    seed: int,
    dtype: DTypeLike = "float32",
    spare_pages: int = 1,
    format: Format = INT8,
) -> Inputs:
    """Draws the arrays of a case with pages of a format and queries of this dtype."""
    inputs = case.arrays(seed=seed, dtype="float32", spare_pages=spare_pages)
    pools = quantized(inputs.pools, format)
    return inputs._replace(q=jnp.asarray(inputs.q, dtype), pools=pools)
