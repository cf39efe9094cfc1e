"""Mixtures of experts against sums written out token by token in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.experts import Routing, mixture, route
from jaxserve.models.layers import feed_forward
from jaxserve.models.presets import preset
from jaxserve.models.stacked import LayerOf
from pallas_kernels.quantized_matmul import Products, dequantized, quantized
from tests.pallas_kernels.native_here import needs_native, usable

D, F, E, T = 64, 96, 6, 17
IMPLEMENTATIONS = usable(["native", "xla"])
CONFIG = replace(preset("tiny-mixtral"), embed=D, ffn=F, experts=E, experts_per_token=2)


def drawn(*shape: int, seed: int, std: float = 1.0) -> jax.Array:
    numbers = np.random.default_rng(seed).standard_normal(shape) * std
    return jnp.asarray(numbers, jnp.float32)


X = drawn(T, D, seed=0)
ROUTER = drawn(E, D, seed=1, std=0.3)
GATE_UP = drawn(E, 2 * F, D, seed=2, std=D**-0.5)
DOWN = drawn(E, D, F, seed=3, std=F**-0.5)


def run(x: Any, router: Any, config: ModelConfig, implementation: str) -> np.ndarray:
    products = Products(implementation)

    @jax.jit
    def both(x: Any, router: Any) -> Any:
        routing = route(x, router, config, products)
        return mixture(x, routing, GATE_UP, DOWN, "silu", products)

    return np.asarray(both(x, router))


def expert(number: int, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(np.asarray(GATE_UP[number], np.float64) @ x, 2)
    return np.asarray(DOWN[number], np.float64) @ (gate / (1 + np.exp(-gate)) * up)


def expected(x: Any, router: Any, config: ModelConfig) -> np.ndarray:
    out = []
    for token in np.asarray(x, np.float64):
        scores = np.asarray(router, np.float64) @ token
        likelihood = np.exp(scores - scores.max())
        likelihood /= likelihood.sum()
        best = sorted(range(E), key=lambda e: -likelihood[e])[: config.experts_per_token]
        weights = likelihood[best]
        if config.renormalize_experts:
            weights = weights / weights.sum()
        out.append(sum(w * expert(e, token) for w, e in zip(weights, best, strict=True)))
    return np.stack(out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("taken", [1, 3, E])
def test_a_token_gets_the_weighed_answers_of_its_likeliest_experts(
    taken: int, renormalize: bool, implementation: str
):
    config = replace(CONFIG, experts_per_token=taken, renormalize_experts=renormalize)
    answer = run(X, ROUTER, config, implementation)
    np.testing.assert_allclose(answer, expected(X, ROUTER, config), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_is_dropped_where_all_want_the_same_expert(implementation: str):
    router = jnp.zeros((E, D)).at[4].set(jnp.abs(ROUTER[4]))
    x = jnp.abs(X)  # So that expert 4 is everybody's best.
    config = replace(CONFIG, experts_per_token=1)
    answer = run(x, router, config, implementation)
    alike = np.stack([expert(4, token) for token in np.asarray(x, np.float64)])
    np.testing.assert_allclose(answer, alike, rtol=0, atol=2e-5)


def test_equal_experts_are_one_feed_forward():
    """Whatever the router says, since the weights add up to one."""
    gate_up, down = (jnp.repeat(w[:1], E, axis=0) for w in (GATE_UP, DOWN))
    products = Products("xla")
    routing = route(X, ROUTER, CONFIG, products)
    answer = mixture(X, routing, gate_up, down, "silu", products)
    plain = feed_forward(X, GATE_UP[0], DOWN[0], "silu", products)
    np.testing.assert_allclose(answer, plain, rtol=0, atol=1e-5)


def test_of_equally_likely_experts_the_lower_numbers_are_taken_in_float32():
    routing = route(X.astype(jnp.bfloat16), jnp.zeros((E, D), jnp.bfloat16), CONFIG, Products())
    np.testing.assert_array_equal(routing.expert, [[0, 1]] * T)
    assert routing.weight.dtype == jnp.float32
    np.testing.assert_allclose(routing.weight, 0.5)


@needs_native
def test_a_choice_is_not_rounded_where_products_may_be():
    """Two experts that differ by less than bfloat16 and int8 see."""
    router = jnp.tile(ROUTER[:1], (E, 1)).at[3].mul(1 + 2**-10).astype(jnp.bfloat16)
    router = router.astype(jnp.float32).at[3].mul(1 + 2**-12)
    x = jnp.where(X @ ROUTER[0][:, None] > 0, X, -X)
    routing = route(x, router, replace(CONFIG, experts_per_token=1), Products("auto", narrow=True))
    exact = np.asarray(x, np.float64) @ np.asarray(router, np.float64).T
    np.testing.assert_array_equal(routing.expert[:, 0], exact.argmax(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_has_the_same_answer_in_any_company(implementation: str):
    """To the bit with native products; with XLA's, to the rounding of sums."""
    together = run(X, ROUTER, CONFIG, implementation)
    alone = run(X[5:6], ROUTER, CONFIG, implementation)[0]
    others = run(X.at[:5].set(X[9]).at[6:].set(jnp.nan), ROUTER, CONFIG, implementation)[5]
    if implementation == "native":
        np.testing.assert_array_equal(alone, together[5])
        np.testing.assert_array_equal(others, together[5])
    else:
        np.testing.assert_allclose(alone, together[5], rtol=0, atol=1e-5)
        np.testing.assert_allclose(others, together[5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_experts_answer_as_their_numbers_do(format: Any, implementation: str):
    stacks = [
        jax.tree.map(jnp.asarray, quantized(np.stack([np.zeros_like(w), w]), format))
        for w in (GATE_UP, DOWN)
    ]
    routing = Routing(jnp.arange(T * 2).reshape(T, 2) % E, jnp.full((T, 2), 0.5))

    @jax.jit
    def layered(number: Any) -> Any:
        gate_up, down = (LayerOf(stack, number) for stack in stacks)
        return mixture(X, routing, gate_up, down, "silu", Products(implementation))

    gate_up, down = (dequantized(stack[1], jnp.float32) for stack in stacks)
    direct = mixture(X, routing, gate_up, down, "silu", Products("xla"))
    np.testing.assert_allclose(layered(jnp.int32(1)), direct, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layered(jnp.int32(0)), 0.0, atol=1e-6)


@pytest.mark.parametrize("taken", [0, E + 1])
def test_a_token_cannot_take_more_experts_than_there_are(taken: int):
    message = f"mixtral: a token cannot take {taken} of {E} experts; the config must name 1 to {E}"
    with pytest.raises(CheckpointError, match=message):
        replace(CONFIG, experts_per_token=taken)
