"""Meshes and placement, and nothing else: which device holds which part of an array.

``mesh`` names the axes, ``rules`` says which mesh axis each logical axis lives on, ``specs`` turns
trees of logical axes into specs, ``placement`` puts arrays there. What is computed on the mesh, and
the collectives that needs, stand in the models.
"""

from sharding.mesh import AXES, MeshShape, MeshShapeError, make_mesh, parse_mesh
from sharding.placement import bytes_per_device, host_zeros, place, unstack_in_place
from sharding.rules import ShardingRules
from sharding.specs import check_divisible, named_shardings, partition_specs, where_divisible

__all__ = [
    "AXES",
    "MeshShape",
    "MeshShapeError",
    "ShardingRules",
    "bytes_per_device",
    "check_divisible",
    "host_zeros",
    "make_mesh",
    "named_shardings",
    "parse_mesh",
    "partition_specs",
    "place",
    "unstack_in_place",
    "where_divisible",
]
