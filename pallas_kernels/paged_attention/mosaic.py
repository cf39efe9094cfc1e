"""Paged attention on Hopper GPUs: one launch over the pages where they lie.

Here a step is cut into units and its answers are gathered (``work.py``, in XLA); what is between is
``mosaic_kernel.py``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import LINES
from pallas_kernels.paged_attention.mosaic_kernel import Config, Launch, attend, shared_bytes
from pallas_kernels.paged_attention.pool import Pools
from pallas_kernels.paged_attention.ragged import places_of
from pallas_kernels.paged_attention.work import Shape, merge, most_units, pack, plan_work

SHARED_BYTES = 232_448 - 4_096
"""Of one thread block on Hopper, less what barriers and alignment take."""
HEAD_DIMS = (64, 96, 128, 192, 256)
PAGE_TOKENS = (8, 16, 32, 64, 128, 256)
PIECE_TOKENS = 512
"""A row with one query is cut into pieces of at least so many keys."""
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
        pools: of 16 bits, int8 or e4m3.
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
    compute = compute_dtype(q.dtype, pools.k.dtype)
    lines_of_places, tokens, q_heads, head_dim = q.shape
    kv_heads = pools.k.shape[1]
    group = q_heads // kv_heads
    places = lines_of_places * tokens
    one_query = first is None and tokens == 1
    config = config or choose_config(
        group=group, head_dim=head_dim, pages=pools.k.dtype, compute=compute, one_query=one_query
    )
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
            work.count,
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
    )
    scales = (pools.k_scale, pools.v_scale) if pools.has_scales else None
    outs, sums = attend(launch, packed, pools.k, pools.v, table, work.units, numbers, scales)
    if first is None:
        place = jnp.arange(places, dtype=jnp.int32)
        row, token = jnp.divmod(place, tokens)
        is_real = token < length[row]
    else:
        row, token, is_real = places_of(first, length, places)
    out = merge(shape, work, outs, sums, row, token, is_real, sinks)
    return out.reshape(q.shape).astype(q.dtype)


def compute_dtype(q: jnp.dtype, pages: jnp.dtype) -> jnp.dtype:
    """The dtype of the tensor cores' operands."""
    if jnp.dtype(pages).name == "float8_e4m3fn":
        return jnp.dtype(jnp.float16)  # The processor cannot make bfloat16 of e4m3.
    if jnp.dtype(pages).itemsize == 1:
        return jnp.dtype(jnp.bfloat16)  # float16 of int8 takes a slower unit.
    return jnp.dtype(pages)


def choose_config(
    *,
    group: int,
    head_dim: int,
    pages: jnp.dtype,
    compute: jnp.dtype,
    one_query: bool,
    blocks: int = 132,
) -> Config:
    """Returns how to tile a launch: as deep a ring as shared memory holds."""
    has_scales = jnp.dtype(pages).itemsize == 1
    tiles = 1 if one_query or has_scales or head_dim > 128 else 2
    columns = 2 if head_dim > 128 else 1
    out = jnp.float32 if one_query else compute
    for query_stages, stages in ((2, 6), (2, 5), (2, 4), (2, 3), (2, 2), (1, 2), (1, 1)):
        config = Config(
            tiles=tiles,
            columns=columns,
            tile_keys=64,
            stages=stages,
            query_stages=query_stages,
            blocks=blocks,
        )
        if shared_bytes(config, head_dim, pages, compute, out) <= SHARED_BYTES:
            return config
    raise NotImplementedError(f"no tiling of head_dim {head_dim} fits shared memory")
