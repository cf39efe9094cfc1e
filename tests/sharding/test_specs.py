"""Rules and specs: logical axes become mesh axes, and sizes that do not divide are refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import (
    MeshShape,
    MeshShapeError,
    ShardingRules,
    check_divisible,
    make_mesh,
    named_shardings,
    partition_specs,
    where_divisible,
)

AXES = {
    "ends": {"embed": ("vocab", "embed"), "norm": ("embed",)},
    "layers": (
        {"w_qkv": ("kv_heads", None, "head_dim", "embed"), "w_down": ("embed", "ffn")},
        {"w_qkv": ("kv_heads", None, "head_dim", "embed"), "w_down": ("embed", "ffn")},
    ),
    "scale": (),
}
SHAPES = {
    "ends": {"embed": (512, 64), "norm": (64,)},
    "layers": ({"w_qkv": (4, 4, 16, 64), "w_down": (64, 128)},) * 2,
    "scale": (),
}


def _abstract(shapes: object) -> object:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple) and not any(isinstance(x, dict) for x in leaf),
    )


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshShape(data=2, tensor=4), jax.devices())


def test_words_become_mesh_axes_by_the_table():
    specs = partition_specs(AXES, ShardingRules())
    layer = {
        "w_qkv": PartitionSpec("tensor", None, None, None),
        "w_down": PartitionSpec(None, "tensor"),
    }
    assert specs == {
        "ends": {"embed": PartitionSpec("tensor", None), "norm": PartitionSpec(None)},
        "layers": (layer, layer),
        "scale": PartitionSpec(),
    }


def test_another_layout_is_another_table():
    specs = partition_specs(AXES, replace(ShardingRules(), vocab=None, ffn=None))
    assert specs["ends"]["embed"] == PartitionSpec(None, None)
    assert specs["layers"][0]["w_down"] == PartitionSpec(None, None)


def test_an_unknown_word_is_refused_with_the_known_ones():
    with pytest.raises(
        MeshShapeError, match="no sharding rule for logical axis 'heads'; known: batch"
    ):
        partition_specs({"w": ("heads",)}, ShardingRules())


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(
        MeshShapeError, match=r"\['w'\] has axes \('ffn', 'q_heads'\), and the rules put two"
    ):
        partition_specs({"w": ("ffn", "q_heads")}, ShardingRules())


def test_shardings_are_the_specs_on_the_mesh(mesh: jax.sharding.Mesh):
    specs = partition_specs(AXES, ShardingRules())
    shardings = named_shardings(specs, mesh)
    assert shardings["layers"][1]["w_down"] == NamedSharding(mesh, PartitionSpec(None, "tensor"))
    assert shardings["scale"] == NamedSharding(mesh, PartitionSpec())


def test_sizes_that_divide_pass(mesh: jax.sharding.Mesh):
    check_divisible(_abstract(SHAPES), partition_specs(AXES, ShardingRules()), mesh)


def test_a_size_that_does_not_divide_is_named_with_its_axis(mesh: jax.sharding.Mesh):
    shapes = {**SHAPES, "layers": ({"w_qkv": (3, 5, 16, 64), "w_down": (64, 128)},) * 2}
    with pytest.raises(MeshShapeError) as caught:
        check_divisible(_abstract(shapes), partition_specs(AXES, ShardingRules()), mesh)
    assert str(caught.value) == (
        "['layers'][0]['w_qkv'] has shape (3, 5, 16, 64), and mesh axis tensor=4 does not divide "
        "axis 0 of size 3; use a divisor of 3 (1 more like it)"
    )


def test_what_does_not_divide_can_be_left_unsplit(mesh: jax.sharding.Mesh):
    shapes = {**SHAPES, "layers": ({"w_qkv": (3, 5, 16, 64), "w_down": (64, 128)},) * 2}
    specs = partition_specs(AXES, ShardingRules())
    found = where_divisible(_abstract(shapes), specs, mesh)
    check_divisible(_abstract(shapes), found, mesh)
    assert found["layers"][1] == {
        "w_qkv": PartitionSpec(None, None, None, None),
        "w_down": specs["layers"][1]["w_down"],
    }
    assert where_divisible(_abstract(SHAPES), specs, mesh) == specs


def test_an_axis_over_two_mesh_axes_must_divide_by_both(mesh: jax.sharding.Mesh):
    spec = {"w": PartitionSpec(("data", "tensor"))}
    check_divisible({"w": jax.ShapeDtypeStruct((16,), "float32")}, spec, mesh)
    with pytest.raises(MeshShapeError, match=r"mesh axis data\*tensor=8 does not divide axis 0"):
        check_divisible({"w": jax.ShapeDtypeStruct((12,), "float32")}, spec, mesh)


def test_a_spec_longer_than_its_array_is_refused(mesh: jax.sharding.Mesh):
    with pytest.raises(MeshShapeError, match=r"\['w'\] has 1 axes and its spec .* has 2"):
        check_divisible(
            {"w": jax.ShapeDtypeStruct((8,), "float32")}, {"w": PartitionSpec(None, "data")}, mesh
        )
