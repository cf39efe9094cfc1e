"""What a model's dtype decides about its programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine.step import StepShape
from jaxserve.models.decoder import Model
from jaxserve.models.presets import preset
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.runner import Runner
from sharding.mesh import MeshShape, make_mesh
from tests.pallas_kernels.native_here import needs_native

STEP = StepShape(
    max_rows=1,
    table_width=4,
    vocab_size=512,
    decode_buckets=(1,),
    prefill_buckets=((1, 16),),
    score_buckets=((1, 16),),
)


@needs_native
@pytest.mark.parametrize(
    "key", [ProgramKey(1, "decode", 1, 1), ProgramKey(16, "score", 1, 16)], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "is_narrow"), [("bfloat16", True), ("float16", True), ("float32", False)]
)
def test_kernels_of_models_of_16_bits_and_no_others_may_be_narrow(
    dtype: str, is_narrow: bool, key: ProgramKey
):
    cache = CacheShape(num_pages=8, page_tokens=16, max_rows=1, dtype=jnp.dtype(dtype))
    config = RunnerConfig(step=STEP, cache=cache, dtype=jnp.dtype(dtype))
    mesh = make_mesh(MeshShape(), jax.devices("cpu"))
    traced = str(Runner(Model(preset("tiny-llama")), config, mesh).trace(key).jaxpr)
    kernels = [
        traced.count(f"target_name={name}") for name in ("jaxserve_matmul", "jaxserve_paged_att")
    ]
    assert min(kernels) > 0
    assert traced.count(f"'narrow', np.{is_narrow}_") == sum(kernels)
