"""The GPU kernel of paged attention, interpreted on the CPU: numbers, races and planted faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
    FORMATS,
    Pools,
    mosaic_block,
    mosaic_kernel,
    paged_attention,
)
from pallas_kernels.paged_attention.cases import (
    INTERPRETED,
    LAYER,
    Case,
    Inputs,
    share_pages,
    share_places,
)
from pallas_kernels.quantized_attention.reference import quantized

from .interpreting import Fault, assert_caught, interpret, interpreted

BY_NAME = {case.name: case for case in INTERPRETED}
IN_EVERY_RUN = ("decode-64-page16-window", "ragged-128-page64-window")
"""Cases that ``make test`` runs; all are in ``make prove-kernels``."""
WITH_SCALES = {
    # Format: case. Every format meets every kind, and each head_dim.
    "int8": (
        "decode-64-page64",
        "decode-256-page32-window",
        "ragged-96-page16",
        "chunk-128-page32-sinks",
    ),
    "fp8": (
        "decode-128-page64-mqa",
        "decode-96-page64-sinks",
        "ragged-64-page32",
        "ragged-256-page16",
    ),
    "int4": (
        "decode-64-page16-window",
        "decode-128-page16-all",
        "ragged-128-page64-window",
        "decode-256-page64-sinks",
        "chunk-64-page16-softcap",
        "chunk-256-page64",
    ),
}
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}
"""Of a number of an answer: weights and answers are rounded to 16 bits, and numbers reach 3."""


def draw(
    case: Case, seed: int, dtype: str, format: str | None = None
) -> tuple[Inputs, dict[str, Any]]:
    """The arrays of a case and its options; poison is wherever nobody may look."""
    inputs = case.arrays(seed=seed, dtype="float32")
    first = None
    if case.is_ragged:
        inputs, first = share_places(inputs)
    q = inputs.q.astype(dtype)
    pools = jax.tree.map(lambda pages: pages.astype(dtype), inputs.pools)
    if format is not None:
        pools = quantized(inputs.pools, FORMATS[format])
    sinks = None
    if case.has_sinks:
        sinks = jax.random.normal(jax.random.key(seed), (case.q_heads,)) * 2
    options = {"scale": case.scale, "window": case.window, "softcap": case.softcap, "layer": LAYER}
    return inputs._replace(q=q, pools=pools), options | {"first": first, "sinks": sinks}


def expect_reference(case: Case, dtype: str, format: str | None = None, seed: int = 0) -> None:
    """Compares with the definition, over the same rounded numbers."""
    inputs, options = draw(case, seed, dtype, format)
    expected = paged_attention(*inputs, **options, implementation="reference")

    def attend(*arrays: Any) -> jax.Array:
        return paged_attention(*arrays, **options, implementation="mosaic")

    out = interpret(attend, *inputs, blocks=2)
    assert out.dtype == inputs.q.dtype
    error = np.abs(np.asarray(out, np.float32) - np.asarray(expected, np.float32))
    print(
        f"{case.name} {format or dtype}: largest error {error.max():.1e}, mean {error.mean():.1e}"
    )
    assert error.max() < TOLERANCE[dtype], "numbers"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.prove)
        for name in BY_NAME
    ],
)
def test_answers_are_the_references(name: str, seed: int):
    expect_reference(BY_NAME[name], "float16" if "96" in name else "bfloat16", seed=seed)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        pytest.param(format, name, marks=() if i == 0 and format != "fp8" else pytest.mark.prove)
        for format, names in WITH_SCALES.items()
        for i, name in enumerate(names)
    ],
)
def test_answers_over_pages_with_scales_are_the_references(format: str, name: str, seed: int):
    expect_reference(BY_NAME[name], "bfloat16", format, seed=seed)


@pytest.mark.prove
def test_rows_may_share_pages():
    case = replace(BY_NAME["decode-64-page64"], rows=BY_NAME["decode-64-page64"].rows[:1] * 2)
    inputs, options = draw(case, 3, "bfloat16")
    shared = share_pages(inputs, [0, 1], 4)
    expected = paged_attention(*shared, **options, implementation="reference")
    out = interpret(lambda *x: paged_attention(*x, **options, implementation="mosaic"), *shared)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=TOLERANCE["bfloat16"]
    )


@pytest.mark.prove
@pytest.mark.parametrize("name", ["decode-64-page64-pieces", "ragged-64-page32"])
def test_a_row_has_the_same_bits_alone_and_in_company(name: str):
    """How a row is cut depends on that row alone; so does which block computes what, not."""
    case = BY_NAME[name]
    inputs, options = draw(case, 5, "bfloat16")
    first = options.pop("first")

    def attend(blocks: int, inputs: Inputs, first: Any) -> np.ndarray:
        def run(*arrays: Any) -> jax.Array:
            return paged_attention(*arrays, first=first, **options, implementation="mosaic")

        return np.asarray(interpret(run, *inputs, blocks=blocks).astype(jnp.float32))

    together = attend(3, inputs, first)
    row = 1
    alone = inputs._replace(length=jnp.where(jnp.arange(len(case.rows)) == row, inputs.length, 0))
    apart = attend(2, alone, first)
    here = (
        (row,)
        if first is None
        else (0, slice(int(first[row]), int(first[row]) + case.rows[row].length))
    )
    np.testing.assert_array_equal(together[here], apart[here])


FAULTS = (
    Fault("missing wait for keys", "plgpu.barrier_wait(memory.k_here.at[slot])", "pass"),
    Fault("missing wait for values", "plgpu.barrier_wait(memory.v_here.at[slot])", "pass"),
    Fault("missing wait for queries", "plgpu.barrier_wait(memory.q_here.at[slot])", "pass"),
    Fault("missing wait for a free place", "plgpu.barrier_wait(memory.free.at[slot])", "pass"),
    Fault("missing wait for free queries", "plgpu.barrier_wait(memory.q_free.at[slot])", "pass"),
    Fault("place freed too early", "            release(memory.q_free.at[slot])\n", ""),
    Fault("missing drain", "        drain(memory.free, fetched, stages)\n", ""),
    Fault(
        "answer overwritten while it is read",
        "        # What was put last must have been read before it is overwritten.\n"
        "        plgpu.wait_smem_to_gmem(0)\n",
        "",
    ),
    Fault(
        "mask off by one",
        "key < self._limit(see.before - begin",
        "key <= self._limit(see.before - begin",
    ),
    Fault(
        "window off by one",
        "key >= self._limit(see.begin - begin",
        "key > self._limit(see.begin - begin",
    ),
    Fault(
        "edge not masked",
        "begin + self.config.tile_keys > see.all_before",
        "begin > see.all_before",
    ),
    Fault("wrong page", "jnp.minimum(first + j, width - 1)", "jnp.minimum(first, width - 1)"),
    Fault("lost layer", "base = self.memory.numbers[1]", "base = 0"),
    Fault(
        "unseen values not cleaned",
        "@pl.when((seen > 0) | (end < config.tile_keys))",
        "@pl.when(end < -9)",
    ),
    Fault("old sum not shrunk", "total = total * shrink + weights", "total = total + weights"),
    Fault("answer not shrunk", "acc = acc * _down(shrink, acc.shape)", "acc = acc"),
    Fault(
        "missing commit of sums",
        "            plgpu.commit_smem()\n            plgpu.copy_smem_to_gmem(memory.sum_sm",
        "            plgpu.copy_smem_to_gmem(memory.sum_sm",
    ),
    Fault(
        "wrong head",
        "return lax.div(turn, self.launch.kv_heads), lax.rem(turn, self.launch.kv_heads)",
        "return lax.div(turn, self.launch.kv_heads), jnp.int32(0)",
    ),
    Fault("group off", "lax.div(query + line, group)", "lax.div(query + line + 1, group)"),
)
FAULTS_OF_SCALES = (
    Fault(
        "lost scale of keys",
        "scores = scores * _across(memory.k_scale_sm",
        "scores = scores + 0 * _across(memory.k_scale_sm",
    ),
    Fault(
        "lost scale of values", "weights = weights * _across(self._clean_scale(at), shape)", "pass"
    ),
    Fault(
        "scale of nobody's cell",
        "return jnp.where((key >= seen) & (key < end), scale, 0.0)",
        "return scale",
    ),
    Fault("wrong scale", "scales.at[page, head, source]", "scales.at[page, 0, source]"),
    Fault(
        "warpgroups do not meet",
        "        plgpu.barrier_arrive(self.memory.together)\n"
        "        plgpu.barrier_wait(self.memory.together)\n",
        "        pass\n",
    ),
)


def checking(monkeypatch: pytest.MonkeyPatch, cases: Sequence[tuple[str, str | None]]) -> Any:
    def check(module: ModuleType) -> None:
        monkeypatch.setattr(mosaic_kernel, "Block", module.Block)
        for name, format in cases:
            expect_reference(BY_NAME[name], "bfloat16", format, seed=7)

    return check


@pytest.mark.prove
def test_every_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch):
    cases = [("ragged-128-page64-window", None), ("decode-64-page16-window", None)]
    assert_caught(mosaic_block, FAULTS, checking(monkeypatch, cases))


@pytest.mark.prove
def test_every_planted_fault_of_scales_is_caught(monkeypatch: pytest.MonkeyPatch):
    cases = [("decode-256-page32-window", "int8"), ("decode-64-page16-window", "int4")]
    assert_caught(mosaic_block, FAULTS_OF_SCALES, checking(monkeypatch, cases))


def test_a_planted_race_and_a_planted_off_by_one_are_caught(monkeypatch: pytest.MonkeyPatch):
    faults = [
        fault for fault in FAULTS if fault.name in ("missing wait for keys", "mask off by one")
    ]
    assert_caught(mosaic_block, faults, checking(monkeypatch, [("decode-64-page16-window", None)]))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q_dtype", "shape", "reason"),
    [
        ("bfloat16", (2, 64, 80), "head_dim must be one of 64, 96, 128, 256, got 80"),
        (
            "bfloat16",
            (2, 48, 64),
            "pages must be of 8, 16 or 32 tokens or a multiple of 64, got 48",
        ),
        ("float32", (2, 64, 64), "dtypes are bfloat16 and float16, got float32"),
    ],
)
def test_declines_what_it_was_not_written_for(
    q_dtype: str, shape: tuple[int, int, int], reason: str
):
    kv_heads, page_tokens, head_dim = shape
    pages = jnp.zeros((4, kv_heads, page_tokens, head_dim), q_dtype)
    row = jnp.zeros(1, jnp.int32)
    arrays = (
        jnp.zeros((1, 1, 4, head_dim), q_dtype),
        Pools(k=pages, v=pages, pages=2),
        jnp.zeros((1, 1), jnp.int32),
        row,
        row + 1,
    )
    with interpreted(), pytest.raises(ExceptionGroup) as caught:
        paged_attention(*arrays, layer=0, scale=1.0, implementation="mosaic")
    assert reason in str(caught.value.exceptions[0])


def test_declines_heads_whose_int4_are_no_whole_swizzle():
    inputs, options = draw(BY_NAME["decode-96-page64-sinks"], 0, "bfloat16", "int4")
    with interpreted(), pytest.raises(ExceptionGroup) as caught:
        paged_attention(*inputs, **options, implementation="mosaic")
    assert "pages of int4 take a head_dim that is a multiple of 64" in str(caught.value.exceptions)


def test_declines_on_a_cpu():
    inputs, options = draw(BY_NAME["decode-64-page64"], 0, "bfloat16")
    with pytest.raises(ExceptionGroup) as caught:
        paged_attention(*inputs, **options, implementation="mosaic")
    assert "Mosaic kernels run on Hopper GPUs, and this program is for cpu" in str(
        caught.value.exceptions[0]
    )
