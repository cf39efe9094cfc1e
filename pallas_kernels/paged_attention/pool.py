"""The paged key/value pool: its layout, and the only code that writes or gathers it.

One array holds the keys of every layer and one the values, as ``[layers * pages, kv_heads,
page_token, head_dim]``:

    axis 0   page ``p`` of layer ``l`` is row ``l * pages + p``; ``pages`` counts the null page
    axis 1   one key/value head of one page is one contiguous ``[page_token, head_dim]`` tile, so a
             page is contiguous for sharing and the head axis shards without splitting a tile
    axis 2   tokens of the page, in position order
    axis 3   head_dim

Pools of int8, fp8 and int4 have scales beside them, one for each token and head, in arrays of the
same axes without the last; they are shared, sharded and donated as their pages are. Two numbers of
int4 share a byte, and the last axis is half as long (``formats.py``).

Attention consumes that order as it stands, so no transpose of the pool ever stands between a write
and a read. Which pages belong to whom is decided elsewhere; here a table is just numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.cells import cells_of
from pallas_kernels.paged_attention.formats import (
    SCALE_DTYPE,
    Format,
    dequantize,
    format_of,
    quantize,
)

NULL_PAGE = 0
"""First page of every layer, never allocated. Padding reads and writes it; masks keep it out of
every answer."""

type PoolArray = Any
"""``Float[Array, "LP K Z H"]``, or what stands for one: jax rebuilds the dataclass around whatever
a tree function returns (shapes, specs, shardings), and a check of the field would refuse those."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pools:
    """Keys and values of every page of every layer; a pytree, made to be donated."""

    k: PoolArray
    v: PoolArray
    pages: int = field(metadata={"static": True})
    """Pages per layer, the null page included."""
    k_scale: PoolArray = None
    """bfloat16 ``[layers * pages, kv_heads, page_token]`` of pools with a format; None: floats."""
    v_scale: PoolArray = None

    @property
    def page_tokens(self) -> int:
        """Tokens in one page."""
        return self.k.shape[2]

    @property
    def has_scales(self) -> bool:
        """Whether pages hold numbers that scales belong to."""
        return self.k_scale is not None

    @property
    def format(self) -> Format | None:
        """What those numbers are; None: pages hold floats."""
        return format_of(self.k.dtype) if self.has_scales else None

    @property
    def rotates_keys(self) -> bool:
        """Whether keys are rotated in there, and queries have to be."""
        return self.format is not None and self.format.rotates_keys

    @property
    def rotates_values(self) -> bool:
        """Whether values are rotated in there, and answers come out so."""
        return self.format is not None and self.format.rotates_values

    @property
    def head_dim(self) -> int:
        """Numbers of one token and head."""
        format = self.format
        return self.k.shape[3] * (1 if format is None else format.packed)


def pool_shape(
    *, layers: int, pages: int, kv_heads: int, page_tokens: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Shape of each of the two pool arrays; ``pages`` counts the null page of each layer."""
    if pages < 2:
        raise ValueError(
            f"pages must be at least 2 (page {NULL_PAGE} of each layer is the null page), "
            f"got {pages}; give the pool more memory or make pages smaller"
        )
    sizes = {
        "layers": layers,
        "kv_heads": kv_heads,
        "page_tokens": page_tokens,
        "head_dim": head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return layers * pages, kv_heads, page_tokens, head_dim


def abstract_pools(
    *,
    layers: int,
    pages: int,
    copies: int = 1,
    kv_heads: int,
    page_tokens: int,
    head_dim: int,
    dtype: np.dtype,
) -> Pools:
    """Shapes and dtypes of pools whose numbers are of a dtype: a float's, or a format's.

    Args:
        layers: of the model.
        pages: per layer, the null page included.
        copies: so many pools stand one behind the other, as shards of one array.
        kv_heads: of all shards.
        page_tokens: in a page.
        head_dim: numbers of one token and head.
        dtype: ``float32``, ``bfloat16``, ``float16``, or the ``dtype`` of a ``Format``.
    """
    format = format_of(dtype)
    shape = pool_shape(
        layers=layers,
        pages=pages,
        kv_heads=kv_heads,
        page_tokens=page_tokens,
        head_dim=head_dim if format is None else format.width(head_dim),
    )
    shape = (copies * shape[0], *shape[1:])
    pool = jax.ShapeDtypeStruct(shape, dtype if format is None else format.storage)
    scale = None if format is None else jax.ShapeDtypeStruct(shape[:-1], SCALE_DTYPE)
    return Pools(k=pool, v=pool, pages=pages, k_scale=scale, v_scale=scale)


def append_scatter(
    pools: Pools,
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    first: Int[Array, " B"] | None = None,
) -> Pools:
    """Computes ``append`` as two scatters of XLA; see there for the arguments."""
    cell_RT = cells_of(pools.page_tokens, table, start, length, k.shape[1], first)
    page_RT, offset_RT = jnp.divmod(cell_RT, pools.page_tokens)
    # Nowhere is before all pages: that is the null page.
    row_RT = layer * pools.pages + jnp.maximum(page_RT, NULL_PAGE)
    # Two index arrays around a slice: the scatter takes k and v as they come, [R, T, K, H].
    here = (row_RT, slice(None), offset_RT)
    if (format := pools.format) is None:
        return replace(
            pools,
            k=pools.k.at[here].set(k.astype(pools.k.dtype)),
            v=pools.v.at[here].set(v.astype(pools.v.dtype)),
        )
    (k_RTKC, k_scale_RTK), (v_RTKC, v_scale_RTK) = quantize(k, format), quantize(v, format)
    return replace(
        pools,
        k=pools.k.at[here].set(k_RTKC),
        v=pools.v.at[here].set(v_RTKC),
        k_scale=pools.k_scale.at[here].set(k_scale_RTK),
        v_scale=pools.v_scale.at[here].set(v_scale_RTK),
    )


def read(
    pools: Pools, table: Int[Array, "B C"], *, layer: int | Int[Array, ""]
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Lines up the pages that ``table`` names, in table order, head by head: ``S = C * Z``.

    Page and head are both index arrays, so the gather copies ``[page_token, head_dim]`` tiles to
    where the products want them, and no transpose of the block follows. Pages with scales come as
    the float32 numbers they stand for, of int4 rotated, and others as they are.
    """
    kv_heads, page_tokens, width = pools.k.shape[1:]
    row_BxC = (layer * pools.pages + table)[:, None, :]
    head_xKx = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    shape_BKSC = (table.shape[0], kv_heads, table.shape[1] * page_tokens, width)
    k_BKSC = pools.k[row_BxC, head_xKx].reshape(shape_BKSC)
    v_BKSC = pools.v[row_BxC, head_xKx].reshape(shape_BKSC)
    if not pools.has_scales:
        return k_BKSC, v_BKSC
    k_scale_BKS = pools.k_scale[row_BxC, head_xKx].reshape(shape_BKSC[:-1])
    v_scale_BKS = pools.v_scale[row_BxC, head_xKx].reshape(shape_BKSC[:-1])
    return dequantize(k_BKSC, k_scale_BKS), dequantize(v_BKSC, v_scale_BKS)
