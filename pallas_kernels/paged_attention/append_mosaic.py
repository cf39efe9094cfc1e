"""Rotary positions and the append in one launch, on Hopper GPUs, in Mosaic.

A thread block takes one token through. Hardware copies its heads in, as lines of shared memory: the
queries, then its keys, then its values. They are rotated in registers, rounded to the pool's dtype,
and hardware copies them out: the queries to where attention reads them, keys and values into the
token's cell of the pool, which is written where it lies. Blocks are short, many share a core, and
so one's copies pass while another computes.

Keys of int8 are spread over all channels before they are rounded (``formats``): a Walsh-Hadamard
matrix is four of half its size, so the tensor cores multiply each half of a head by one such, and
their sum and difference are the halves of the product. Products with 1 and -1 are exact, and sums
in float32 of few numbers of bfloat16 nearly always, so that the numbers are those of
``formats.rotate_xla``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import LINES
from pallas_kernels.paged_attention.cells import NOWHERE, cells_of
from pallas_kernels.paged_attention.formats import INT4, INT8, LEAST, Format, hadamard
from pallas_kernels.paged_attention.pool import Pools

ALIGNED = 8
"""Keys and values begin at a multiple of so many lines: hardware copies from multiples of 128
bytes."""

APART = 1024
"""Arrays in shared memory begin at a multiple of so many bytes: JAX's compiler of these kernels
lays them out so."""
BARRIER_BYTES = 8
REDUCTION_BYTES = 2048
"""What it reserves where there is a maximum of each line."""


def rope_append_mosaic(
    pools: Pools,
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    rope: Float32[Array, "2 R T half"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    first: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "R T N H"], Pools]:
    """Computes ``rope_append``; see there for the arguments. Padding is written nowhere."""
    mosaic.decline_elsewhere()
    _decline(pools, q)
    rows, tokens, q_heads, head_dim = q.shape
    kv_heads, places = k.shape[2], rows * tokens
    group = q_heads // kv_heads
    body = _Body(
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page_tokens=pools.page_tokens,
        dtype=q.dtype,
        format=pools.format,
    )
    if (needed := body.shared_bytes()) > mosaic.SHARED_BYTES:
        raise NotImplementedError(
            f"a token's {q_heads} query and {kv_heads} key/value heads of head_dim {head_dim} need "
            f"{needed} bytes of shared memory, and there are {mosaic.SHARED_BYTES}"
        )
    # As projections give them, side by side: where they were split, XLA leaves both out.
    groups = (x.reshape(rows, tokens, kv_heads, -1, head_dim) for x in (q, k, v))
    heads = jnp.concatenate(list(groups), axis=3).reshape(places, kv_heads, -1, head_dim)
    cells = cells_of(pools.page_tokens, table, start, length, tokens, first).reshape(places)
    # Written where they lie: XLA sees an operand that is the result, too.
    refs = [jax.new_ref(x) for x in (pools.k, pools.v)]
    if pools.has_scales:
        refs += [jax.new_ref(x) for x in (pools.k_scale, pools.v_scale)]
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((places, q_heads, head_dim), q.dtype),
        scratch_types=body.scratch(),
        grid=(places,),
        grid_names=("place",),
        kernel_name="rope_append",
    )
    base = (jnp.asarray(layer, jnp.int32) * pools.pages).reshape(1)
    half = head_dim // 2
    spread = [jnp.asarray(hadamard(half), q.dtype)] if body.spreads else []
    with jax.named_scope("append"):
        turned = run(heads, rope.reshape(2, places, half), cells, base, *spread, *refs)
    written = dict(zip(("k", "v", "k_scale", "v_scale"), map(jax.freeze, refs), strict=False))
    return turned.reshape(q.shape), replace(pools, **written)


def _decline(pools: Pools, q: Float[Array, "R T N H"]) -> None:
    """Says what the kernel was not written for; runs while tracing only."""
    group, head_dim = q.shape[2] // pools.k.shape[1], q.shape[3]
    dtype, pages = jnp.dtype(q.dtype).name, jnp.dtype(pools.k.dtype).name
    if dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"heads are bfloat16 or float16, got {dtype}")
    if pools.format is INT4:
        raise NotImplementedError(
            "pages of int4 take heads that are spread over all channels and packed in pairs, "
            "which this kernel does not do"
        )
    if pools.format is INT8 and head_dim & (head_dim - 1):
        raise NotImplementedError(
            "keys of int8 are spread over all channels, which this kernel does for a head_dim of "
            f"64, 128 or 256, got {head_dim}"
        )
    if pools.format is None and pages != dtype:
        raise NotImplementedError(f"pages without scales are {dtype}, as the heads, got {pages}")
    if head_dim % 16 or head_dim > 256:
        raise NotImplementedError(f"head_dim must be a multiple of 16 up to 256, got {head_dim}")
    if group > 1 and group * head_dim % 64:
        raise NotImplementedError(
            f"the queries of a key head must begin at a multiple of 128 bytes, and {group} of "
            f"head_dim {head_dim} do not"
        )


@dataclass(frozen=True)
class _Body:
    """The kernel's function, with what it was made for."""

    kv_heads: int
    group: int
    head_dim: int
    page_tokens: int
    dtype: Any
    format: Format | None
    """Of pages with scales."""

    @property
    def spreads(self) -> bool:
        """Whether keys are rotated before they are rounded."""
        return self.format is not None and self.format.rotates_keys

    @property
    def keys(self) -> int:
        """The line of the first key."""
        return _up(self.kv_heads * self.group, ALIGNED)

    @property
    def values(self) -> int:
        """The line of the first value."""
        return self.keys + _up(self.kv_heads, ALIGNED)

    @property
    def lines(self) -> int:
        """All lines, those of nobody included."""
        return _up(self.values + self.kv_heads, LINES)

    @property
    def copies_in(self) -> int:
        """Copies of a token's heads: one for each group of queries, of keys, and of values."""
        return (1 if self.group == 1 else self.kv_heads) + 2

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers, by name."""
        # One line more keeps the compiler from laying lines out in tiles of eight, which groups of
        # queries do not fill.
        count = self.lines + 1
        made = {
            "wide": plgpu.SMEM((count, self.head_dim), self.dtype),
            "angles": plgpu.SMEM((2, self.head_dim // 2), jnp.float32),
            "here": plgpu.Barrier(num_arrivals=self.copies_in + 1 + self.spreads),
        }
        if self.format is not None:
            made |= {
                "codes": plgpu.SMEM((count, self.head_dim), self.format.storage),
                "scales": plgpu.SMEM((self.lines,), jnp.bfloat16),
            }
        if self.spreads:
            half = self.head_dim // 2
            made["spread"] = mosaic.tile((half, half), self.dtype)
        return made

    def shared_bytes(self) -> int:
        """Of a thread block, with what the compiler adds; never less than it reports."""
        arrays = [ref for ref in self.scratch().values() if hasattr(ref, "shape")]
        sizes = [math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize for ref in arrays]
        own = (BARRIER_BYTES, 0 if self.format is None else REDUCTION_BYTES)
        return sum(_up(size, APART) for size in (*sizes, *own))

    def __call__(
        self, heads: Any, rope: Any, cells: Any, base: Any, *refs: Any, **scratch: Any
    ) -> None:
        """Takes one token through."""
        *matrix, q = refs
        pools = matrix[self.spreads :]
        wide, here = scratch["wide"], scratch["here"]
        place = lax.axis_index("place")
        cell = cells[place]
        self._fetch(heads.at[place], rope.at[:, place], wide, scratch["angles"], here)
        if self.spreads:
            plgpu.copy_gmem_to_smem(matrix[0], scratch["spread"], here)
        plgpu.barrier_wait(here)
        for begin in range(0, self.lines, LINES):
            halves = self._rotate(begin, wide, scratch["angles"])
            if self.format is not None and begin + LINES > self.keys:
                if self.spreads:
                    halves = self._spread(begin, halves, scratch["spread"])
                self._quantize(begin, self.format, halves, scratch["codes"], scratch["scales"])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(wide.at[pl.ds(0, self.kv_heads * self.group)], q.at[place])

        @pl.when(cell != NOWHERE)
        def _() -> None:
            page = base[0] + lax.div(cell, jnp.int32(self.page_tokens))
            slot = lax.rem(cell, jnp.int32(self.page_tokens))
            self._put(page, slot, pools, scratch)

        plgpu.wait_smem_to_gmem(0)

    def _fetch(self, heads: Any, rope: Any, wide: Any, angles: Any, here: Any) -> None:
        """Starts the copies of a token's heads and of its angles."""
        plgpu.copy_gmem_to_smem(rope, angles, here)
        kv_heads, group = self.kv_heads, self.group
        if group == 1:
            plgpu.copy_gmem_to_smem(heads.at[:, 0], wide.at[pl.ds(0, kv_heads)], here)
        else:
            for head in range(kv_heads):
                into = wide.at[pl.ds(head * group, group)]
                plgpu.copy_gmem_to_smem(heads.at[head, pl.ds(0, group)], into, here)
        for which, begin in ((group, self.keys), (group + 1, self.values)):
            plgpu.copy_gmem_to_smem(heads.at[:, which], wide.at[pl.ds(begin, kv_heads)], here)

    def _rotate(self, begin: int, wide: Any, angles: Any) -> list[Array]:
        """Rotates so many lines where they lie; values stay as they are. Returns both halves."""
        half = self.head_dim // 2
        shape = (LINES, half)
        refs = [wide.at[pl.ds(begin, LINES), part] for part in self._halves()]
        one, two = (_lines(ref).astype(jnp.float32) for ref in refs)
        cos, sin = (lax.broadcast_in_dim(angles[i], shape, [1]) for i in range(2))
        is_turned = self._line(shape) < self.values - begin
        turned = (one * cos - two * sin, two * cos + one * sin)
        halves = []
        for ref, new, old in zip(refs, turned, (one, two), strict=True):
            # A value is rounded back to what it was.
            halves.append(jnp.where(is_turned, new, old).astype(self.dtype))
            ref[...] = halves[-1]
        return halves

    def _spread(self, begin: int, halves: list[Array], matrix: Any) -> list[Array]:
        """Multiplies keys by a Walsh-Hadamard matrix, as both halves; the rest stays as it is."""
        shape = (LINES, self.head_dim // 2)
        one, two = (mosaic.product(None, half, matrix, shape) for half in halves)
        factor = jnp.float32(self.head_dim**-0.5)
        is_key = self._line(shape) < self.values - begin
        return [
            jnp.where(is_key, new * factor, old.astype(jnp.float32))
            for new, old in zip((one + two, one - two), halves, strict=True)
        ]

    def _quantize(
        self, begin: int, format: Format, halves: list[Array], codes: Any, scales: Any
    ) -> None:
        """Rounds so many lines as ``formats.quantize`` does, to the same bits."""
        lines = pl.ds(begin, LINES)
        numbers = [half.astype(jnp.float32) for half in halves]
        largest = jnp.maximum(*(jnp.abs(half).max(axis=1) for half in numbers))
        scale = jnp.where(largest < LEAST, 0.0, largest * jnp.float32(1 / format.most))
        scale = mosaic.rounded(scale, jnp.bfloat16)
        scales[lines] = scale.astype(jnp.bfloat16)
        is_usable = (scale > 0) & (scale < jnp.inf)
        inverse = jnp.where(is_usable, 1 / jnp.where(is_usable, scale, 1.0), 0.0)
        factor = lax.broadcast_in_dim(inverse, (LINES, self.head_dim // 2), [0])
        for part, half in zip(self._halves(), numbers, strict=True):
            # Not a product with 0: that of an infinity would be NaN.
            ratio = jnp.where(factor > 0, half * factor, 0.0)
            whole = jnp.round(ratio) if format.dtype == jnp.int8 else ratio
            codes[lines, part] = whole.astype(format.storage)

    def _line(self, shape: tuple[int, ...]) -> Array:
        """The number of each line, counted from the first of those at hand."""
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)

    def _halves(self) -> tuple[Any, Any]:
        """The members of all pairs: the first ones, and their partners."""
        half = self.head_dim // 2
        return pl.ds(0, half), pl.ds(half, half)

    def _put(
        self,
        page: Int32[Array, ""],
        slot: Int32[Array, ""],
        pools: list[Any],
        scratch: dict[str, Any],
    ) -> None:
        """Starts the copies of keys and values into their cell."""
        source = scratch["wide" if self.format is None else "codes"]
        for pool, begin in zip(pools[:2], (self.keys, self.values), strict=True):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(begin, self.kv_heads)], pool.at[page, :, slot])
        for pool, begin in zip(pools[2:], (self.keys, self.values), strict=False):
            # Two bytes each, a page apart: no copy of hardware's is as small.
            for head in range(self.kv_heads):
                pool[page, head, slot] = scratch["scales"][begin + head]


def _lines(ref: Any) -> Array:
    """Reads lines that lie one after the other, and so from few banks at once."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
