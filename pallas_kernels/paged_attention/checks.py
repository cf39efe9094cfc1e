"""What no implementation of paged attention could take, refused while tracing.

Shapes that do not belong together would be read past their ends, so each is compared with the pool
or with the table. Annotations leave the axes apart that are compared here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.formats import FORMATS, SCALE_DTYPE
from pallas_kernels.paged_attention.pool import Pools

POOL_DTYPES = ("float32", "bfloat16", "float16")
"""Of pools without scales; those with scales have one of ``FORMATS``."""


def check_attention(
    q: Float[Array, "R T N H"],
    pools: Pools,
    *,
    scale: float,
    window: int | Int[Array, ""],
    softcap: float,
    sinks: Float[Array, " M"] | None,
) -> None:
    """Refuses queries, pages and numbers that are wrong for every implementation.

    Raises:
        ValueError: One of them is.
    """
    _check_pools(pools)
    q_heads, head_dim = q.shape[2:]
    _check_head_dim("queries", head_dim, pools)
    _check_heads(q_heads, pools)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}; head_dim ** -0.5 is usual")
    if isinstance(window, int) and window < 0:
        raise ValueError(f"window must be 0 (none) or a number of tokens, got {window}")
    if not softcap >= 0:
        raise ValueError(f"softcap must be 0 (none) or above, got {softcap}")
    if sinks is not None and sinks.shape != (q_heads,):
        raise ValueError(
            f"sinks have the shape {list(sinks.shape)} and there are {q_heads} query heads; give "
            "a logit for each"
        )


def check_new_tokens(pools: Pools, k: Float[Array, "R T K H"], v: Float[Array, ...]) -> None:
    """Refuses keys and values that are not as many numbers as their cells of the pool.

    Raises:
        ValueError: They are not.
    """
    _check_pools(pools)
    if k.shape != v.shape:
        raise ValueError(
            f"new keys have the shape {list(k.shape)} and new values {list(v.shape)}; give both "
            "for the same tokens and heads"
        )
    _check_head_dim("new tokens", k.shape[3], pools)
    if k.shape[2] != pools.k.shape[1]:
        raise ValueError(
            f"new tokens have {k.shape[2]} key/value heads and the pool {pools.k.shape[1]}; they "
            "must agree, on a mesh as the shards that a device has"
        )


def check_rope(
    pools: Pools,
    q: Float[Array, "R T N H"],
    k: Float[Array, ...],
    rope: Float[Array, ...],
) -> None:
    """Refuses queries and angles that do not belong to the keys, which have been checked.

    Raises:
        ValueError: They do not.
    """
    _check_head_dim("queries", q.shape[3], pools)
    _check_heads(q.shape[2], pools)
    if q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"queries have {list(q.shape[:2])} places and new keys {list(k.shape[:2])}; give a "
            "query and a key for each"
        )
    half = (2, *k.shape[:2], k.shape[3] // 2)
    if rope.shape != half:
        raise ValueError(
            f"the angles have the shape {list(rope.shape)}; for new tokens {list(k.shape)} they "
            f"are {list(half)}: cosines and sines of each place's pairs"
        )


def check_places(
    what: str,
    rows: int,
    table: Int[Array, ...],
    start: Int[Array, ...],
    length: Int[Array, ...],
    first: Int[Array, ...] | None,
) -> None:
    """Refuses places that are neither each row's own nor shared, and rows not said in int32.

    Args:
        what: Has the places.
        rows: Of places.
        table: Pages of each row.
        start: Position of each row's first token.
        length: Real tokens of each row.
        first: Of rows that share their places, the first one of each.

    Raises:
        ValueError: One of them does not belong to the others.
    """
    if table.ndim != 2 or table.dtype != jnp.int32:
        raise ValueError(
            f"the table is {table.dtype}{list(table.shape)}; it must be int32 [rows, pages]: cast "
            "it or reshape it"
        )
    wanted = table.shape[0] if first is None else 1
    if rows != wanted:
        raise ValueError(
            f"{what} have {rows} rows of places and the table {table.shape[0]} rows; give as many "
            "as the table has, or one row of places for all of them, with first"
        )
    if first is not None and first.shape != table.shape[:1]:
        raise ValueError(
            f"first has the shape {list(first.shape)} and the table {table.shape[0]} rows; give "
            "the place of each"
        )
    for name, numbers in (("start", start), ("length", length), ("first", first)):
        if numbers is None:
            continue
        if numbers.shape != table.shape[:1] or numbers.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {numbers.dtype}{list(numbers.shape)} and the table has "
                f"{table.shape[0]} rows; give int32[{table.shape[0]}], a number for each"
            )


def _check_pools(pools: Pools) -> None:
    """Refuses pages that are of no kind."""
    if pools.k.shape != pools.v.shape or pools.k.dtype != pools.v.dtype:
        raise ValueError(
            f"the key pool is {pools.k.dtype}{list(pools.k.shape)} and the value pool "
            f"{pools.v.dtype}{list(pools.v.shape)}; make both of pool_shape() and one dtype"
        )
    if pools.has_scales:
        _check_scales(pools)
    elif jnp.dtype(pools.k.dtype).name not in POOL_DTYPES:
        raise ValueError(
            f"the pool is {pools.k.dtype}; choose one of {', '.join(POOL_DTYPES)}, or give "
            f"{', '.join(FORMATS)} their scales"
        )
    if pools.pages < 1 or pools.k.shape[0] % pools.pages:
        raise ValueError(
            f"the pool has {pools.k.shape[0]} rows, not a multiple of its {pools.pages} pages "
            "per layer; make it of pool_shape()"
        )


def _check_heads(q_heads: int, pools: Pools) -> None:
    if q_heads % pools.k.shape[1]:
        raise ValueError(
            f"{q_heads} query heads cannot be split over {pools.k.shape[1]} key/value heads; "
            "make the first a multiple of the second"
        )


def _check_head_dim(what: str, head_dim: int, pools: Pools) -> None:
    if head_dim != pools.head_dim:
        raise ValueError(
            f"{what} have head_dim {head_dim} and the pool {pools.head_dim}; they must agree"
        )


def _check_scales(pools: Pools) -> None:
    """Refuses scales that do not belong to the pages beside them."""
    if pools.format is None:
        raise ValueError(
            f"the pool is {pools.k.dtype}; only pools of {', '.join(FORMATS)} have scales, and "
            f"they are {', '.join(format.storage.name for format in FORMATS.values())}"
        )
    for name in ("k_scale", "v_scale"):
        scale = getattr(pools, name)
        if scale is None or scale.dtype != SCALE_DTYPE or scale.shape != pools.k.shape[:-1]:
            got = "missing" if scale is None else f"{scale.dtype}{list(scale.shape)}"
            raise ValueError(
                f"{name} is {got}; the scales of a pool {pools.k.dtype}{list(pools.k.shape)} are "
                f"{SCALE_DTYPE.name}{list(pools.k.shape[:-1])}"
            )
