"""Trees of logical axes to trees of specs and shardings, checked for divisibility.

A leaf of such a tree is a tuple with one word (or None) per dimension, ``("embed", "q_heads",
"head_dim")``. Where each word lives is in ``rules``; moving bytes is in ``placement``.
"""

# pyright: reportUnknownMemberType=false
# jax leaves the path type of its tree functions open.

from __future__ import annotations

import math
from typing import Any, TypeGuard, cast

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.mesh import MeshShapeError
from sharding.rules import ShardingRules

type LogicalAxes = tuple[str | None, ...]
type Tree = Any
"""Any pytree; jax has no type for one with leaves of a given kind."""


def partition_specs(axes_tree: Tree, rules: ShardingRules) -> Tree:
    """Replaces each tuple of logical axes in a tree by its ``PartitionSpec``.

    Raises:
        MeshShapeError: A word has no rule, or two axes of one array live on the same mesh axis.
    """

    def spec(path: tuple[Any, ...], axes: LogicalAxes) -> PartitionSpec:
        return _spec(jax.tree_util.keystr(path), axes, rules)

    return jax.tree.map_with_path(spec, axes_tree, is_leaf=_is_logical_axes)


def named_shardings(specs: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Replaces each ``PartitionSpec`` in a tree by its sharding on ``mesh``."""

    def sharding(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, specs, is_leaf=_is_spec)


def check_divisible(abstract: Tree, specs: Tree, mesh: Mesh | AbstractMesh) -> None:
    """Refuses arrays whose sharded dimensions the mesh does not divide.

    Args:
        abstract: Tree of anything with a global ``shape``.
        specs: The same tree with a ``PartitionSpec`` for each leaf.
        mesh: Where the arrays are to live.

    Raises:
        MeshShapeError: Names the first array that does not divide, and how many more there are.
    """
    problems: list[str] = []

    def check(path: tuple[Any, ...], spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> None:
        problems.extend(_indivisible(jax.tree_util.keystr(path), leaf.shape, spec, mesh))

    jax.tree.map_with_path(check, specs, abstract, is_leaf=_is_spec)
    if problems:
        more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise MeshShapeError(problems[0] + more)


def where_divisible(abstract: Tree, specs: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Leaves unsplit those dimensions that the mesh does not divide.

    Args:
        abstract: Tree of anything with a global ``shape``.
        specs: The same tree with a ``PartitionSpec`` for each leaf.
        mesh: Where the arrays are to live.

    Returns:
        A tree of specs that ``check_divisible`` accepts.
    """

    def divisible(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        sizes = zip(spec, leaf.shape, strict=False)
        return PartitionSpec(
            *(None if size % _parts(entry, mesh) else entry for entry, size in sizes)
        )

    return jax.tree.map(divisible, specs, abstract, is_leaf=_is_spec)


def _spec(name: str, axes: LogicalAxes, rules: ShardingRules) -> PartitionSpec:
    mesh_axes = [rules.mesh_axis(axis) for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(set(used)) < len(used):
        raise MeshShapeError(
            f"{name} has axes {axes}, and the rules put two of them on one mesh axis: {mesh_axes}; "
            "replicate one of them"
        )
    return PartitionSpec(*mesh_axes)


def _indivisible(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> list[str]:
    if len(spec) > len(shape):
        return [f"{name} has {len(shape)} axes and its spec {spec} has {len(spec)}"]
    problems: list[str] = []
    for axis, entry in enumerate(spec):
        parts = _parts(entry, mesh)
        if shape[axis] % parts:
            problems.append(
                f"{name} has shape {shape}, and mesh axis {'*'.join(_as_tuple(entry))}={parts} "
                f"does not divide axis {axis} of size {shape[axis]}; use a divisor of {shape[axis]}"
            )
    return problems


def _parts(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Pieces that a spec's entry cuts a dimension into."""
    return math.prod(mesh.shape[axis] for axis in (() if entry is None else _as_tuple(entry)))


def _as_tuple(entry: Any) -> tuple[str, ...]:
    """A spec's entry is one mesh axis or a tuple of them."""
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _is_spec(leaf: object) -> TypeGuard[PartitionSpec]:
    return isinstance(leaf, PartitionSpec)


def _is_logical_axes(leaf: object) -> TypeGuard[LogicalAxes]:
    """A tuple of words. A tuple of dicts, one per layer, is a branch of the tree and not a leaf."""
    if not isinstance(leaf, tuple):
        return False
    words = cast("tuple[object, ...]", leaf)
    return all(axis is None or isinstance(axis, str) for axis in words)
