"""What of this family is compiled for GPUs to see that it compiles well; see ``compiling.py``."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.compiling import CompileCase
from pallas_kernels.quantized_matmul.formats import Format, spec
from pallas_kernels.quantized_matmul.matrix import Quantized
from pallas_kernels.quantized_matmul.mosaic import quantized_matmul_mosaic
from pallas_kernels.quantized_matmul.on_gpu import for_gpu

LAYERS = 2
NATIVE = {"int8": "IGMMA", "fp8": "QGMMA"}


def stack_of(format: Format, out: int, depth: int) -> Quantized:
    """A repacked stack that is only compiled."""
    its = spec(format)

    def some(columns: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((LAYERS, out, columns), dtype)

    scale = some(depth // (its.group or depth), its.scale_dtype)
    values = some(depth // its.per_byte, its.value_dtype)
    return jax.eval_shape(for_gpu, Quantized(values, scale, scale if its.kind == "int4" else None))


def _product(
    format: Format,
    rows: int,
    out: int,
    depth: int,
    *,
    what: str = "",
    narrow: bool = False,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    answers: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    most_launches: int | None = None,
) -> CompileCase:
    product = NATIVE[spec(format).kind] if narrow else "HGMMA"
    return CompileCase(
        name=f"{format}, {rows} rows by {out} x {depth}{what and f' ({what})'}, {dtype}"
        f"{', answers of ' + answers if answers != dtype else ''}{', narrow' if narrow else ''}",
        function=partial(_multiply, dtype=jnp.dtype(answers), narrow=narrow),
        arguments=(
            jax.ShapeDtypeStruct((rows, depth), dtype),
            stack_of(format, out, depth),
            jax.ShapeDtypeStruct((), jnp.int32),
        ),
        instructions=(product, "UTMALDG", "UTMASTG"),
        most_launches=most_launches,
    )


def _multiply(
    x: jax.Array, stack: Quantized, layer: jax.Array, *, dtype: jnp.dtype, narrow: bool
) -> jax.Array:
    return quantized_matmul_mosaic(x, stack, layer=layer, dtype=dtype, narrow=narrow)


CASES = (
    *(
        _product("int4/128", rows, out, depth, what=what)
        for rows in (1, 16, 64)
        for what, out, depth in (
            ("Llama-3-8B qkv", 6144, 4096),
            ("Llama-3-8B o", 4096, 4096),
            ("Llama-3-8B gate and up", 28_672, 4096),
            ("Llama-3-8B down", 4096, 14_336),
        )
    ),
    *(
        _product(format, 16, out, depth, what=what)
        for format in ("int8", "int8/row", "int4")
        for what, out, depth in (
            ("Qwen3-8B gate and up", 24_576, 4096),
            ("Qwen3-8B down", 4096, 12_288),
            ("SmolLM2-135M qkv", 960, 576),
            ("SmolLM2-135M down", 576, 1536),
        )
    ),
    *(
        _product(format, rows, 4096, 4096)
        for format in ("int8", "int8/row", "int4", "fp8")
        for rows in (1, 64, 128)
    ),
    # The order of activations, the product, and the sum of its parts, if there are such.
    _product("int4/128", 16, 24_576, 4096, what="Qwen3-8B gate and up", most_launches=2),
    _product("int4/128", 16, 4096, 12_288, what="Qwen3-8B down", most_launches=3),
    _product("int8/128", 16, 4096, 4096, most_launches=2),
    _product("int4/128", 512, 28_672, 4096),
    _product("int4/64", 16, 4096, 4096),
    _product("int4/128", 16, 4096, 4096, dtype="float16", answers="float16"),
    _product("int8/row", 16, 4096, 4096, narrow=True),
    _product("int8/row", 512, 4096, 4096, narrow=True),
    _product("fp8", 16, 4096, 4096, narrow=True),
    _product("fp8", 512, 4096, 4096, narrow=True),
    _product("int8/row", 16, 128_256, 4096, what="Llama-3-8B logits", answers="float32"),
)
