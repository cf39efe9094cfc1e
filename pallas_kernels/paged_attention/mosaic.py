"""Paged attention on Hopper GPUs: one launch over the pages where they lie.

Here a step is cut into units and its answers are gathered (``work.py``, in XLA); what is between is
``mosaic_kernel.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import LINES, decline_elsewhere
from pallas_kernels.paged_attention.formats import INT4
from pallas_kernels.paged_attention.mosaic_config import (
    PIECE_TOKENS,
    TILE_KEYS,
    Problem,
    best_known,
    compute_dtype,
    rule,
)
from pallas_kernels.paged_attention.mosaic_kernel import attend
from pallas_kernels.paged_attention.mosaic_launch import Config, Launch
from pallas_kernels.paged_attention.pool import Pools
from pallas_kernels.paged_attention.ragged import places_of
from pallas_kernels.paged_attention.work import Shape, merge, most_units, pack, plan_work
from pallas_kernels.target import target

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
MOST_PIECES = 16
ALL_KEYS = 1 << 30
"""A window as wide as any context."""


def paged_attention_mosaic(
    q: Float[Array, "R T N H"],
    pools: Pools,
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    first: Int[Array, " B"] | None = None,
    window: int | Int[Array, ""] = 0,
    softcap: float = 0.0,
    narrow: bool = False,
    sinks: Float[Array, " N"] | None = None,
    config: Config | None = None,
) -> Float[Array, "R T N H"]:
    """Computes ``paged_attention``; see there for the arguments.

    Products take operands of 16 bits and sum in float32; weights are rounded to 16 bits before they
    meet the values, as everywhere on these GPUs.

    Args:
        q: of 16 bits.
        pools: of 16 bits, or with scales.
        table: as there.
        start: as there.
        length: as there.
        layer: as there.
        scale: as there.
        first: as there.
        window: as there.
        softcap: as there.
        narrow: changes nothing.
        sinks: as there.
        config: how the kernel is tiled; None: as is best known.
    """
    _decline(q, pools)
    k, v = (as_numbers(pages) for pages in (pools.k, pools.v))
    compute = compute_dtype(k.dtype)
    lines_of_places, tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    places = lines_of_places * tokens
    one_query = first is None and tokens == 1
    problem = Problem(head_dim, group, pools.page_tokens, k.dtype, one_query)
    config = config or choose_config(problem)
    if reason := problem.why_not(config):
        raise NotImplementedError(reason)
    shape = Shape(
        group=group,
        tile_queries=config.tiles * LINES,
        tile_keys=config.tile_keys,
        piece_tiles=-(-PIECE_TOKENS // config.tile_keys),
        most_pieces=MOST_PIECES if one_query else 1,
    )
    rows = length.shape[0]
    units = most_units(shape, rows, places, None if first is not None else tokens)
    packed, begin = pack(q.astype(compute), length, first, kv_heads, shape.tile_queries)
    work = plan_work(shape, units, begin, start, length, window)
    has_window = not (isinstance(window, int) and window == 0)
    numbers = jnp.stack(
        [
            work.real,
            jnp.asarray(layer, jnp.int32) * pools.pages,
            jnp.where(window == 0, ALL_KEYS, window),
        ]
    ).astype(jnp.int32)
    launch = Launch(
        config=config,
        units=units,
        out_lines=min(-(-group // 8) * 8, LINES) if one_query else LINES,
        out_dtype=jnp.dtype(jnp.float32) if one_query else compute,
        group=group,
        scale=scale,
        softcap=softcap,
        has_window=has_window,
        one_query=one_query,
        dtype=compute,
        pages=k.dtype,
        head_dim=head_dim,
        kv_heads=kv_heads,
        page_tokens=pools.page_tokens,
        table_width=table.shape[1],
    )
    scales = (pools.k_scale, pools.v_scale) if pools.has_scales else None
    outs, sums = attend(launch, packed, k, v, table, work.units, numbers, scales)
    if first is None:
        place = jnp.arange(places, dtype=jnp.int32)
        row, token = jnp.divmod(place, tokens)
        is_real = token < length[row]
    else:
        row, token, is_real = places_of(first, length, places)
    out = merge(shape, work, outs, sums, row, token, is_real, sinks)
    return out.reshape(q.shape).astype(q.dtype)


def _decline(q: Float[Array, "R T N H"], pools: Pools) -> None:
    """Says what the kernel was not written for; runs while tracing only."""
    decline_elsewhere()
    head_dim, page_tokens = q.shape[3], pools.page_tokens
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
        )
    if pools.format is INT4 and head_dim % 64:
        raise NotImplementedError(
            f"pages of int4 take a head_dim that is a multiple of 64, whose bytes a tile of shared "
            f"memory can hold in order, got {head_dim}"
        )
    if page_tokens % 8 or (TILE_KEYS % page_tokens and page_tokens % TILE_KEYS):
        raise NotImplementedError(
            f"pages must be of 8, 16 or 32 tokens or a multiple of {TILE_KEYS}, got {page_tokens}"
        )
    dtypes = [q.dtype] if pools.has_scales else [q.dtype, pools.k.dtype]
    for dtype in dtypes:
        if jnp.dtype(dtype).name not in DTYPES:
            raise NotImplementedError(f"dtypes are {' and '.join(DTYPES)}, got {dtype}")


def as_numbers(pages: Array) -> Array:
    """Pages as their numbers, two of which int4 keeps in a byte; nothing is moved."""
    if pages.dtype != jnp.uint8:
        return pages
    pairs = jax.lax.bitcast_convert_type(pages, jnp.int4)
    return pairs.reshape(*pages.shape[:-1], -1)


def choose_config(problem: Problem) -> Config:
    """Returns how to tile a launch: as is best known for this device, or by the rule."""
    return best_known(problem, target().kind) or rule(problem)
