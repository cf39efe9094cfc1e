"""Attention for the model tests: dense, over whole sequences, in a few lines of plain jnp."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from pallas_kernels.paged_attention import apply_rope


def _dense_attend(config: ModelConfig) -> Callable[..., Any]:
    def attend(
        cache: Any, layer: Any, q: Any, k: Any, v: Any, rope: Any, window: Any
    ) -> tuple[Any, Any]:
        """Every query sees itself and what is before it, no further back than the window."""
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        group = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * config.attention_scale
        query, key = jnp.mgrid[: q.shape[1], : q.shape[1]]
        seen = (key <= query) & ((window == 0) | (query - key < window))
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
        return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), v), cache

    return attend


@lru_cache(maxsize=32)
def _compiled(model: Model) -> Callable[..., Any]:
    attend = _dense_attend(model.config)

    @jax.jit
    def run(params: Params, tokens: Any, positions: Any) -> Any:
        hidden, _ = model.forward(params, tokens, positions, (), attend, tensor_axis=None)
        return model.logits(params, hidden)

    return run


def _dense_logits(model: Model, params: Params, tokens: Any, positions: Any = None) -> np.ndarray:
    tokens = jnp.asarray(tokens, jnp.int32)
    batch = tokens if tokens.ndim == 2 else tokens[None]
    if positions is None:
        positions = np.arange(batch.shape[1])
    positions = jnp.broadcast_to(jnp.asarray(positions, jnp.int32)[None], batch.shape)
    logits = np.asarray(_compiled(model)(params, batch, positions))
    return logits if tokens.ndim == 2 else logits[0]


@pytest.fixture(scope="session")
def dense_attend() -> Callable[[ModelConfig], Callable[..., Any]]:
    """Makes the dense attention of a config."""
    return _dense_attend


@pytest.fixture(scope="session")
def dense_logits() -> Callable[..., np.ndarray]:
    """Logits after every token of one sequence ``[T]`` or several ``[B, T]``."""
    return _dense_logits


@pytest.fixture(scope="session")
def one_device() -> Callable[[Model, Any, bool], Params]:
    """Shardings that put every weight of a model on the first device."""

    def shardings(model: Model, dtype: Any, stacked: bool) -> Params:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, model.abstract(dtype, stacked=stacked))

    return shardings
