"""The paged key/value pool: its layout, and the only code that writes or gathers it.

One array holds the keys of every layer and one the values, as ``[layers * pages, kv_heads,
page_token, head_dim]``:

    axis 0   page ``p`` of layer ``l`` is row ``l * pages + p``; ``pages`` counts the null page
    axis 1   one key/value head of one page is one contiguous ``[page_token, head_dim]`` tile, so a
             page is contiguous for sharing and the head axis shards without splitting a tile
    axis 2   tokens of the page, in position order
    axis 3   head_dim

Pools of int8 have their scales beside them, one for each token and head, in arrays of the same axes
without the last (``int8.py``); they are shared, sharded and donated as their pages are.

Attention consumes that order as it stands, so no transpose of the pool ever stands between a write
and a read. Which pages belong to whom is decided elsewhere; here a table is just numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.int8 import dequantize, quantize
from pallas_kernels.paged_attention.ragged import places_of

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
    """bfloat16 ``[layers * pages, kv_heads, page_token]`` of int8 pools; None: floats."""
    v_scale: PoolArray = None

    @property
    def page_tokens(self) -> int:
        """Tokens in one page."""
        return self.k.shape[2]

    @property
    def has_scales(self) -> bool:
        """Whether pages hold int8."""
        return self.k_scale is not None


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
    page_tokens = pools.page_tokens
    width = table.shape[1]
    if first is None:
        token_RT = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
        is_real_RT = token_RT < length[:, None]
        position_RT = start[:, None] + token_RT
        of_RT = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    else:
        of_RT, token_RT, is_real_RT = (x[None] for x in places_of(first, length, k.shape[1]))
        position_RT = start[of_RT] + token_RT
    is_real_RT = is_real_RT & (position_RT < width * page_tokens)
    entry_RT = jnp.clip(position_RT // page_tokens, 0, width - 1)
    page_RT = jnp.where(is_real_RT, table[of_RT, entry_RT], NULL_PAGE)
    row_RT = layer * pools.pages + page_RT
    offset_RT = position_RT % page_tokens
    # Two index arrays around a slice: the scatter takes k and v as they come, [R, T, K, H].
    here = (row_RT, slice(None), offset_RT)
    if not pools.has_scales:
        return replace(
            pools,
            k=pools.k.at[here].set(k.astype(pools.k.dtype)),
            v=pools.v.at[here].set(v.astype(pools.v.dtype)),
        )
    (k_RTKH, k_scale_RTK), (v_RTKH, v_scale_RTK) = quantize(k), quantize(v)
    return replace(
        pools,
        k=pools.k.at[here].set(k_RTKH),
        v=pools.v.at[here].set(v_RTKH),
        k_scale=pools.k_scale.at[here].set(k_scale_RTK),
        v_scale=pools.v_scale.at[here].set(v_scale_RTK),
    )


def read(
    pools: Pools, table: Int[Array, "B C"], *, layer: int | Int[Array, ""]
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Lines up the pages that ``table`` names, in table order, head by head: ``S = C * Z``.

    Page and head are both index arrays, so the gather copies ``[page_token, head_dim]`` tiles to
    where the products want them, and no transpose of the block follows. Pages of int8 come as the
    float32 numbers they stand for, others as they are.
    """
    kv_heads, page_tokens, head_dim = pools.k.shape[1:]
    row_BxC = (layer * pools.pages + table)[:, None, :]
    head_xKx = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    shape_BKSH = (table.shape[0], kv_heads, table.shape[1] * page_tokens, head_dim)
    k_BKSH = pools.k[row_BxC, head_xKx].reshape(shape_BKSH)
    v_BKSH = pools.v[row_BxC, head_xKx].reshape(shape_BKSH)
    if not pools.has_scales:
        return k_BKSH, v_BKSH
    k_scale_BKS = pools.k_scale[row_BxC, head_xKx].reshape(shape_BKSH[:-1])
    v_scale_BKS = pools.v_scale[row_BxC, head_xKx].reshape(shape_BKSH[:-1])
    return dequantize(k_BKSH, k_scale_BKS), dequantize(v_BKSH, v_scale_BKS)
