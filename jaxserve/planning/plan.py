"""Predicts what a launch would hold and how fast it would be, before anything is loaded.

``memory.py`` counts the bytes of one device, ``speed.py`` the time of a step and of a prompt; here
both become one ``Prediction``, whose fields are the keys of ``jaxserve plan --json``.
``docs/planning.md`` says how to read it and what of it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxserve.models.config import ModelConfig
from jaxserve.planning.devices import DeviceFacts
from jaxserve.planning.memory import (
    Memory,
    budget_of,
    layout_notes,
    nearest_fit,
    plan_device,
    short,
    tokens_by_precision,
)
from jaxserve.planning.sizes import Sizes
from jaxserve.planning.speed import Roofline, decode_costs, prompt_seconds, roofline_of
from jaxserve.planning.traffic import Traffic
from jaxserve.runner.runner import Runner
from sharding.mesh import AXES, MeshShape


@dataclass(frozen=True, kw_only=True)
class Details:
    """What people are told beside the numbers."""

    sizes: Sizes
    traffic: Traffic
    facts: DeviceFacts
    memory: Memory
    roofline: Roofline | None
    notes: list[str]
    """Every axis that is padded, copied or replicated, and what that costs."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A plan. What needs a step to run is None when the model does not fit."""

    fits: bool
    """There is room for one sequence of full context on every data shard, as launch demands."""
    model: str
    mesh: str
    device: str
    params: int
    """As published: without padding, the tied head once."""
    weight_bytes_per_device: int
    """Padding and copies included."""
    quantization: str
    """The formats of quantized weights, such as ``int4+int8``; ``none``."""
    kv_bytes_per_token: int
    """Over the devices of one data shard, padding and copies included."""
    kv_tokens: dict[str, int]
    """Tokens that the pages of all data shards hold in each precision of ``--kv-dtype``, in this
    memory beside these weights; 0 where not one sequence of full context fits."""
    page_tokens: int
    pages_per_data_shard: int
    """The null page included; 0 when it does not fit."""
    sequences_guaranteed: int
    """Of full context, that the pages of all data shards hold at once; at most the rows."""
    sequences_expected: int
    """The same for typical sequences."""
    temp_bytes_per_device: int
    temp_source: str
    """``compiled``: XLA said so. ``estimated``: a bound, see ``costs.peak_bytes``."""
    flops_per_step: int | None = None
    """Of one device, when all expected sequences decode one token at their typical length."""
    hbm_bytes_per_step: int | None = None
    """Read and written by one device: weights and pages once, logits twice."""
    collective_bytes: dict[str, int] | None = None
    """Sent by one device, for each mesh axis."""
    step_ms: float | None = None
    limit: str | None = None
    tokens_per_s_per_user: float | None = None
    tokens_per_s_total: float | None = None
    ttft_ms: float | None = None
    """Until the first token of a typical prompt, on a server that does nothing else."""
    nearest_fit: str | None
    """The mesh of fewest devices that fits one sequence of full context; None: none of up to 64."""
    details: Details

    def as_json(self) -> dict[str, Any]:
        """Returns the keys that are promised."""
        return {name: value for name, value in vars(self).items() if name != "details"}


def predict(
    name: str,
    model: ModelConfig,
    shape: MeshShape,
    facts: DeviceFacts,
    sizes: Sizes,
    traffic: Traffic,
    *,
    compile_on: Mesh | None = None,
) -> Prediction:
    """Plans a model on a mesh of devices that need not exist.

    Args:
        name: of the model, to be shown.
        model: its config.
        shape: of the mesh.
        facts: of one device.
        sizes: as ``launch`` decides them.
        traffic: what the expected sequences look like.
        compile_on: a mesh of that shape; the largest programs are compiled for it to learn their
            temporaries. None: they are estimated.
    """
    memory = plan_device(model, shape, facts, sizes, compile_on=compile_on)
    fits = memory.refusal is None
    return _prediction(
        name, model, memory, facts, sizes, traffic, nearest_fit(model, facts, sizes, {shape: fits})
    )


def predict_launched(
    name: str,
    model: ModelConfig,
    runner: Runner,
    free_bytes: int,
    facts: DeviceFacts,
    sizes: Sizes,
    traffic: Traffic,
) -> Prediction:
    """The plan of what a launch has compiled.

    Args:
        name: of the model, to be shown.
        model: its config.
        runner: has compiled its largest programs.
        free_bytes: of each device, before anything was loaded.
        facts: of one device.
        sizes: of the launch.
        traffic: what the expected sequences look like.
    """
    budget = budget_of(runner, free_bytes, sizes, temporary_bytes=runner.temporary_bytes())
    memory = Memory(runner, budget, "compiled", runner.config.cache.num_pages, None)
    return _prediction(
        name, model, memory, facts, sizes, traffic, short(MeshShape(**runner.mesh_shape))
    )


def _prediction(
    name: str,
    model: ModelConfig,
    memory: Memory,
    facts: DeviceFacts,
    sizes: Sizes,
    traffic: Traffic,
    nearest: str | None,
) -> Prediction:
    shape = MeshShape(**memory.runner.mesh_shape)
    rows = memory.rows(traffic.tokens)
    roofline, step = None, dict[str, Any]()
    if memory.refusal is None:
        costs, hbm_bytes = decode_costs(memory.runner, rows, traffic.tokens)
        roofline = roofline_of(costs, hbm_bytes, facts, shape)
        first_s = prompt_seconds(memory.runner, traffic.prompt_tokens, facts, shape)
        step = {
            "flops_per_step": costs.flops.total(),
            "hbm_bytes_per_step": hbm_bytes,
            "collective_bytes": {axis: costs.wire_bytes[axis] for axis in AXES},
            "step_ms": 1e3 * roofline.total_s,
            "limit": roofline.limit,
            "tokens_per_s_per_user": 1 / roofline.total_s,
            "tokens_per_s_total": rows * shape.data / roofline.total_s,
            "ttft_ms": 1e3 * first_s,
        }
    return Prediction(
        fits=memory.refusal is None,
        model=name,
        mesh=short(shape),
        device=facts.name,
        params=model.params,
        weight_bytes_per_device=memory.budget.weight_bytes,
        quantization=sizes.quantization or "none",
        kv_bytes_per_token=memory.runner.config.cache.token_bytes(memory.runner.model.config),
        kv_tokens={
            name: shape.data * tokens for name, tokens in tokens_by_precision(memory, sizes).items()
        },
        page_tokens=sizes.page_tokens,
        pages_per_data_shard=memory.pages,
        sequences_guaranteed=memory.rows(sizes.context_tokens) * shape.data,
        sequences_expected=rows * shape.data,
        temp_bytes_per_device=memory.budget.temporary_bytes,
        temp_source=memory.temp_source,
        **step,
        nearest_fit=nearest,
        details=Details(
            sizes=sizes,
            traffic=traffic,
            facts=facts,
            memory=memory,
            roofline=roofline,
            notes=layout_notes(memory.runner, shape),
        ),
    )
