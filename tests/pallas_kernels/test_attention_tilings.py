"""How the GPU kernel of paged attention is tiled: the rule, and what a search has recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import Pools, mosaic_config
from pallas_kernels.paged_attention.mosaic import HEAD_DIMS, choose_config, paged_attention_mosaic
from pallas_kernels.paged_attention.mosaic_config import Problem, best_known, rule

from .interpreting import interpreted

DTYPES = (jnp.bfloat16, jnp.float16, jnp.int8, jnp.int4, jnp.float8_e4m3fn)
SOME = Problem(head_dim=128, group=4, page_tokens=64, pages=jnp.dtype("int8"), one_query=True)


def test_the_rule_fits_whatever_the_kernel_takes():
    for head_dim, dtype, page_tokens, one_query in product(
        HEAD_DIMS, DTYPES, (8, 16, 32, 64, 128), (True, False)
    ):
        problem = Problem(head_dim, 4, page_tokens, jnp.dtype(dtype), one_query)
        assert problem.why_not(rule(problem)) is None, problem


def test_what_a_search_found_is_used_where_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert SOME.key == "128 group 4 page 64 int8 decode"
    assert replace(SOME, one_query=False).key == "128 group 4 page 64 int8 prompt"
    found = {"tiles": 1, "columns": 1, "tile_keys": 128, "stages": 3, "query_stages": 1}
    wide = replace(SOME, head_dim=256)
    record = tmp_path / "configs.json"
    record.write_text(json.dumps({"NVIDIA H200": {SOME.key: found, wide.key: found}}))
    monkeypatch.setattr(mosaic_config, "RECORD", record)
    mosaic_config._recorded.cache_clear()
    try:
        known = best_known(SOME, "NVIDIA H200")
        assert known is not None
        assert (known.tile_keys, known.stages) == (128, 3)
        assert best_known(SOME, "NVIDIA H100") is None
        assert best_known(wide, "NVIDIA H200") is None, "it does not fit"
        with interpreted(blocks=3):
            assert choose_config(SOME) == replace(known, blocks=3)
            assert choose_config(wide) == replace(rule(wide), blocks=3)
    finally:
        mosaic_config._recorded.cache_clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tiles": 3}, "3 tiles by 1 columns"),
        ({"tiles": 2}, "2 tiles are of several queries"),
        ({"columns": 2}, "head_dim 128 does not go with 2 columns"),
        ({"tile_keys": 32}, "tiles of 32 keys do not go with pages of 64"),
        ({"stages": 0}, "0 stages and 2 of queries are no ring"),
        ({"stages": 40}, "bytes of shared memory are more than there are"),
    ],
)
def test_what_the_kernel_cannot_be_tiled_as_is_refused(change: dict[str, int], reason: str):
    config = replace(rule(SOME), **change)
    assert reason in (SOME.why_not(config) or "")
    shape = (4, 2, 64, 128)
    pools = Pools(
        jnp.zeros(shape, jnp.int8),
        jnp.zeros(shape, jnp.int8),
        4,
        jnp.zeros(shape[:-1], jnp.bfloat16),
        jnp.zeros(shape[:-1], jnp.bfloat16),
    )
    one = jnp.ones(1, jnp.int32)
    q = jnp.zeros((1, 1, 8, 128), jnp.bfloat16)
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        paged_attention_mosaic(
            q, pools, jnp.ones((1, 2), jnp.int32), one, one, layer=0, scale=0.1, config=config
        )
