"""Everything that lives on the device between two steps, as one donated pytree.

Rows (R) are one more than there can be sequences: the last is the null row, which padding lines
read and write. Data shards have pages and rows of their own, numbered from 0 in each; a global
array holds the parts of all shards one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.engine.constraint import mask_words
from jaxserve.models.config import ModelConfig
from pallas_kernels.paged_attention import Pools, abstract_pools, cell_bytes
from sharding.rules import ShardingRules
from sharding.specs import partition_specs

if TYPE_CHECKING:
    type RowTokens = Int[Array, " R"]
    type RowCounts = Int[Array, "R V"]
    type RowBias = Float[Array, "R V"]
    type RowMasks = Int[Array, "R M"]
else:
    # jax rebuilds the dataclass around shapes, shardings and specs; a run-time check of the fields
    # would refuse those, so their shapes are for readers and pyright.
    RowTokens = RowCounts = RowBias = RowMasks = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """The page pools and what each row carries from step to step. Donated by every program."""

    pools: Pools
    last_token: RowTokens
    """The newest sampled token of every row: the next decode step's input."""
    counts: RowCounts
    """Output occurrences of every token; bit 30 marks tokens of the prompt."""
    bias: RowBias
    """Added to the logits; minus infinity bans a token."""
    masks: RowMasks
    """The tokens that a grammar allows, a bit each (``Matcher.fill``), whole on every device."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of the device state."""

    num_pages: int
    """Pages per layer in each data shard, the null page included."""
    page_tokens: int
    max_rows: int
    """Of each data shard."""
    dtype: jnp.dtype
    """Of keys and values: a float's, or that of a ``Format``, which has scales beside them."""
    data_shards: int = 1

    def page_bytes(self, config: ModelConfig) -> int:
        """Bytes of one page over all layers, keys, values and scales, over the tensor axis."""
        return self.page_tokens * self.token_bytes(config)

    def token_bytes(self, config: ModelConfig) -> int:
        """Bytes of one token of context: a page has so many times ``page_tokens``."""
        return 2 * config.layers * config.kv_heads * cell_bytes(config.head_dim, self.dtype)

    def row_bytes(self, config: ModelConfig) -> int:
        """Bytes of the per-row state of one data shard, over the tensor axis."""
        return (self.max_rows + 1) * (4 + 8 * config.vocab_size + 4 * mask_words(config.vocab_size))


def abstract_state(shape: CacheShape, config: ModelConfig) -> DeviceState:
    """The state's shapes and dtypes (global, before sharding)."""
    rows = shape.data_shards * (shape.max_rows + 1)
    return DeviceState(
        pools=abstract_pools(
            layers=config.layers,
            pages=shape.num_pages,
            copies=shape.data_shards,
            kv_heads=config.kv_heads,
            page_tokens=shape.page_tokens,
            head_dim=config.head_dim,
            dtype=shape.dtype,
        ),
        last_token=jax.ShapeDtypeStruct((rows,), jnp.int32),  # pyright: ignore[reportArgumentType]
        counts=jax.ShapeDtypeStruct((rows, config.vocab_size), jnp.int32),  # pyright: ignore[reportArgumentType]
        bias=jax.ShapeDtypeStruct((rows, config.vocab_size), jnp.float32),  # pyright: ignore[reportArgumentType]
        masks=jax.ShapeDtypeStruct((rows, mask_words(config.vocab_size)), jnp.int32),  # pyright: ignore[reportArgumentType]
    )


def state_specs(state: DeviceState, rules: ShardingRules) -> DeviceState:
    """Where each part lives: pools by page and KV head, rows with their vocabulary by row."""
    pool = partition_specs(("page", "kv_heads", None, None), rules)
    scale = None
    if state.pools.has_scales:
        scale = partition_specs(("page", "kv_heads", None), rules)
    dense = partition_specs(("batch", "vocab"), rules)
    return DeviceState(
        pools=Pools(k=pool, v=pool, pages=state.pools.pages, k_scale=scale, v_scale=scale),
        last_token=partition_specs(("batch",), rules),  # pyright: ignore[reportArgumentType]
        counts=dense,  # pyright: ignore[reportArgumentType]
        bias=dense,  # pyright: ignore[reportArgumentType]
        masks=partition_specs(("batch", None), rules),  # pyright: ignore[reportArgumentType]
    )


def zero_state(abstract: DeviceState, mesh: jax.sharding.Mesh, specs: DeviceState) -> DeviceState:
    """Allocates the state on the mesh, shard by shard, all zero."""

    def zeros(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> Array:
        return jnp.zeros(leaf.shape, leaf.dtype, device=NamedSharding(mesh, spec))

    return jax.tree.map(zeros, abstract, specs)
