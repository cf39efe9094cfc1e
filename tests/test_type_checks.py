"""In the tests, types are checked at every call, by beartype alone or through jaxtyping."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import SamplingParams
from jaxserve.errors import QueueFullError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.models.layers import rms_norm

NOTHING: Any = None


def test_an_argument_of_another_type_is_noticed() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="num_pages"):
        PagePool(NOTHING)
    with pytest.raises(BeartypeCallHintViolation, match="count"):
        PagePool(4).allocate(NOTHING)
    with pytest.raises(BeartypeCallHintViolation, match="temperature"):
        SamplingParams(temperature=NOTHING)
    with pytest.raises(TypeCheckError, match="retry_after_s"):
        QueueFullError("requests", 6, 6, retry_after_s=NOTHING)
    with pytest.raises(TypeCheckError, match="port"):
        ServerConfig(port=NOTHING)


def test_a_result_of_another_type_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(4)
    monkeypatch.setattr(pool, "_references", ["many"])
    with pytest.raises(BeartypeCallHintViolation, match="return"):
        pool.references(0)


def test_shapes_that_do_not_fit_each_other_are_noticed() -> None:
    with pytest.raises(TypeCheckError, match="weight"):
        rms_norm(jnp.ones((2, 4)), jnp.ones(3), eps=1e-6, offset=False)
