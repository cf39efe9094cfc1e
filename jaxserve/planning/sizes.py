"""The sizes that a launch and a plan share: everything that is decided before a device is asked.

``resolve.resolve_sizes`` decides them from a ``ServeConfig``, for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxserve.engine.step import StepShape
from pallas_kernels.paged_attention import format_of
from pallas_kernels.quantized_matmul import Format


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What will run, apart from the model and the mesh. No "auto" is left."""

    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    activations: jnp.dtype
    """Of what goes from layer to layer."""
    formats: dict[str, Format]
    """Of the weights that are held quantized, by name."""
    repacked: bool
    """They are repacked for the device's kernel; see ``RunnerConfig``."""
    kernels: dict[str, str]
    """Implementations that were asked for, by family."""
    unrolled_rows: int
    """Decode programs of at most so many rows do not loop over the layers; see ``RunnerConfig``."""
    context_tokens: int
    step: StepShape
    page_tokens: int
    kv_bytes: int | None
    """Of pages on each device, when asked for outright."""
    kv_fraction: float
    """Of what is free after weights and temporaries, otherwise."""
    most_kv_bytes: int | None
    """What the fraction may come to."""

    @property
    def kv_name(self) -> str:
        """What people call the precision of cached keys and values, such as ``fp8``."""
        return kv_name(self.kv_dtype)

    @property
    def quantization(self) -> str:
        """The formats that there are, such as ``int4+int8``; empty when no weight is quantized."""
        return "+".join(sorted(set(self.formats.values())))


def kv_name(dtype: jnp.dtype) -> str:
    """What ``--kv-dtype`` calls a dtype."""
    format = format_of(dtype)
    return jnp.dtype(dtype).name if format is None else format.name
