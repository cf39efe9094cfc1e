"""Plans as the command makes them, for tests that ask for the pieces."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxserve.config import ServeConfig
from jaxserve.models.presets import preset
from jaxserve.planning.devices import DeviceFacts, device_facts
from jaxserve.planning.memory import Memory, plan_device
from jaxserve.planning.plan import Prediction, predict
from jaxserve.planning.sizes import Sizes
from jaxserve.planning.traffic import typical
from jaxserve.resolve import resolve_quantization, resolve_sizes
from jaxserve.weights.source import read_model_facts
from sharding.mesh import parse_mesh


def sizes_of(model: str, facts: DeviceFacts, mesh: str = "1x1", **changes: Any) -> Sizes:
    settings: dict[str, Any] = {"assets_dir": Path("none"), "cache_dir": Path("none"), **changes}
    config = ServeConfig(model=f"dummy:{model}", mesh=mesh, **settings)
    shape = parse_mesh(mesh)
    quantization = resolve_quantization(config, facts.platform)
    where = {"assets_dir": config.assets_dir, "offline": True}
    read, formats = read_model_facts(config.model, quantization, **where)
    return resolve_sizes(
        config,
        read,
        facts.platform,
        formats=formats,
        data_shards=shape.data,
        tensor=shape.tensor,
    )


@cache
def planned(model: str, device: str, mesh: str = "1x1", **changes: Any) -> Prediction:
    """A prediction for traffic of 1,000 + 256 tokens, or what fits."""
    return planned_on(model, device_facts(device), mesh, **changes)


def planned_on(model: str, facts: DeviceFacts, mesh: str = "1x1", **changes: Any) -> Prediction:
    """The same on a device that is not in the table."""
    sizes = sizes_of(model, facts, mesh, **changes)
    traffic = typical(None, None, sizes.context_tokens)
    return predict(model, preset(model), parse_mesh(mesh), facts, sizes, traffic)


def memory_of(model: str, mesh: str = "1x1", **changes: Any) -> Memory:
    """One device of a GPU mesh, in float32."""
    facts = device_facts("h200")
    sizes = sizes_of(model, facts, mesh, **{"dtype": jnp.dtype(jnp.float32).name, **changes})
    return plan_device(preset(model), parse_mesh(mesh), facts, sizes)
