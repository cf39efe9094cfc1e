"""How far one model's next-token distributions are from another's, from what their heads saw.

A model's logits follow from the hidden states that its head is given, which ``score`` programs
return: a few hundred numbers a place instead of one for each token. So those of the base are kept,
with its head, and its distributions are made again chunk by chunk of the vocabulary beside the
other model's. No place's log-probabilities are ever held as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxserve.runner.compiling import planned_compiles
from jaxserve.runner.programs import ChunkLogits, StepPrograms
from jaxserve.runner.runner import Runner
from pallas_kernels.quantized_matmul import Matrix

PLACES = 256
"""Compared in one call; two chunks of their logits are held at a time."""


@dataclass(frozen=True)
class Head:
    """What turns a model's hidden states into logits. Keeps that matrix, and no other weight."""

    programs: StepPrograms
    weight: Matrix
    specs: Any
    """Where the weight lives, as ``PartitionSpec`` leaves."""

    @classmethod
    def of(cls, runner: Runner) -> Head:
        """Takes the head of a runner that is ready."""
        assert runner.params is not None, "make_ready comes first"
        weight = runner.programs.model.head_weight(runner.params)
        return cls(runner.programs, weight, jax.tree.map(lambda array: array.sharding.spec, weight))


class Divergence:
    """Compares places of a base with those of another model on the same mesh."""

    def __init__(self, base: Head, other: Head, runner: Runner, hidden_dtype: Any) -> None:
        """Compiles; nothing is compiled afterwards.

        Args:
            base: of the model that is compared with.
            other: of the model that is compared; both have the same vocabulary.
            runner: of the other model; the comparison runs where it does.
            hidden_dtype: of both models' hidden states, base first.
        """
        mesh = runner.mesh
        assert isinstance(mesh, Mesh), "an abstract mesh compares nothing"
        self._base, self._other = base, other
        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            partial(diverge, base.programs, other.programs),
            mesh=mesh,
            in_specs=(base.specs, other.specs, everywhere, everywhere),
            out_specs=(everywhere, everywhere),
            check_vma=False,
        )
        hidden = [
            jax.ShapeDtypeStruct(
                (PLACES, head.programs.model.config.embed),
                dtype,
                sharding=NamedSharding(mesh, everywhere),
            )
            for head, dtype in zip((base, other), hidden_dtype, strict=True)
        ]
        with planned_compiles():
            lowered = jax.jit(mapped).lower(base.weight, other.weight, *hidden)
            self._program = lowered.compile(runner.compiler_options)

    def __call__(
        self, base: Float[np.ndarray, "T D"], other: Float[np.ndarray, "T E"]
    ) -> tuple[Float[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """Compares place by place.

        Args:
            base: hidden states of the base.
            other: of the other model, after the same tokens.

        Returns:
            KL(base || other) of each place in nats, and whether both think the same token
            likeliest.
        """
        found = [
            self._program(
                self._base.weight,
                self._other.weight,
                _padded(base[start : start + PLACES]),
                _padded(other[start : start + PLACES]),
            )
            for start in range(0, len(base), PLACES)
        ]
        kl, same = (np.concatenate(part)[: len(base)] for part in zip(*found, strict=True))
        return kl, same


def diverge(
    base: StepPrograms,
    other: StepPrograms,
    base_head: Matrix,
    other_head: Matrix,
    base_hidden: Float[Array, "T D"],
    other_hidden: Float[Array, "T E"],
) -> tuple[Float[Array, " T"], Bool[Array, " T"]]:
    """KL(base || other) of each place over the whole vocabulary, in float32; see ``Divergence``.

    Two passes over the chunks: the first normalises, the second adds up. What is added is
    ``q - p + p log(p/q)`` for each token, which sums to the same as ``p log(p/q)`` alone, is never
    negative, and in which an error of a normaliser counts by its square: differences of 1e-6 nats
    between nearly equal distributions are not lost in the rounding of logits near 20.
    """
    starts, base_logits = base.chunked_logits(base_head, base_hidden)
    _, other_logits = other.chunked_logits(other_head, other_hidden)
    p_normaliser, p_best = _summary(base, base_logits, starts, base_hidden.shape[0])
    q_normaliser, q_best = _summary(other, other_logits, starts, base_hidden.shape[0])

    def add(total: Array, start: Array) -> tuple[Array, None]:
        p_logits, _ = base_logits(start)
        q_logits, _ = other_logits(start)
        counts = jnp.isfinite(p_logits)
        log_p = jnp.where(counts, p_logits, 0.0) - p_normaliser[:, None]
        log_q = jnp.where(counts, q_logits, 0.0) - q_normaliser[:, None]
        term = _bregman(log_p, log_q)
        return total + jnp.sum(jnp.where(counts, term, 0.0), axis=-1), None

    total, _ = lax.scan(add, jnp.zeros_like(p_normaliser), starts)
    return base.vocab.sum(total), p_best == q_best


def _bregman(log_p: Float[Array, "T X"], log_q: Float[Array, "T X"]) -> Float[Array, "T X"]:
    """``q - p + p (log p - log q)``."""
    more = log_p - log_q
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Where both are close, q - p is a difference of equals.
    near = p * (jnp.expm1(-more) + more)
    return jnp.where(jnp.abs(more) < 1.0, near, q - p + p * more)


def _summary(
    programs: StepPrograms, chunk_logits: ChunkLogits, starts: Int[Array, " N"], places: int
) -> tuple[Float[Array, " T"], Int[Array, " T"]]:
    """The logarithm of the sum of exponentials, and the likeliest token; of equals the lowest."""
    vocab = programs.vocab

    def merge(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple, None]:
        normaliser, best, token = carry
        logits, ids = chunk_logits(start)
        normaliser = jnp.logaddexp(normaliser, jax.nn.logsumexp(logits, axis=-1))
        here = jnp.max(logits, axis=-1)
        token = jnp.where(here > best, ids[jnp.argmax(logits, axis=-1)], token)
        return (normaliser, jnp.maximum(best, here), token), None

    lowest = jnp.full((places,), -jnp.inf, jnp.float32)
    carry = (lowest, lowest, jnp.full((places,), vocab.total, jnp.int32))
    (normaliser, best, token), _ = lax.scan(merge, carry, starts)
    winners = jnp.where(best == vocab.max(best), token, vocab.total)
    return vocab.logsumexp(normaliser[:, None]), -vocab.max(-winners)


def _padded(hidden: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "X D"]:
    return np.pad(hidden, ((0, PLACES - len(hidden)), (0, 0)))
