"""Which mesh axis each logical axis lives on: one table, one dataclass.

Code says which logical axis a dimension is, in the words of the alphabet; trying a new layout means
changing this table, not the model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sharding.mesh import MeshShapeError


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axis for each logical axis; None means replicated."""

    batch: str | None = "data"
    query: str | None = None
    context: str | None = None
    layer: str | None = None
    embed: str | None = None
    expert: str | None = None
    ffn: str | None = "tensor"
    shared_ffn: str | None = "tensor"
    q_heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    group: str | None = None
    head_dim: str | None = None
    vocab: str | None = "tensor"
    page: str | None = "data"
    page_token: str | None = None
    table: str | None = None

    def mesh_axis(self, logical_axis: str | None) -> str | None:
        """Mesh axis of one logical axis; None, an axis without a name, is replicated.

        Raises:
            MeshShapeError: No rule has that name.
        """
        if logical_axis is None:
            return None
        known = [field.name for field in fields(self)]
        if logical_axis not in known:
            raise MeshShapeError(
                f"no sharding rule for logical axis {logical_axis!r}; known: {', '.join(known)}"
            )
        axis: str | None = getattr(self, logical_axis)
        return axis
