"""How long a step and a prompt would take: the traced program, the roofline of a device.

Products and exchanges come from the trace. Attention and the bytes that are read follow from the
rows' lengths, because their loop over pages has a trip count that is data. Every page is read once
here, which is what a good kernel does; the loop in plain XLA moves it about three times.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Params
from jaxserve.planning import costs as counting
from jaxserve.planning.costs import Costs, costs_from, count, step_body
from jaxserve.planning.devices import DeviceFacts
from jaxserve.runner.config import ProgramKey
from jaxserve.runner.runner import Runner
from sharding.mesh import MeshShape
from sharding.placement import bytes_per_device


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """How long each resource is busy, in seconds."""

    memory_s: float
    compute_s: float
    link_s: float

    @property
    def total_s(self) -> float:
        """Memory and products overlap; exchanges wait for both."""
        return max(self.memory_s, self.compute_s) + self.link_s

    @property
    def limit(self) -> str:
        """Which takes longest: ``memory``, ``compute`` or ``link``."""
        times = {"memory": self.memory_s, "compute": self.compute_s, "link": self.link_s}
        return max(times, key=lambda name: times[name])


def decode_costs(runner: Runner, rows: int, tokens: int) -> tuple[Costs, int]:
    """Returns what one device does and which bytes it moves, for a token of every row.

    Args:
        runner: only its shapes are used.
        rows: of one data shard; the smallest bucket with room for them is computed.
        tokens: of each row so far.
    """
    bucket = min(size for size in runner.config.step.decode_buckets if size >= rows)
    key = ProgramKey(bucket, "decode", bucket, 1)
    return _with_attention(runner, key, _traced(runner, key), rows, 1, tokens)


def prompt_seconds(
    runner: Runner, prompt_tokens: int, facts: DeviceFacts, shape: MeshShape
) -> float:
    """Adds up the chunks of a prompt, from the first to the token that follows the last."""
    buckets = {tokens: lines for lines, tokens in runner.config.step.prefill_buckets}
    traced: dict[int, Costs] = {}
    seconds, done = 0.0, 0
    while done < prompt_tokens:
        left = prompt_tokens - done
        size = min((tokens for tokens in buckets if tokens >= left), default=max(buckets))
        real = min(left, size)
        key = ProgramKey(size, "prefill", buckets[size], size)
        if size not in traced:
            traced[size] = _traced(runner, key)
        costs, hbm_bytes = _with_attention(runner, key, traced[size], 1, real, done + real)
        seconds += roofline_of(costs, hbm_bytes, facts, shape).total_s
        done += real
    return seconds


def roofline_of(costs: Costs, hbm_bytes: int, facts: DeviceFacts, shape: MeshShape) -> Roofline:
    """Divides what is done by what the device sustains."""
    # Simulated devices take turns on one machine.
    sharers = shape.devices if facts.simulated else 1
    compute_s = sum(flops / facts.flops_per_s[dtype] for dtype, flops in costs.flops.items())
    # Tensor groups stand side by side: they leave a host only when it is too small for one.
    within = shape.tensor <= facts.devices_per_host
    link = facts.link_bytes_per_s if within else facts.network_bytes_per_s
    wire_s = costs.wire_bytes.total() / (link * facts.sustained_link)
    return Roofline(
        memory_s=sharers * hbm_bytes / (facts.memory_bytes_per_s * facts.sustained_memory),
        compute_s=sharers * compute_s / facts.sustained_flops,
        link_s=sharers * wire_s + costs.exchanges.total() * facts.link_latency_s,
    )


def _traced(runner: Runner, key: ProgramKey) -> Costs:
    """Counts a program; beside files of programs, once, since tracing three takes a second."""
    folder, kind = runner.executables, f"costs-{_counting()}"
    costs = None if folder is None else costs_from(folder.note(key.file_name, kind))
    if costs is None or costs.opaque != runner.model.config.layers:  # A note may be damaged.
        costs = count(step_body(runner.trace(key).jaxpr), runner.mesh_shape)
        if folder is not None:
            folder.write_note(key.file_name, kind, vars(costs))
    # Nothing but attention may go uncounted: one loop or kernel in each layer.
    assert costs.opaque == runner.model.config.layers, f"{key} has {costs.opaque} loops or kernels"
    return costs


@cache
def _counting() -> str:
    """Names the way of counting: whoever changes it counts anew."""
    return hashlib.sha256(Path(counting.__file__).read_bytes()).hexdigest()[:12]


def _with_attention(
    runner: Runner, key: ProgramKey, traced: Costs, rows: int, queries: int, context: int
) -> tuple[Costs, int]:
    """Adds what a trace does not show: attention, and the bytes that are read and written.

    Args:
        runner: of the mesh.
        key: of the program.
        traced: its trace.
        rows: real ones.
        queries: real new tokens of each row.
        context: tokens of each row, the new ones included.
    """
    config, tensor = runner.model.config, runner.mesh_shape["tensor"]
    # Keys that the queries of a row see together. Masked ones are computed, too.
    seen = sum(
        min(context, window + queries - 1) if window else context for window in config.windows
    )
    heads = config.q_heads // tensor
    # Two products, q with k and weights with v, counted as float32 whatever the pages hold;
    # padding, too.
    attention = 2 * 2 * heads * config.head_dim * seen * key.places
    flops = traced.flops + Counter({"float32": attention})
    kv_token_bytes = runner.config.cache.token_bytes(config) // config.layers
    kv_bytes = rows * (seen + queries * config.layers) * kv_token_bytes // tensor
    logit_bytes = 2 * key.rows * (config.vocab_size // tensor) * np.dtype(np.float32).itemsize
    hbm_bytes = _weight_bytes_read(runner, rows * queries) + kv_bytes + logit_bytes
    return replace(traced, flops=flops), hbm_bytes


def _weight_bytes_read(runner: Runner, tokens: int) -> int:
    """All weights once, but of experts only those that so many tokens take.

    Of an embedding that is not the head a few rows are read, which do not count.
    """
    config = runner.model.config
    abstract, shardings = runner.abstract_params, runner.param_shardings
    if not config.tie_embeddings:
        abstract, shardings = _without_embed(abstract), _without_embed(shardings)
    held = bytes_per_device(abstract, shardings)
    if not config.experts:
        return held
    experts = bytes_per_device(_experts_of(abstract), _experts_of(shardings))
    return held - int(experts * (1 - share_of_experts(config, tokens)))


def share_of_experts(config: ModelConfig, tokens: int) -> float:
    """Returns the share of a layer's experts that tokens are expected to take, all together.

    As if each token drew its own evenly and alone: a trained router is not even, and then fewer
    are taken.
    """
    return 1 - (1 - config.experts_per_token / config.experts) ** tokens


def _experts_of(tree: Params) -> list[Any]:
    layers = (tree.layers,) if isinstance(tree.layers, dict) else tree.layers
    return [layer[name] for layer in layers for name in ("w_gate_up", "w_down")]


def _without_embed(tree: Params) -> Params:
    return Params({k: v for k, v in tree.ends.items() if k != "embed"}, tree.layers)
