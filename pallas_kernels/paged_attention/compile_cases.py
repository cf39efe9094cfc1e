"""What of this family is compiled for GPUs to see that it compiles well; see ``compiling.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compiling import CompileCase
from pallas_kernels.paged_attention import Pools, abstract_pools, rope_append

LAYERS, PAGES, ROWS, WIDTH = 4, 512, 64, 64


def some(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array of a program that is only compiled."""
    return jax.ShapeDtypeStruct(shape, dtype)


def pools_of(kv_heads: int, page_tokens: int, head_dim: int, dtype: Any) -> Pools:
    """Pools of several layers, of floats or of a format's numbers."""
    return abstract_pools(
        layers=LAYERS,
        pages=PAGES,
        kv_heads=kv_heads,
        page_tokens=page_tokens,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
    )


def _append(
    dtype: Any,
    *,
    rows: int = ROWS,
    tokens: int = 1,
    is_ragged: bool = False,
    kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    page_tokens: int = 64,
) -> CompileCase:
    """Rope and append. The launches that are not the kernel's find cells, once for all layers."""
    numbers = some((rows,), jnp.int32)
    lines = 1 if is_ragged else rows
    what = "ragged" if is_ragged else "decode"
    return CompileCase(
        name=f"append, {what}, {jnp.dtype(dtype).name} pages of {page_tokens}, "
        f"{kv_heads} heads of {head_dim}, {group} queries each",
        function=_append_projected,
        arguments=(
            pools_of(kv_heads, page_tokens, head_dim, dtype),
            some((lines, tokens, kv_heads, group + 2, head_dim), jnp.bfloat16),
            some((2, lines, tokens, head_dim // 2), jnp.float32),
            some((rows, WIDTH), jnp.int32),
            numbers,
            numbers,
            numbers if is_ragged else None,
        ),
        # Of one key head there is a line to copy, and no tile.
        instructions=("UTMALDG", "UTMASTG" if kv_heads > 1 else "UBLKCP"),
        donated=(0,),
        most_launches=2,
    )


def _append_projected(
    pools: Any, heads: Any, rope: Any, table: Any, start: Any, length: Any, first: Any
) -> Any:
    """Takes heads as a projection gives them: the split must cost nothing."""
    rows, tokens, _, lines, head_dim = heads.shape
    q, k, v = jnp.split(heads, (lines - 2, lines - 1), axis=3)
    q, k, v = q.reshape(rows, tokens, -1, head_dim), k[:, :, :, 0], v[:, :, :, 0]
    return rope_append(
        pools,
        q,
        k,
        v,
        rope,
        table,
        start,
        length,
        layer=1,
        first=first,
        implementation="mosaic",
    )


CASES: tuple[CompileCase, ...] = (
    _append(jnp.bfloat16),
    _append(jnp.int8),
    _append(jnp.float8_e4m3fn),
    _append(jnp.bfloat16, is_ragged=True, rows=8, tokens=2048),
    _append(jnp.int8, is_ragged=True, rows=8, tokens=2048),
    _append(jnp.int8, kv_heads=3, group=3, head_dim=64, page_tokens=16),
    _append(jnp.bfloat16, kv_heads=1, group=4, head_dim=256, page_tokens=32),
    _append(jnp.bfloat16, kv_heads=32, group=1, head_dim=96, page_tokens=32),
)
