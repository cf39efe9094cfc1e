"""What one device could do at best: bytes and operations over the peaks of its data sheet.

Peaks, and not what programs were seen to sustain: a share of 1 is out of reach by a known tenth or
fifth (``planning/devices.py``). Only float32 products can pass it, where XLA uses TF32.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from jaxserve.models.config import ModelConfig
from jaxserve.planning.devices import DeviceFacts
from jaxserve.planning.speed import decode_costs, roofline_of
from jaxserve.runner.runner import Runner
from sharding.mesh import MeshShape


def decode_limit_s(runner: Runner, rows: int, tokens: int, facts: DeviceFacts) -> float:
    """Returns the least seconds of a decode step.

    Args:
        runner: only its shapes are used.
        rows: that take part.
        tokens: of each row so far.
        facts: of the device.
    """
    peaks = replace(facts, sustained_memory=1.0, sustained_flops=1.0)
    shape = MeshShape(**runner.mesh_shape)
    return roofline_of(*decode_costs(runner, rows, tokens), peaks, shape).total_s


def prefill_limit_s(model: ModelConfig, tokens: int, dtype: jnp.dtype, facts: DeviceFacts) -> float:
    """Returns the least seconds of a prompt: every product at the peak of the weights' dtype.

    Args:
        model: its config.
        tokens: of the prompt. Each meets every weight but the embedding and the head, and attends
            to half of the prompt in the mean.
        dtype: of weights and activations.
        facts: of the device.
    """
    ends = model.vocab_size * model.embed * (1 if model.tie_embeddings else 2)
    heads = model.q_heads * model.head_dim
    products = 2 * (model.params - ends) * tokens
    attention = 2 * 2 * heads * model.layers * tokens * tokens // 2
    return (products + attention) / facts.flops_per_s[dtype.name]


def memory_limit_s(count: int, facts: DeviceFacts | None) -> float | None:
    """Returns the least seconds in which so many bytes are moved; None without a data sheet."""
    return None if facts is None else count / facts.memory_bytes_per_s
