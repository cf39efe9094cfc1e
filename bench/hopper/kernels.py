"""Shapes of published models, and each kernel over so many layers that none is still in the cache.

A case makes a ``state``, a pytree that ``step`` takes through one call at a layer and that is
donated from loop to loop; ``answers`` are what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels import bytes_moved, operations
from pallas_kernels.paged_attention import (
    FORMATS,
    Pools,
    abstract_pools,
    cell_bytes,
    paged_attention,
    rope_append,
    rotate,
)
from pallas_kernels.paged_attention.cases import Case, Row
from pallas_kernels.paged_attention.formats import dequantize
from pallas_kernels.paged_attention.mosaic import paged_attention_mosaic
from pallas_kernels.quantized_matmul import (
    OnGpu,
    Quantized,
    bytes_per_weight,
    for_gpu,
    quantized_matmul,
    spec,
)
from pallas_kernels.quantized_matmul.formats import FP8, MAX_FP8, MAX_INT8
from pallas_kernels.quantized_matmul.mosaic import quantized_matmul_mosaic
from pallas_kernels.quantized_matmul.reference import rounded_rows

COLD_BYTES = 128 * 2**20
"""What a round through all layers reads at least: a Hopper's second-level cache has 50 MB."""
FLOAT = jnp.dtype(jnp.bfloat16)
HEADS = {
    "Llama-3-8B, Qwen3-8B": (32, 8, 128),
    "Llama-3-70B, one of 8": (8, 1, 128),
    "Qwen3-32B": (64, 8, 128),
    "SmolLM2-135M": (9, 3, 64),
}
STEPS = {
    "decode": ("64 at 8192", (Row(8191, 1),) * 64),
    "skew": ("1 at 16384, 63 at 1638", (Row(16_383, 1), *(Row(1637, 1),) * 63)),
    "prefill": ("4 of 512 at 1024", (Row(1024, 512),) * 4),
    "decode, short": ("64 at 1024", (Row(1023, 1),) * 64),
    "decode, few": ("4 at 32768", (Row(32_767, 1),) * 4),
    "prefill, late": ("1 of 2048 at 14336", (Row(14_336, 2048),)),
}
DRY_STEPS = {
    "decode": ("2 at 40", (Row(39, 1),) * 2),
    "skew": ("1 at 80, 1 at 8", (Row(79, 1), Row(7, 1))),
    "prefill": ("2 of 5 at 16", (Row(16, 5), Row(20, 3))),
}
PAGES = ("bfloat16", *FORMATS)
NUMBERS = {"int8": 64, "fp8": 1, "int4": 4}
"""How large ``draw`` makes the numbers of pages with scales."""
MATRICES = {
    "Llama-3-8B gate and up": (28_672, 4096),
    "Llama-3-8B down": (4096, 14_336),
    "Llama-3-70B gate and up, one of 8": (7168, 8192),
    "Llama-3-70B down, one of 8": (8192, 3584),
    "Qwen3-8B gate and up": (24_576, 4096),
    "Qwen3-32B down": (5120, 25_600),
    "SmolLM2-135M qkv": (960, 576),
    "SmolLM2-135M down": (576, 1536),
}
WEIGHTS = ("int4/128", "int8/row", "fp8")


class KernelCase(Protocol):
    """One shape of one kernel."""

    @property
    def label(self) -> dict[str, Any]:
        """Names the case."""
        ...

    @property
    def layers(self) -> int:
        """That loops go round."""
        ...

    @property
    def moved(self) -> int:
        """Bytes that a call cannot avoid."""
        ...

    @property
    def flops(self) -> int:
        """Of a call."""
        ...

    def state(self) -> Any:
        """Draws the arrays, the same ones every time."""
        ...

    def step(self, state: Any, layer: Any, implementation: str, config: Any) -> Any:
        """Calls the kernel; a config of None is what the kernel chooses."""
        ...

    def answers(self, state: Any) -> list[jax.Array]:
        """What is compared."""
        ...


def grid(kernel: str, *, dry: bool) -> Iterator[KernelCase]:
    """Yields the cases of a kernel, the most telling first: a budget cuts off the others."""
    heads = {"tiny": (4, 2, 64)} if dry else HEADS
    steps = DRY_STEPS if dry else STEPS
    cold_bytes = 0 if dry else COLD_BYTES
    if kernel == "quantized_matmul":
        matrices = {"tiny": (64, 256)} if dry else MATRICES
        for rows, (what, shape), format in product(
            (1, 70) if dry else (16, 1, 64, 512), matrices.items(), WEIGHTS
        ):
            # Groups of 128 do not divide the rows of the smallest model's matrices.
            usual = format if shape[1] % 128 == 0 else format.replace("/128", "")
            case = Product(what, usual, rows, *shape, cold_bytes)
            yield case
            if case.can_round:
                yield replace(case, narrow=False)
        return
    cells = product(steps.items(), (16,) if dry else (64, 16), PAGES, heads.items())
    for (kind, (said, rows)), page_tokens, pages, (model, (q_heads, kv_heads, head_dim)) in cells:
        end = max(row.start + row.length for row in rows)
        case = Case(
            name=f"{kind}, {said}",
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_tokens=page_tokens,
            table_width=-(-end // page_tokens),
            query_tokens=max(row.length for row in rows),
            rows=rows,
            is_ragged="prefill" in kind,
        )
        if kernel == "paged_attention":
            yield Attention(case, pages, model, cold_bytes)
        elif pages != "int4" and "," not in kind and kind != "skew":  # The kernel declines int4.
            yield RopeAppend(case, pages, model, cold_bytes)


@dataclass(frozen=True)
class Attention:
    """Attention of one layer."""

    case: Case
    pages: str
    model: str
    cold_bytes: int = COLD_BYTES

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers in pages."""
        return FORMATS[self.pages].dtype if self.pages in FORMATS else FLOAT

    @property
    def label(self) -> dict[str, Any]:
        """Names the case."""
        case = self.case
        return {"case": case.name, "model": self.model, "pages": self.pages} | {
            "page_tokens": case.page_tokens
        }

    @property
    def layers(self) -> int:
        """Of the pool."""
        return max(2, -(-self.cold_bytes // self.moved))

    @property
    def moved(self) -> int:
        """Bytes that cannot be avoided."""
        return bytes_moved(self.case, self.dtype, FLOAT)

    @property
    def flops(self) -> int:
        """Of both products."""
        return operations(self.case)

    def places(self) -> tuple[int, int]:
        """Rows of places, and places in each."""
        lengths = [row.length for row in self.case.rows]
        return (1, sum(lengths)) if self.case.is_ragged else (len(lengths), max(lengths))

    def rows(self) -> dict[str, Any]:
        """Tables of scattered pages, and where rows are."""
        case = self.case
        lengths = np.array([row.length for row in case.rows], np.int32)
        table = np.zeros((len(case.rows), case.table_width), np.int32)
        counts = [case.pages_of(row) for row in case.rows]
        free = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(counts)))
        for line, own in zip(table, np.split(free, np.cumsum(counts)[:-1]), strict=True):
            line[: len(own)] = own
        start = np.array([row.start for row in case.rows], np.int32)
        first = (np.cumsum(lengths) - lengths).astype(np.int32) if case.is_ragged else None
        found = {"table": table, "start": start, "length": lengths, "first": first}
        return jax.tree.map(jnp.asarray, found)

    def pools(self) -> Pools:
        """Drawn where they lie, codes and scales apart."""
        case = self.case
        shapes = abstract_pools(
            layers=self.layers,
            pages=1 + sum(map(case.pages_of, case.rows)),
            kv_heads=case.kv_heads,
            page_tokens=case.page_tokens,
            head_dim=case.head_dim,
            dtype=self.dtype,
        )
        pools = jax.tree.map(draw, shapes)
        if not pools.has_scales:
            return pools

        # Numbers of about one: with larger ones a softmax would see a single key.
        def scale(drawn: jax.Array) -> jax.Array:
            usual = jnp.asarray(NUMBERS[self.pages], FLOAT)
            return (1 + jnp.clip(drawn, -2, 2) / 4) / usual

        return replace(pools, k_scale=scale(pools.k_scale), v_scale=scale(pools.v_scale))

    def state(self) -> Any:
        """Pools, queries, rows, and room for answers."""
        shape = (*self.places(), self.case.q_heads, self.case.head_dim)
        q = draw(jax.ShapeDtypeStruct(shape, FLOAT))
        return {"out": jnp.zeros_like(q), "q": q, "pools": self.pools()} | self.rows()

    def step(self, state: Any, layer: Any, implementation: str, config: Any) -> Any:
        """Attends."""
        given = {name: value for name, value in state.items() if name != "out"}
        given |= {"layer": layer, "scale": self.case.scale}
        if config is None:
            out = paged_attention(**given, implementation=implementation)
        else:
            if given["pools"].rotates_keys:
                given["q"] = rotate(given["q"])
            out = paged_attention_mosaic(**given, config=config)
            if given["pools"].rotates_values:
                out = rotate(out)
        return state | {"out": out}

    def answers(self, state: Any) -> list[jax.Array]:
        """The answers."""
        return [state["out"]]


@dataclass(frozen=True)
class RopeAppend(Attention):
    """Rope and append of one layer. Its heads are warm, as they come out of a projection."""

    @property
    def layers(self) -> int:
        """Of the pool; little of it is touched."""
        return 4

    @property
    def moved(self) -> int:
        """Heads in, queries out, cells."""
        case, tokens = self.case, sum(row.length for row in self.case.rows)
        heads = 2 * (case.q_heads + case.kv_heads) * case.head_dim * FLOAT.itemsize
        return tokens * (heads + 2 * case.kv_heads * cell_bytes(case.head_dim, self.dtype))

    @property
    def flops(self) -> int:
        """None worth counting."""
        return 0

    def state(self) -> Any:
        """Heads of every place, angles, and the pools."""
        case, places = self.case, self.places()
        q, k, v = (
            draw(jax.ShapeDtypeStruct((*places, heads, case.head_dim), FLOAT), seed)
            for seed, heads in enumerate((case.q_heads, case.kv_heads, case.kv_heads))
        )
        angles = jnp.linspace(0, 3, math.prod(places) * case.head_dim // 2)
        angles = angles.reshape(*places, -1)
        rope = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
        return {"q": q, "k": k, "v": v, "rope": rope, "pools": self.pools()} | self.rows()

    def step(self, state: Any, layer: Any, implementation: str, config: Any) -> Any:
        """Rotates and appends; queries are turned on and on."""
        name = "scatter" if implementation == "reference" else implementation
        q, pools = rope_append(**state, layer=layer, implementation=name)
        return state | {"q": q, "pools": pools}

    def answers(self, state: Any) -> list[jax.Array]:
        """Queries, and the numbers of all pages but the null page."""
        pools = state["pools"]
        cells = [pools.k, pools.v]
        if pools.has_scales:
            cells = [dequantize(pools.k, pools.k_scale), dequantize(pools.v, pools.v_scale)]
        real = np.arange(pools.k.shape[0]) % pools.pages != 0
        return [state["q"], *(each[real] for each in cells)]


@dataclass(frozen=True)
class Product:
    """One product of a stack's layer."""

    what: str
    format: str
    rows: int
    out: int
    depth: int
    cold_bytes: int = COLD_BYTES
    narrow: bool = True
    """As programs of 16-bit models ask for it; False: as others do."""

    @property
    def can_round(self) -> bool:
        """Whether the kernel rounds activations to the matrix's own 8 bits if it may."""
        its = spec(self.format)
        return its.group is None and its.kind != "int4"

    @property
    def label(self) -> dict[str, Any]:
        """Names the case."""
        return {"case": f"{self.rows} rows", "model": self.what, "weights": self.format} | {
            "narrow": self.narrow,
            "shape": [self.out, self.depth],
        }

    @property
    def layers(self) -> int:
        """Of the stack."""
        return max(2, -(-self.cold_bytes // self.moved))

    @property
    def moved(self) -> int:
        """The matrix, activations and answers."""
        weights = self.out * self.depth * bytes_per_weight(self.format)
        return int(weights) + self.rows * (self.out + self.depth) * FLOAT.itemsize

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.rows * self.out * self.depth

    def stack(self) -> OnGpu:
        """Drawn codes and scales, repacked."""
        its = spec(self.format)
        shape = (self.layers, self.out)

        def some(columns: int, dtype: Any, seed: int) -> jax.Array:
            return draw(jax.ShapeDtypeStruct((*shape, columns), dtype), seed)

        groups = self.depth // (its.group or self.depth)
        scale = jnp.abs(some(groups, its.scale_dtype, 1)) + jnp.asarray(0.01, its.scale_dtype)
        minimum = scale * jnp.asarray(-7.5, scale.dtype) if its.kind == "int4" else None
        values = some(self.depth // its.per_byte, its.value_dtype, 2)
        return jax.jit(for_gpu, donate_argnums=0)(Quantized(values, scale, minimum))

    def state(self) -> Any:
        """Activations, the stack, and room for answers."""
        x = draw(jax.ShapeDtypeStruct((self.rows, self.depth), FLOAT))
        return {"out": jnp.zeros((self.rows, self.out), FLOAT), "x": x, "matrix": self.stack()}

    def step(self, state: Any, layer: Any, implementation: str, config: Any) -> Any:
        """Multiplies; the reference, too, by activations that are rounded where a kernel's are."""
        x, matrix = state["x"], state["matrix"]
        if implementation == "reference" and self.narrow and self.can_round:
            x = self.rounded(x)
        given = {"layer": layer, "dtype": FLOAT, "narrow": self.narrow}
        if config is None:
            out = quantized_matmul(x, matrix, **given, implementation=implementation)
        else:
            out = quantized_matmul_mosaic(x, matrix, **given, config=config)
        return state | {"out": out}

    def rounded(self, x: jax.Array) -> jax.Array:
        """Activations as a product of 8 bits sees them, in float32.

        Those of float8 are off by more than answers may be.
        """
        if spec(self.format).kind == "int8":
            ratio, factor = rounded_rows(x, MAX_INT8)
            return jnp.rint(ratio) * factor[:, None]
        ratio, factor = rounded_rows(x, MAX_FP8)
        return ratio.astype(FP8).astype(jnp.float32) * factor[:, None]

    def answers(self, state: Any) -> list[jax.Array]:
        """The answers."""
        return [state["out"]]


@partial(jax.jit, static_argnums=(0, 1))
def draw(shape: jax.ShapeDtypeStruct, seed: int = 0) -> jax.Array:
    """Draws on the device: codes of every size, scales and floats of about one."""
    key = jax.random.key(seed)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jax.random.bits(key, shape.shape, f"uint{8 * shape.dtype.itemsize}").astype(
            shape.dtype
        )
    return jax.random.normal(key, shape.shape, FLOAT).astype(shape.dtype)
