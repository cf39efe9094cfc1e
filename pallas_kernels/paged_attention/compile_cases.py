"""What of this family is compiled for GPUs to see that it compiles well; see ``compiling.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compiling import CompileCase
from pallas_kernels.paged_attention.pool import Pools, pool_shape

LAYERS, PAGES, ROWS, WIDTH = 4, 512, 64, 64


def some(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array of a program that is only compiled."""
    return jax.ShapeDtypeStruct(shape, dtype)


def pools_of(kv_heads: int, page_tokens: int, head_dim: int, dtype: Any) -> Pools:
    """Pools of several layers; of 8 bits with scales."""
    shape = pool_shape(
        layers=LAYERS,
        pages=PAGES,
        kv_heads=kv_heads,
        page_tokens=page_tokens,
        head_dim=head_dim,
    )
    has_scales = jnp.dtype(dtype).itemsize == 1
    scale = some(shape[:-1], jnp.bfloat16) if has_scales else None
    pages = some(shape, dtype)
    return Pools(k=pages, v=pages, pages=PAGES, k_scale=scale, v_scale=scale)


CASES: tuple[CompileCase, ...] = ()
