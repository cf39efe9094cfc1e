"""A mixture of experts: which feed-forwards a token takes, and the sum of what they answer.

    router -> the likeliest k of each token -> rows sorted by expert -> two grouped products
           -> back in the tokens' order -> weighed and added

No token is dropped: an expert takes as many rows as it gets. Inside ``shard_map`` every shard
routes alike and has a slice of every expert, so shards are summed as for a plain feed-forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.models.config import Activation, ModelConfig
from jaxserve.models.layers import project
from jaxserve.models.stacked import LayerOf
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantized_matmul import Matrix, Products, gated


class Routing(NamedTuple):
    """Of each token: the experts that it takes, likeliest first, and what they weigh."""

    expert: Int[Array, "T k"]
    weight: Float[Array, "T k"]
    """float32."""


def route(
    x: Float[Array, "T D"], router: Float[Array, "E D"], config: ModelConfig, products: Products
) -> Routing:
    """Chooses experts by a softmax over all of them, in float32; of equals the lower number.

    Args:
        x: activations.
        router: a row for each expert.
        config: how many a token takes, and whether their weights add up to one.
        products: how to multiply. Nothing is rounded on the way: a close choice would fall
            otherwise, and with it the answer.
    """
    likelihoods = jax.nn.softmax(exact(x, router, products), axis=-1)
    weight, expert = jax.lax.top_k(likelihoods, config.experts_per_token)
    if config.renormalize_experts:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    return Routing(expert, weight)


def exact(x: Float[Array, "*B D"], rows: Float[Array, "O D"], products: Products) -> Any:
    """Multiplies by a small matrix in float32, whatever the activations and ``products`` are."""
    return project(x.astype(jnp.float32), rows, products._replace(narrow=False))


def mixture(
    x: Float[Array, "T D"],
    routing: Routing,
    gate_up: Matrix | LayerOf,
    down: Matrix | LayerOf,
    activation: Activation,
    products: Products,
) -> Float[Array, "T D"]:
    """Adds up what each token's experts answer, in float32 and likeliest first.

    Args:
        x: activations.
        routing: of each token.
        gate_up: ``[E, 2 F, D]``: of each expert the gate's rows, then those of what it gates.
        down: ``[E, D, F]``.
        activation: of the gates.
        products: how to multiply.
    """
    tokens, taken = routing.expert.shape
    expert = routing.expert.reshape(-1)
    with jax.named_scope("sort"):
        # Stable, so that rows of one expert stand in the tokens' order.
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.zeros((down.shape[0],), jnp.int32).at[expert].add(1)
        rows = x[order // taken]
    hidden = gated(_grouped(rows, gate_up, sizes, products), activation)
    answers = _grouped(hidden, down, sizes, products)
    with jax.named_scope("combine"):
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
        mine = answers[place].reshape(tokens, taken, -1).astype(jnp.float32)
        return (mine * routing.weight[..., None]).sum(axis=1)


def _grouped(
    x: Float[Array, "M I"],
    matrices: Matrix | LayerOf,
    sizes: Int[Array, " E"],
    products: Products,
) -> Float[Array, "M O"]:
    if isinstance(matrices, LayerOf):
        stack, layer = matrices.stack, matrices.number
        return grouped_matmul(x, stack, sizes, layer=layer, **products._asdict())
    return grouped_matmul(x, matrices, sizes, **products._asdict())
