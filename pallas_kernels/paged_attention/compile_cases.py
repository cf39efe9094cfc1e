"""What of this family is compiled for GPUs to see that it compiles well; see ``compiling.py``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compiling import CompileCase
from pallas_kernels.paged_attention import (
    FORMATS,
    Pools,
    abstract_pools,
    paged_attention,
    rope_append,
)

LAYERS, PAGES, ROWS, WIDTH = 4, 512, 64, 64
PLACES = 2048
"""Of the prompts of a step."""
USED = ("HGMMA", "UTMALDG", "UTMASTG")

HEADS = {
    "SmolLM2": (9, 3, 64),
    "Phi-3-mini": (32, 32, 96),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B, one of 8": (8, 1, 128),
    "Gemma-3": (4, 1, 256),
}


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


def attention(
    model: str, *, dtype: str = "bfloat16", page: int = 64, ragged: bool = False, **options: Any
) -> CompileCase:
    """Attention of a step: 64 rows with one query each, or ragged prompts of 2,048 tokens."""
    q_heads, kv_heads, head_dim = HEADS[model]
    numbers = FORMATS[dtype].dtype if dtype in FORMATS else dtype
    pools = pools_of(kv_heads, page, head_dim, numbers)
    q_dtype = jnp.bfloat16 if dtype in FORMATS else jnp.dtype(dtype)
    tokens = PLACES if ragged else 1
    q = some((1 if ragged else ROWS, tokens, q_heads, head_dim), q_dtype)
    row = some((ROWS,), jnp.int32)
    arguments = (q, pools, some((ROWS, WIDTH), jnp.int32), row, row, some((), jnp.int32))
    fixed = {"scale": head_dim**-0.5, "implementation": "mosaic"} | options
    attend = partial(_attend, fixed, is_ragged=ragged)
    said = "".join(f", {name} {value}" for name, value in options.items())
    kind = "ragged" if ragged else "decode"
    return CompileCase(
        name=f"{kind} {dtype}, {model}, page {page}{said}",
        function=attend,
        arguments=(*arguments, row) if ragged else arguments,
        instructions=USED,
    )


def _attend(fixed: dict[str, Any], *arrays: Any, is_ragged: bool) -> jax.Array:
    q, pools, table, start, length, layer, *first = arrays
    place = first[0] if is_ragged else None
    return paged_attention(q, pools, table, start, length, layer=layer, first=place, **fixed)


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


def _layers(dtype: Any) -> CompileCase:
    """A loop over layers, each of which appends to the pools and attends over them.

    The pools go round the loop; a copy of one would be a temporary as large.
    """
    rows = some((ROWS,), jnp.int32)

    def step(
        pools: Any, heads: Any, rope: Any, table: Any, start: Any, length: Any
    ) -> tuple[Any, Any]:
        def layer(carry: tuple[Any, Any], number: Any) -> tuple[Any, None]:
            pools, q = carry
            # Each layer's heads depend on what the one before gave.
            q, k, v = (x + q[:, :, :1] for x in jnp.split(heads, (32, 40), axis=2))
            rows: tuple[Any, ...] = (table, start, length)
            by: Any = {"layer": number, "implementation": "mosaic"}
            q, pools = rope_append(pools, q, k, v, rope, *rows, **by)
            return (pools, paged_attention(q, pools, *rows, scale=128**-0.5, **by)), None

        numbers = jnp.arange(LAYERS, dtype=jnp.int32)
        return jax.lax.scan(layer, (pools, heads[:, :, :32]), numbers)[0]

    return CompileCase(
        name=f"append and attention, in a loop over layers, {jnp.dtype(dtype).name} pages of 64",
        function=step,
        arguments=(
            pools_of(8, 64, 128, dtype),
            some((ROWS, 1, 48, 128), jnp.bfloat16),
            some((2, ROWS, 1, 64), jnp.float32),
            some((ROWS, WIDTH), jnp.int32),
            rows,
            rows,
        ),
        instructions=("HGMMA", "UTMALDG", "UTMASTG"),
        donated=(0,),
    )


CASES: tuple[CompileCase, ...] = (
    *(attention(model) for model in HEADS),
    *(attention("Llama-3-8B", page=page) for page in (16, 32, 128)),
    *(attention("Llama-3-8B", dtype=dtype) for dtype in ("float16", *FORMATS)),
    *(attention(model, dtype="int8") for model in ("SmolLM2", "Phi-3-mini", "Gemma-3")),
    attention("SmolLM2", dtype="int4"),
    # Kept from unit to unit, and not within a tile; see below.
    replace(attention("Gemma-3", dtype="int4"), most_spill_bytes=24),
    attention("Gemma-3", dtype="fp8"),
    attention("Llama-3-8B", window=4096, softcap=50.0),
    *(attention(model, ragged=True) for model in HEADS),
    *(attention("Llama-3-8B", dtype=dtype, ragged=True) for dtype in FORMATS),
    attention("Llama-3-8B", page=16, ragged=True),
    attention("Gemma-3", ragged=True, window=512),
    # What is kept from unit to unit does not fit beside two queries' worth of everything else.
    replace(attention("Gemma-3", dtype="int8", ragged=True), most_spill_bytes=80),
    _layers(jnp.bfloat16),
    _layers(jnp.int8),
    _append(jnp.bfloat16),
    _append(jnp.int8),
    _append(jnp.float8_e4m3fn),
    _append(jnp.bfloat16, is_ragged=True, rows=8, tokens=2048),
    _append(jnp.int8, is_ragged=True, rows=8, tokens=2048),
    _append(jnp.int8, kv_heads=3, group=3, head_dim=64, page_tokens=16),
    _append(jnp.bfloat16, kv_heads=1, group=4, head_dim=256, page_tokens=32),
    _append(jnp.bfloat16, kv_heads=32, group=1, head_dim=96, page_tokens=32),
)
