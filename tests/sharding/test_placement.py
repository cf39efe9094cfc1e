"""Placement: every device gets its part, each part is read once, and the bytes add up."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import MeshShape, bytes_per_device, host_zeros, make_mesh, place, unstack_in_place

SOURCE = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)


class Reader:
    """Remembers what it was asked for, as a file would see it."""

    def __init__(self) -> None:
        self.indices: list[tuple[slice, ...]] = []

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.indices.append(index)
        return SOURCE[index]


def _sharding(*axes: str | None) -> NamedSharding:
    return NamedSharding(
        make_mesh(MeshShape(data=2, tensor=4), jax.devices()), PartitionSpec(*axes)
    )


@pytest.mark.parametrize(
    ("axes", "shard_shape", "reads"),
    [
        ((), (8, 6), 1),
        (("tensor",), (2, 6), 4),
        ((None, "data"), (8, 3), 2),
        (("tensor", "data"), (2, 3), 8),
    ],
)
def test_each_distinct_shard_is_read_once_and_nothing_larger(
    axes: tuple[str | None, ...], shard_shape: tuple[int, int], reads: int
):
    reader = Reader()
    sharding = _sharding(*axes)
    placed = place(reader, SOURCE.shape, np.float32, sharding)

    np.testing.assert_array_equal(placed, SOURCE)
    assert placed.sharding == sharding
    assert {shard.data.shape for shard in placed.addressable_shards} == {shard_shape}
    assert len(placed.addressable_shards) == 8
    assert len(reader.indices) == reads
    for index in reader.indices:
        assert all(isinstance(part.start, int) and isinstance(part.stop, int) for part in index)
        assert SOURCE[index].shape == shard_shape


def test_the_dtype_asked_for_is_the_dtype_placed():
    placed = place(Reader(), SOURCE.shape, "bfloat16", _sharding("data"))
    assert placed.dtype == "bfloat16"
    np.testing.assert_array_equal(placed.astype("float32"), SOURCE)


def test_a_cpu_device_takes_over_what_is_read_into_host_zeros():
    """So the host's memory holds the weights once."""
    mesh = make_mesh(MeshShape(tensor=2), jax.devices("cpu"))
    parts: list[np.ndarray] = []

    def read(index):
        part = host_zeros(tuple(one.stop - one.start for one in index), np.float32)
        parts.append(part)
        return part

    array = place(read, (6, 5), np.float32, NamedSharding(mesh, PartitionSpec("tensor", None)))

    addresses = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    assert addresses == [part.ctypes.data for part in parts]
    assert not np.asarray(array).any()
    assert host_zeros((), np.int32).shape == ()
    assert host_zeros((0, 3), np.int32).shape == (0, 3)


def test_a_scalar_is_placed_everywhere():
    placed = place(lambda index: np.asarray(3.0, np.float32)[index], (), np.float32, _sharding())
    assert placed == 3.0
    assert len(placed.addressable_shards) == 8


def test_a_reader_that_ignores_its_index_is_found_out():
    with pytest.raises(
        ValueError, match=r"asked for a shard of shape \(2, 6\) .* and got \(8, 6\)"
    ):
        place(lambda index: SOURCE, SOURCE.shape, np.float32, _sharding("tensor"))


def test_bytes_per_device_count_a_sharded_axis_once_and_a_replicated_one_in_full():
    abstract = {
        "w": jax.ShapeDtypeStruct((8, 6), "float32"),
        "b": jax.ShapeDtypeStruct((6,), "bfloat16"),
    }
    shardings = {"w": _sharding("tensor", "data"), "b": _sharding()}
    assert bytes_per_device(abstract, shardings) == 2 * 3 * 4 + 6 * 2
    placed = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract), shardings)
    for device in jax.devices():
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(placed)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held == bytes_per_device(abstract, shardings)


def test_unstacked_layers_share_the_memory_of_their_stack():
    """Two layers of [32, 16] over the tensor axis: every part is a multiple of 64 bytes."""
    host = np.arange(2 * 32 * 16, dtype=np.float32).reshape(2, 32, 16)
    stack = jax.device_put(host, _sharding(None, "tensor"))
    layers = unstack_in_place({"w": stack})
    assert len(layers) == 2
    for number, layer in enumerate(layers):
        np.testing.assert_array_equal(layer["w"], host[number])
        assert layer["w"].sharding == _sharding("tensor")
        for whole, part in zip(
            stack.addressable_shards, layer["w"].addressable_shards, strict=True
        ):
            offset = number * part.data.nbytes
            assert part.data.unsafe_buffer_pointer() == whole.data.unsafe_buffer_pointer() + offset
            assert part.device == whole.device


def test_unstacked_layers_of_odd_lengths_are_copies():
    host = np.arange(3 * 5, dtype=np.float32).reshape(3, 5)
    layers = unstack_in_place({"w": jax.device_put(host, _sharding())})
    np.testing.assert_array_equal(layers[1]["w"], host[1])
