"""What of this family is compiled for GPUs to see that it compiles well; see ``compiling.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compiling import CompileCase
from pallas_kernels.paged_attention.append_mosaic import rope_append_mosaic
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


def _append(
    dtype: Any,
    *,
    rows: int = ROWS,
    tokens: int = 1,
    ragged: bool = False,
    kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    page_tokens: int = 64,
) -> CompileCase:
    """Rope and append. XLA's own launches are of the cells, which no layer repeats."""
    numbers = some((rows,), jnp.int32)
    lines = 1 if ragged else rows
    what = "ragged" if ragged else "decode"
    function = partial(rope_append_mosaic, layer=1)
    arguments = (
        pools_of(kv_heads, page_tokens, head_dim, dtype),
        some((lines, tokens, kv_heads, group + 2, head_dim), jnp.bfloat16),
        some((2, lines, tokens, head_dim // 2), jnp.float32),
        some((rows, WIDTH), jnp.int32),
        numbers,
        numbers,
    )
    if ragged:
        function = _ragged_append
        arguments += (numbers,)
    return CompileCase(
        name=f"append, {what}, {jnp.dtype(dtype).name} pages of {page_tokens}, "
        f"{kv_heads} heads of {head_dim}, {group} queries each",
        function=function,
        arguments=arguments,
        instructions=("UTMALDG", "UTMASTG"),
        donated=(0,),
        most_launches=3 if ragged else 2,
    )


def _ragged_append(*arguments: Any) -> Any:
    *others, first = arguments
    return rope_append_mosaic(*others, layer=1, first=first)


CASES = (
    _append(jnp.bfloat16),
    _append(jnp.int8),
    _append(jnp.bfloat16, ragged=True, rows=8, tokens=2048),
    _append(jnp.int8, ragged=True, rows=8, tokens=2048),
    _append(jnp.bfloat16, kv_heads=1, group=8),
    _append(jnp.int8, kv_heads=3, group=3, head_dim=64, page_tokens=16),
    _append(jnp.int8, kv_heads=8, group=2, head_dim=256),
    _append(jnp.bfloat16, kv_heads=32, group=1, head_dim=96, page_tokens=32),
    _append(jnp.bfloat16, kv_heads=8, group=8),
)
