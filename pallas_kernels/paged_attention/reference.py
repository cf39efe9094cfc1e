"""What paged attention means: gather everything, one softmax, float32 throughout.

Short enough to believe, and nothing else: it reads the whole table whatever the context, so its
memory grows with the table's width. ``blocked`` is what serves.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention.pool import Pools, read
from pallas_kernels.paged_attention.ragged import places_of


def visible_keys(
    key_position: Int[Array, " S"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    query_tokens: int,
    window: int | Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: causal, within the window, and none at all for padding."""
    token_T = jnp.arange(query_tokens, dtype=jnp.int32)
    position_BT1 = (start[:, None] + token_T[None, :])[:, :, None]
    key_11S = key_position[None, None, :]
    is_near_BTS = (window == 0) | (key_11S > position_BT1 - window)
    is_real_BT1 = (token_T[None, :] < length[:, None])[:, :, None]
    return (key_11S <= position_BT1) & is_near_BTS & is_real_BT1


def paged_attention_reference(
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
    narrow: bool = False,  # Allows it and asks for nothing.
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R T N H"]:
    """Defines ``paged_attention``; see there for the arguments."""
    options = {"layer": layer, "scale": scale, "window": window, "softcap": softcap}
    options["sinks"] = sinks
    if first is not None:
        return _ragged(q, pools, table, start, length, first, options)
    batch, query_tokens, q_heads, head_dim = q.shape
    kv_heads = pools.k.shape[1]
    k_BKSH, v_BKSH = (x.astype(jnp.float32) for x in read(pools, table, layer=layer))
    q_BTKGH = q.astype(jnp.float32).reshape(batch, query_tokens, kv_heads, -1, head_dim)
    scores_BKGTS = scale * jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH)
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)

    key_S = jnp.arange(k_BKSH.shape[2], dtype=jnp.int32)
    visible_BTS = visible_keys(key_S, start, length, query_tokens, window)
    visible_BKGTS = visible_BTS[:, None, None, :, :]
    top_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True, where=visible_BKGTS, initial=-1e30)
    sink_KG11 = None
    if sinks is not None:
        sink_KG11 = sinks.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        top_BKGT1 = jnp.maximum(top_BKGT1, sink_KG11)
    weights_BKGTS = jnp.where(visible_BKGTS, jnp.exp(scores_BKGTS - top_BKGT1), 0.0)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if sink_KG11 is not None:
        total_BKGT1 += jnp.exp(sink_KG11 - top_BKGT1)
    total_BKGT1 = jnp.maximum(total_BKGT1, 1e-30)
    # Zero weight does not silence a NaN: cells that no query of the row sees are zeroed themselves.
    seen_BxSx = jnp.any(visible_BTS, axis=1)[:, None, :, None]
    seen_v_BKSH = jnp.where(seen_BxSx, v_BKSH, 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS / total_BKGT1, seen_v_BKSH)
    return out_BTKGH.reshape(batch, query_tokens, q_heads, head_dim).astype(q.dtype)


def _ragged(
    q: Float[Array, "1 T N H"],
    pools: Pools,
    table: Int[Array, "B W"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    first: Int[Array, " B"],
    options: dict[str, Any],
) -> Float[Array, "1 T N H"]:
    """Gives every row places of its own, and takes each place's answer from its row."""
    places = q.shape[1]
    place_BT = first[:, None] + jnp.arange(places, dtype=jnp.int32)[None, :]
    own_BTNH = q[0, jnp.minimum(place_BT, places - 1)]
    out_BTNH = paged_attention_reference(own_BTNH, pools, table, start, length, **options)
    row_T, token_T, is_real_T = places_of(first, length, places)
    return jnp.where(is_real_T[:, None, None], out_BTNH[row_T, token_T], 0)[None]
