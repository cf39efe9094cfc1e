"""``"2x4"`` to a mesh of devices with named axes, with errors that show the fix.

Axis names and their order live here. What lives on which axis is in ``rules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

AXES = ("data", "tensor")
"""Mesh axes, slowest first: devices of one tensor group stand side by side."""


@runtime_checkable
class Device(Protocol):
    """What ordering the mesh needs to know of a device."""

    @property
    def id(self) -> int:
        """Number of the device, unique over all hosts."""
        ...

    @property
    def process_index(self) -> int:
        """Number of the host process that owns the device."""
        ...


class MeshShapeError(ValueError):
    """A mesh that cannot be read, does not fit the devices, or does not divide an array."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Size of each mesh axis."""

    data: int = 1
    """Copies of the model, each with rows and pages of its own."""
    tensor: int = 1
    """Devices that share one copy of the model."""

    def __post_init__(self) -> None:
        """Refuses an empty axis."""
        for axis in AXES:
            if self.size(axis) < 1:
                raise MeshShapeError(f"mesh axis {axis} must be at least 1, got {self.size(axis)}")

    def size(self, axis: str) -> int:
        """Devices along one axis."""
        return {"data": self.data, "tensor": self.tensor}[axis]

    @property
    def devices(self) -> int:
        """Devices in the whole mesh."""
        return self.data * self.tensor

    def __str__(self) -> str:
        """The named form that ``parse_mesh`` reads."""
        return f"data={self.data},tensor={self.tensor}"


def parse_mesh(text: str) -> MeshShape:
    """Reads ``DATAxTENSOR`` or named axes in any order; an axis that is not named is 1.

    >>> parse_mesh("2x4") == parse_mesh("tensor=4, data=2") == MeshShape(data=2, tensor=4)
    True
    """
    compact = text.lower().replace(" ", "")
    if "=" not in compact:
        match compact.split("x"):
            case [data, tensor] if _is_count(data) and _is_count(tensor):
                return MeshShape(data=int(data), tensor=int(tensor))
            case _:
                raise _unreadable(text)
    sizes: dict[str, int] = {}
    for part in compact.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not _is_count(size):
            raise _unreadable(text)
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def make_mesh(shape: MeshShape, devices: Sequence[Device]) -> Mesh:
    """Arranges ``shape.devices`` devices in a mesh with axes ``data`` and ``tensor``.

    Every host gives equally many, its first ones. They are taken host by host, so a tensor group,
    whose members talk in every layer, stays within one host while it fits.

    Raises:
        MeshShapeError: The shape needs more devices than there are, hosts cannot share it, or a
            tensor group would cross hosts though it fits in one.
    """
    if shape.devices > len(devices):
        there = len(devices)
        raise MeshShapeError(
            f"mesh {shape} needs {shape.devices} devices, {there} are visible: use one of at most "
            f"{there}, for example 1x{there}, or --device cpu:{shape.devices} to simulate"
        )
    by_host: dict[int, list[Device]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        by_host.setdefault(device.process_index, []).append(device)
    share, left = divmod(shape.devices, len(by_host))
    fewest = min(len(own) for own in by_host.values())
    if left or share > fewest:
        count = len(by_host)
        raise MeshShapeError(
            f"mesh {shape} needs {shape.devices} devices from {count} hosts, equally many from "
            f"each, and the smallest host has {fewest}: use a multiple of {count} up to "
            f"{fewest * count}"
        )
    if shape.tensor <= fewest and share % shape.tensor:
        raise _split_group(shape, len(by_host), share, fewest)
    ordered = [device for own in by_host.values() for device in own[:share]]
    grid = np.array(ordered, dtype=object).reshape(shape.data, shape.tensor)
    return Mesh(grid, AXES)


def _split_group(shape: MeshShape, hosts: int, share: int, fewest: int) -> MeshShapeError:
    least, most = (f"{hosts * groups}x{shape.tensor}" for groups in (1, fewest // shape.tensor))
    fits = least if least == most else f"data in multiples of {hosts}, from {least} to {most}"
    return MeshShapeError(
        f"mesh {shape} over {hosts} hosts takes {share} devices of each, which splits a tensor "
        f"group of {shape.tensor} between hosts, and the smallest host has {fewest}, so it fits in "
        f"one: use {fits}, or fewer hosts"
    )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def _unreadable(text: str) -> MeshShapeError:
    return MeshShapeError(
        "a mesh is written DATAxTENSOR or data=N,tensor=N with numbers above 0, "
        f"for example 2x4; got {text!r}"
    )
