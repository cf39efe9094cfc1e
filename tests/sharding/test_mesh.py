"""Meshes: what parses, what fits the devices, and in which order devices stand."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import pytest

from sharding import MeshShape, MeshShapeError, make_mesh, parse_mesh


@pytest.mark.parametrize(
    "text", ["2x4", "2X4", " 2 x 4 ", "data=2,tensor=4", "tensor=4, data=2", "Data=2,Tensor=4"]
)
def test_every_spelling_of_two_by_four_is_the_same_mesh(text: str):
    assert parse_mesh(text) == MeshShape(data=2, tensor=4)


def test_an_axis_that_is_not_named_is_one():
    assert parse_mesh("tensor=8") == MeshShape(data=1, tensor=8)


def test_a_mesh_shape_prints_what_can_be_read_back():
    shape = MeshShape(data=2, tensor=4)
    assert str(shape) == "data=2,tensor=4"
    assert parse_mesh(str(shape)) == shape


@pytest.mark.parametrize(
    "text",
    [
        *("", "8", "2x", "x4", "2x4x1", "0x4", "2x-4", "2.0x4", "axb", "²x4"),
        *("model=4", "data=2,data=2", "data=0", "data=", "data=2,", "data=2x4"),
    ],
)
def test_what_is_not_a_mesh_is_refused_with_an_example(text: str):
    with pytest.raises(MeshShapeError, match="for example 2x4; got ") as caught:
        parse_mesh(text)
    assert repr(text) in str(caught.value)


def test_an_empty_axis_is_refused_by_name():
    with pytest.raises(MeshShapeError, match="mesh axis tensor must be at least 1, got 0"):
        MeshShape(data=2, tensor=0)


def test_a_mesh_error_is_a_value_error():
    assert issubclass(MeshShapeError, ValueError)


def test_a_mesh_has_named_axes_and_tensor_groups_side_by_side():
    devices = jax.devices()
    mesh = make_mesh(MeshShape(data=2, tensor=4), devices[::-1])
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert mesh.devices.tolist() == [devices[:4], devices[4:8]]


def test_a_small_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshShape(data=1, tensor=2), jax.devices())
    assert mesh.devices.tolist() == [jax.devices()[:2]]


def test_a_mesh_over_more_devices_than_visible_says_what_would_fit():
    with pytest.raises(
        MeshShapeError,
        match=r"mesh data=4,tensor=4 needs 16 devices, 8 are visible: .* 1x8, or --device cpu:16",
    ):
        make_mesh(MeshShape(data=4, tensor=4), jax.devices())


@dataclass(frozen=True)
class HostDevice:
    """A device of one of several hosts."""

    id: int
    process_index: int


def hosts(*counts: int) -> list[HostDevice]:
    """Devices of hosts with so many each, in no good order."""
    made = [
        HostDevice(1000 * host + place, host)
        for host, count in enumerate(counts)
        for place in range(count)
    ]
    return made[::-1]


def placed(shape: MeshShape, *counts: int) -> list[list[int]]:
    """The host of every device of the mesh."""
    grid = make_mesh(shape, hosts(*counts)).devices
    return [[device.process_index for device in row] for row in grid]


def test_a_tensor_group_stays_within_a_host_while_it_fits():
    assert placed(MeshShape(data=2, tensor=4), 4, 4) == [[0] * 4, [1] * 4]
    assert placed(MeshShape(data=4, tensor=2), 4, 4) == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_a_tensor_group_larger_than_a_host_is_shared_by_neighbours():
    assert placed(MeshShape(tensor=4), 2, 2) == [[0, 0, 1, 1]]


def test_every_host_gives_equally_many_devices():
    assert placed(MeshShape(data=2, tensor=3), 8, 8) == [[0] * 3, [1] * 3]
    assert placed(MeshShape(tensor=4), 8, 2) == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("tensor", "counts", "fix"),
    [(3, (4, 4), "a multiple of 2 up to 8"), (6, (8, 2), "a multiple of 2 up to 4")],
)
def test_a_mesh_that_hosts_cannot_share_is_refused(tensor, counts, fix):
    with pytest.raises(MeshShapeError, match=f"equally many from each.*: use {fix}"):
        make_mesh(MeshShape(tensor=tensor), hosts(*counts))


@pytest.mark.parametrize(
    ("shape", "counts", "share", "fix"),
    [
        (MeshShape(data=3, tensor=4), (8, 8), 6, "data in multiples of 2, from 2x4 to 4x4"),
        (MeshShape(tensor=4), (8, 8), 2, "data in multiples of 2, from 2x4 to 4x4"),
        (MeshShape(data=3, tensor=4), (8, 7), 6, "2x4"),
    ],
    ids=["unevenly", "one-group", "hosts-differ"],
)
def test_a_tensor_group_that_would_cross_hosts_though_it_fits_is_refused(
    shape: MeshShape, counts: tuple[int, ...], share: int, fix: str
):
    with pytest.raises(MeshShapeError) as caught:
        make_mesh(shape, hosts(*counts))
    assert str(caught.value) == (
        f"mesh {shape} over 2 hosts takes {share} devices of each, which splits a tensor group of "
        f"4 between hosts, and the smallest host has {min(counts)}, so it fits in one: use {fix}, "
        "or fewer hosts"
    )
