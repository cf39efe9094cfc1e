"""Puts host arrays on the mesh shard by shard, and says how many bytes each device holds.

The reader is asked for one shard at a time, so no device ever holds a whole tensor that is sharded,
and a reader that can seek never reads one either. Which sharding an array has is in ``specs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

type Index = tuple[slice, ...]

DEVICE_ALIGNMENT = 64
"""Bytes; XLA's CPU backend copies what begins elsewhere."""


def place(
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: Sharding,
) -> jax.Array:
    """Makes a global array, reading each distinct shard once.

    Args:
        read: Gives the part of the array at an index, one slice with both bounds per dimension. It
            is cast to ``dtype`` here. On a CPU the array may share the memory that ``read``
            returned, and does if it is of ``host_zeros``: never write to it afterwards.
        shape: Global shape.
        dtype: Of the result.
        sharding: Where the parts live.

    Raises:
        ValueError: ``read`` returned another shape than it was asked for.
    """
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: Index | None) -> np.ndarray:
        # Devices that hold the same part ask for it one by one; the file is read for the first.
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)
        )
        if bounds not in shards:
            shards[bounds] = _read_shard(read, bounds, dtype)
        return shards[bounds]

    return jax.make_array_from_callback(shape, sharding, shard)


def host_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Makes an array of zeros that a CPU device can take over without a copy.

    For that it begins at a multiple of 64 bytes. Memory is used when it is written.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    raw = np.zeros(size + DEVICE_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % DEVICE_ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def unstack_in_place(stacked: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], ...]:
    """Gives every layer of stacked weights arrays of its own that share the stacks' memory.

    On CPUs only, and where a layer begins at a multiple of 64 bytes within its shard; JAX copies
    the others, which are norms and biases of odd lengths.

    Args:
        stacked: Leading axis: layers, not sharded.

    Returns:
        One dict for each layer. Each keeps the stacks alive.
    """
    layers = len(next(iter(stacked.values())))
    out = tuple[dict[str, jax.Array], ...]({} for _ in range(layers))
    for name, array in stacked.items():
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        shards = [(np.asarray(shard.data), shard.device) for shard in array.addressable_shards]
        for number, layer in enumerate(out):
            parts: list[jax.Array] = [
                jax.device_put(part[number], device)  # pyright: ignore[reportUnknownMemberType]
                for part, device in shards
            ]
            layer[name] = jax.make_array_from_single_device_arrays(array.shape[1:], one, parts)
    return out


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes that each device holds of a tree of arrays, which divide evenly by construction.

    Args:
        abstract: Tree of anything with a global ``shape`` and a ``dtype``.
        shardings: The same tree with a sharding for each leaf.
    """

    def shard_bytes(leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(shard_bytes, abstract, shardings)))


def _read_shard(
    read: Callable[[Index], np.ndarray], bounds: tuple[tuple[int, int], ...], dtype: DTypeLike
) -> np.ndarray:
    expected = tuple(end - begin for begin, end in bounds)
    part = np.asarray(read(tuple(slice(begin, end) for begin, end in bounds)))
    if part.shape != expected:
        raise ValueError(
            f"asked for a shard of shape {expected} at {bounds} and got {part.shape}; "
            "the reader must honour every slice of the index"
        )
    return part.astype(dtype, copy=False)
