"""What the program that is being traced is for: the device, and whether it is there at all.

A program can be compiled for a device that this machine lacks, so ``jax.default_backend()`` is not
the answer. JAX's mesh in context knows: ``jax.set_mesh`` and ``jax.shard_map`` put the device of
their mesh there, an absent one included. Without a mesh in context a program is for the default
device. Kernels ask here, and nowhere else.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

HOPPER = re.compile(r"\bG?H(100|200|20|800)\b")
"""Of the names of devices of compute capability 9.0."""


def is_hopper(platform: str, kind: str) -> bool:
    """Whether devices of a kind have the instructions of sm_90a, which no later ones have."""
    return platform == "gpu" and HOPPER.search(kind) is not None


class Target(NamedTuple):
    """A kind of device."""

    platform: str
    """``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    kind: str
    """As the device calls itself, such as ``"NVIDIA H200"``."""
    cores: int | None
    """Multiprocessors; None where the device does not say."""

    @property
    def is_hopper(self) -> bool:
        """See the function."""
        return is_hopper(self.platform, self.kind)


def target() -> Target:
    """Returns what is being traced for; use while tracing."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target(device.platform, device.device_kind, device.num_cores)
    present = jax.devices()[0]
    return Target(present.platform, present.device_kind, getattr(present, "core_count", None))
