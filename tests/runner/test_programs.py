"""What a model's dtype decides about its programs, and what neighbours decide about a token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.step import POISONED_TOKEN, RESULT_COLUMNS, Column, RowTable, StepShape
from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import preset
from jaxserve.runner.cache import CacheShape, abstract_state
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.programs import StepPrograms
from jaxserve.runner.runner import Runner
from jaxserve.runner.sampling import Lines
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
    names = ("jaxserve_matmul", "jaxserve_feed_forward", "jaxserve_best", "jaxserve_paged_att")
    kernels = [traced.count(f"target_name={name}") for name in names]
    assert min(kernels) > 0
    assert traced.count(f"'narrow', np.{is_narrow}_") == sum(kernels)


ROWS = 9
MODEL = Model(preset("tiny-llama"))


@partial(jax.jit, static_argnames="is_narrow")
def sample(params: Params, hidden: jax.Array, packed: jax.Array, is_narrow: bool) -> jax.Array:
    """The result lines of a step whose layers ended with ``hidden``."""
    programs = StepPrograms(MODEL, STEP.table_width, tensor_axis=None, narrow=is_narrow)
    cache = CacheShape(num_pages=2, page_tokens=16, max_rows=ROWS, dtype=jnp.dtype(jnp.float32))
    shapes = abstract_state(cache, MODEL.config)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    result = jnp.zeros((ROWS + 1, RESULT_COLUMNS), jnp.int32)
    return programs._sample(params, state, result, Lines(packed), hidden)[1]


def greedy_lines(rows: Sequence[int]) -> np.ndarray:
    """Decode lines of greedy rows, as the engine packs them."""
    lines = RowTable(STEP).lines[[0] * len(rows)]
    lines[:, Column.ROW] = rows
    lines[:, Column.SAMPLES] = 1
    lines[:, Column.LOGPROBS] = -1
    return lines


@pytest.mark.parametrize(
    "wish",
    [
        {Column.TEMPERATURE_BITS: 1.0, Column.TOP_P_BITS: 0.9},
        {Column.LOGPROBS: 0},
        {Column.USES_BIAS: 1},
        {Column.USES_COUNTS: 1, Column.REPETITION_BITS: 1.0},
    ],
    ids=["samples", "logprobs", "bias", "penalties"],
)
@pytest.mark.parametrize(("dtype", "is_narrow"), [("bfloat16", True), ("float32", False)])
def test_a_greedy_row_has_the_same_token_whatever_its_neighbour_wants(
    dtype: str, is_narrow: bool, wish: dict[Column, float]
):
    """Every token has a twin with the same logit, and some differ from it in a last place."""
    params = MODEL.init(jax.random.key(0), jnp.dtype(dtype), stacked=True)
    embed = params.ends["embed"]
    half = embed.shape[0] // 2
    nudged = jnp.where(jnp.arange(half)[:, None] % 3 == 0, 1 + jnp.finfo(embed.dtype).eps, 1)
    twins = embed[:half] * nudged.astype(embed.dtype)
    params.ends["embed"] = jnp.concatenate([embed[:half], twins])
    hidden = jax.random.normal(jax.random.key(1), (ROWS, 64), jnp.float32)
    hidden = hidden.at[2, 3].set(jnp.nan)
    lines = greedy_lines(range(ROWS))
    alone = np.asarray(sample(params, hidden, lines, is_narrow))[:ROWS, 0]
    assert alone[2] == POISONED_TOKEN
    assert len(set(alone.tolist())) > ROWS // 2
    for column, value in wish.items():
        is_float = column.name.endswith("_BITS")
        lines[5, column] = np.float32(value).view(np.int32) if is_float else int(value)
    beside = np.asarray(sample(params, hidden, lines, is_narrow))[:ROWS, 0]
    np.testing.assert_array_equal(np.delete(beside, 5), np.delete(alone, 5))
    lone = sample(params, hidden[4:5], greedy_lines([4]), is_narrow)
    assert lone[4, 0] == alone[4]
