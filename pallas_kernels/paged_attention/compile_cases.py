"""What of this family is compiled for GPUs to see that it compiles well; see ``compiling.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compiling import CompileCase
from pallas_kernels.paged_attention import FORMATS, abstract_pools, paged_attention

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


def attention(
    model: str, *, dtype: str = "bfloat16", page: int = 64, ragged: bool = False, **options: Any
) -> CompileCase:
    """Attention of a step: 64 rows with one query each, or ragged prompts of 2,048 tokens."""
    q_heads, kv_heads, head_dim = HEADS[model]
    pools = abstract_pools(
        layers=LAYERS,
        pages=PAGES,
        kv_heads=kv_heads,
        page_tokens=page,
        head_dim=head_dim,
        dtype=FORMATS[dtype].dtype if dtype in FORMATS else jnp.dtype(dtype),
    )
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


CASES: tuple[CompileCase, ...] = (
    *(attention(model) for model in HEADS),
    *(attention("Llama-3-8B", page=page) for page in (16, 32, 128)),
    *(attention("Llama-3-8B", dtype=dtype) for dtype in ("float16", *FORMATS)),
    *(attention(model, dtype="int8") for model in ("SmolLM2", "Phi-3-mini", "Gemma-3")),
    attention("SmolLM2", dtype="int4"),
    attention("Gemma-3", dtype="int4"),
    attention("Gemma-3", dtype="fp8"),
    attention("Llama-3-8B", window=4096, softcap=50.0),
    *(attention(model, ragged=True) for model in HEADS),
    *(attention("Llama-3-8B", dtype=dtype, ragged=True) for dtype in FORMATS),
    attention("Llama-3-8B", page=16, ragged=True),
    attention("Gemma-3", ragged=True, window=512),
    attention("Gemma-3", dtype="int8", ragged=True),
)
