"""The GPU kernel of quantized products, interpreted on the CPU: numbers, races, planted faults."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import (
    OnGpu,
    Quantized,
    best_product,
    dequantized,
    feed_forward,
    for_gpu,
    mosaic_config,
    mosaic_kernel,
    quantized,
    quantized_matmul,
    spec,
)
from pallas_kernels.quantized_matmul.cases import INTERPRETED, LAYER, LAYERS, GpuCase
from pallas_kernels.quantized_matmul.mosaic import MOST_ROWS
from pallas_kernels.quantized_matmul.mosaic_config import FEW, Config, Problem, best_known, choose

from .interpreting import Fault, assert_caught, interpret, interpreted

IN_EVERY_RUN = (INTERPRETED[1], INTERPRETED[6], INTERPRETED[15], INTERPRETED[18])
"""Cases that ``make test`` runs; all are in ``make prove-kernels``."""
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}
"""Of the sum of the products' sizes, by the dtype of answers."""
NARROW_TOLERANCE = {"int8": 6e-3, "fp8": 2**-4}
"""Likewise, where activations are rounded to the matrix's dtype."""


def draw(case: GpuCase, seed: int = 0) -> tuple[jax.Array, Quantized, np.ndarray]:
    """Activations, a stack, and the numbers of one of its layers; the others are poisoned.

    Codes are drawn, not rounded: every one occurs. Groups differ in size.
    """
    rng = np.random.default_rng(seed)
    kind, group = spec(case.format)[:2]
    group = group or case.depth
    shape = (LAYERS, case.out, case.depth)
    size = rng.uniform(0.5, 1.5, (*shape[:2], case.depth // group)) * 10.0 ** rng.integers(
        -2, 1, case.depth // group
    )
    scale = size.astype(np.float32 if kind == "fp8" else np.float16)
    minimum = None
    if kind == "int4":
        codes = rng.integers(0, 16, shape)
        minimum = (rng.standard_normal(size.shape) * size - 7 * size).astype(np.float16)
        low, high = np.split(codes.reshape(*shape[:2], -1, 2, 16), 2, axis=-2)
        values = (low + 16 * high).astype(np.uint8).reshape(*shape[:2], -1)
    elif kind == "int8":
        codes = rng.integers(-127, 128, shape)
        values = codes.astype(np.int8)
    else:
        values = (rng.standard_normal(shape) * 60).astype(jnp.float8_e4m3fn)
        codes = values.astype(np.float64)
    numbers = codes * scale.astype(np.float64).repeat(group, axis=-1)
    if minimum is not None:
        numbers = numbers + minimum.astype(np.float64).repeat(group, axis=-1)
    other = np.arange(LAYERS) != LAYER
    scale[other] = np.nan  # The nearest layer must not do for this one.
    if minimum is not None:
        minimum[other] = np.nan
    x = rng.standard_normal((case.rows, case.depth)).astype(case.dtype)
    leaves = [None if leaf is None else jnp.asarray(leaf) for leaf in (values, scale, minimum)]
    return jnp.asarray(x), Quantized(*leaves), numbers[LAYER]


def product(case: GpuCase, x: jax.Array, stack: Quantized, blocks: int = 3) -> jax.Array:
    multiply = partial(
        quantized_matmul,
        dtype=jnp.dtype(case.answers),
        implementation="mosaic",
        narrow=case.narrow,
    )

    def run(x: Any, stack: Any, layer: Any) -> jax.Array:
        return multiply(x, stack, layer=layer)

    return interpret(run, x, stack, jnp.int32(LAYER), blocks=blocks)


def expect(out: jax.Array, x: jax.Array, matrix: np.ndarray, tolerance: float) -> None:
    wide = np.asarray(x, np.float64)
    error = np.abs(np.asarray(out, np.float64) - wide @ matrix.T)
    size = np.abs(wide) @ np.abs(matrix).T
    print(f"largest error {(error / size).max():.1e} of the sum of sizes")
    assert (error <= tolerance * size).all(), "numbers"


def marked(cases: Any) -> list[Any]:
    return [
        pytest.param(case, marks=() if case in IN_EVERY_RUN else pytest.mark.prove, id=str(case))
        for case in cases
    ]


@pytest.mark.parametrize("case", marked(INTERPRETED))
def test_answers_are_numpys(case: GpuCase, seed: int):
    x, stack, matrix = draw(case, seed)
    out = product(case, x, for_gpu(stack))
    assert out.dtype == case.answers
    tolerance = TOLERANCE[case.answers]
    if case.narrow:
        tolerance += NARROW_TOLERANCE[spec(case.format).kind]
    expect(out, x, matrix, tolerance)


@pytest.mark.prove
@pytest.mark.parametrize("case", [INTERPRETED[1], INTERPRETED[14]], ids=str)
def test_a_row_has_the_same_bits_whatever_the_others_are(case: GpuCase):
    x, stack, _ = draw(case)
    row = case.rows - 2
    spoilt = jnp.where(jnp.arange(case.rows)[:, None] == row, x, jnp.nan)
    sound, other = (product(case, rows, for_gpu(stack)) for rows in (x, spoilt))
    np.testing.assert_array_equal(sound[row], other[row])
    assert np.isnan(np.asarray(other[row + 1], np.float32)).all()


@pytest.mark.prove
def test_large_activations_survive_float16():
    """A matrix of float8 meets float16, which bfloat16's numbers exceed."""
    case = GpuCase("fp8", 3, 64, 128)
    x, stack, matrix = draw(case)
    x = x * jnp.asarray([[1e30], [1e-30], [1.0]], x.dtype)
    expect(product(case, x, for_gpu(stack)), x, matrix, TOLERANCE["float32"])


@pytest.mark.prove
def test_a_matrix_with_one_scale_a_row_needs_no_repack():
    case = GpuCase("int8/row", 3, 64, 128)
    x, stack, matrix = draw(case)
    expect(product(case, x, stack), x, matrix, TOLERANCE["float32"])


@pytest.mark.prove
def test_columns_in_another_order_meet_their_activations():
    case = GpuCase("int4", 3, 64, 128)
    x, stack, matrix = draw(case)
    order = np.random.default_rng(1).permutation(case.depth).astype(np.int32)
    stack = replace(stack, order=jnp.tile(order, (LAYERS, 1, 1)))
    unordered = np.empty_like(matrix)
    unordered[:, order] = matrix
    expect(product(case, x, for_gpu(stack)), x, unordered, TOLERANCE["float32"])


@pytest.mark.prove
def test_the_feed_forward_and_the_best_product_use_the_kernel():
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal(shape).astype(np.float32) for shape in ((128, 64), (64, 64))]
    gate_up, down = (for_gpu(jax.tree.map(jnp.asarray, quantized(one, "int4"))) for one in draws)
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.bfloat16)
    run = partial(feed_forward, activation="silu")
    expected = np.asarray(run(x, gate_up, down, implementation="reference"), np.float32)
    out = np.asarray(interpret(run, x, gate_up, down), np.float32)  # Fails if no GPU kernel runs.
    assert np.linalg.norm(out - expected) < 0.01 * np.linalg.norm(expected)
    best = interpret(partial(best_product, implementation="mosaic"), x, gate_up)
    np.testing.assert_array_equal(
        best.place, best_product(x, gate_up, implementation="reference").place
    )


FAULTS = (
    Fault("tile not waited for", "plgpu.barrier_wait(full.at[slot])", "pass"),
    Fault("free slot not waited for", "plgpu.barrier_wait(free.at[slot])", "pass"),
    Fault("slot never freed", "mosaic.release(free.at[slot])", "pass"),
    Fault("barriers left undrained", "mosaic.drain(free, mine * tiles, config.stages)", "pass"),
    Fault("sums not waited for", 'plgpu.barrier_wait(shared["ready"].at[strip])', "pass"),
    Fault("sums overwritten", 'plgpu.barrier_wait(shared["taken"].at[strip])', "pass"),
    Fault("row's scale not waited for", 'plgpu.barrier_wait(shared["scaled"].at[strip])', "pass"),
    Fault("answer not committed", "            plgpu.commit_smem()\n", ""),
    Fault("answer overwritten", "plgpu.wait_smem_to_gmem(0, wait_read_only=True)", "pass"),
    Fault("answer not waited for", "plgpu.wait_smem_to_gmem(0)\n", "pass\n"),
    Fault(
        "scale of another group",
        'shared["scale"][slot, j, lines]',
        'shared["scale"][slot, 0, lines]',
    ),
    Fault("minimum lost", "sums = sums + of_x * spread(", "sums = sums + 0 * of_x * spread("),
    Fault("minimum without its offset", "least + CODE_OFFSET * scales", "least"),
    Fault(
        "one tile behind",
        "start = (part * tiles + t) * tile",
        "start = (part * tiles + jnp.maximum(t - 1, 0)) * tile",
    ),
    Fault("part of another", "start = (part * tiles + t) * tile", "start = t * tile"),
    Fault("another layer", 'given["layer"][0], jnp', 'given["layer"][0] - 1, jnp'),
    Fault("a chain lost", "for other in range(chains - 1)", "for other in range(chains - 2)"),
    Fault("factor lost", 'sums = sums * spread_down(shared["factor"][strip])', "pass"),
    Fault(
        "activations of another tile",
        '"x": (pl.ds(token, tokens), columns)',
        '"x": (pl.ds(0, tokens), columns)',
    ),
)
FAULT_CASES = (
    (GpuCase("int4", 16, 128, 512), Config(8, 128, 1, 2, 2, 2, 3)),
    (GpuCase("int8/row", 16, 128, 512, narrow=True), Config(8, 128, 1, 2, 1, 2, 3)),
)


def check(module: ModuleType) -> None:
    for case, config in FAULT_CASES:
        x, stack, matrix = draw(case)
        repacked = for_gpu(stack)
        assert isinstance(repacked, OnGpu)
        x = repacked.columns(x)
        tolerance, factor = TOLERANCE["float32"], None
        if case.narrow:
            factor = jnp.abs(x).max(axis=-1).astype(jnp.float32) / 127
            x = jnp.rint(x.astype(jnp.float32) / factor[:, None]).astype(jnp.int8)
            rounded = x.astype(jnp.float32) * factor[:, None]
        else:
            rounded = draw(case)[0]
        launch = partial(module.mosaic_product, config=config, dtype=jnp.dtype(jnp.float32))
        layer = jnp.full((1,), LAYER, jnp.int32)
        arrays = (repacked.codes(), repacked.scale, repacked.minimum, None, factor, layer)
        parts = interpret(launch, x, *arrays, patience_s=20)
        expect(parts.sum(axis=0), rounded, matrix, tolerance)


@pytest.mark.prove
def test_every_planted_fault_is_caught():
    assert_caught(mosaic_kernel, FAULTS, check)


@pytest.mark.parametrize("format", ["int8", "int8/row", "int4", "int4/128", "fp8", "fp8/64"])
def test_a_repacked_matrix_is_the_same_matrix(format: str):
    _, stack, matrix = draw(GpuCase(format, 1, 64, 256))
    repacked = jax.jit(for_gpu)(stack)
    assert isinstance(repacked, OnGpu)
    assert (repacked.shape, repacked.group) == (stack.shape, stack.group)
    assert repacked.nbytes == stack.nbytes
    for layer in (repacked[LAYER], repacked.stored()[LAYER], for_gpu(repacked)[LAYER]):
        found = np.asarray(dequantized(layer, jnp.float32))
        np.testing.assert_allclose(found, matrix, rtol=1e-6, atol=1e-6)
    one = repacked[LAYER]
    for index in ([[5, 3], [0, 9]], slice(7, 30), 4):
        rows = dequantized(one[jnp.array(index) if isinstance(index, list) else index], jnp.float32)
        np.testing.assert_allclose(rows, matrix[index], rtol=1e-6, atol=1e-6)
    for kept in (one, one.stored()):
        some = jax.jit(lambda kept, start: kept.rows(start, 16))(kept, 32)
        assert type(some) is type(kept)
        found = dequantized(some, jnp.float32)
        np.testing.assert_allclose(found, matrix[32:48], rtol=1e-6, atol=1e-6)
    assert repacked.reshape(LAYERS, -1, 256) is repacked
    wide = dequantized(repacked.reshape(LAYERS * 64, 256), jnp.float32)
    np.testing.assert_allclose(wide[LAYER * 64 :], matrix, rtol=1e-6, atol=1e-6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256)), jnp.float32)
    for implementation in ("auto", "xla", "reference"):
        out = quantized_matmul(x, repacked, layer=LAYER, implementation=implementation)
        np.testing.assert_allclose(out, x @ matrix.T, rtol=1e-4, atol=1e-2 * np.abs(matrix).max())


def problem(rows: int, out: int, depth: int, format: str = "int4/128") -> Problem:
    kind, group = spec(format)[:2]
    values = {"int4": jnp.int4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[kind]
    groups = depth // (group or depth)
    has_minimum = kind == "int4"
    return Problem(rows, out, depth, groups, values, jnp.bfloat16, has_minimum, jnp.float16)


@pytest.mark.parametrize("format", ["int8", "int4", "int4/128", "int8/row"])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14_336), (576, 1536), (28_672, 4096)])
def test_up_to_so_many_rows_the_order_of_sums_is_that_of_the_matrix(
    shape: tuple[int, int], format: str
):
    configs = [choose(problem(rows, *shape, format)) for rows in range(1, FEW + 1)]
    assert len({(config.depth, config.chains, config.parts) for config in configs}) == 1
    assert {config.tokens for config in configs} == {8, 16, 32}


def test_what_a_search_found_is_used_where_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    some = problem(3, 4096, 4096)
    assert some.key == "4096x4096 int4/128 bfloat16 few"
    assert problem(130, 4096, 4096, "int8/row").key == "4096x4096 int8/4096 bfloat16 256 rows"
    found = {"tokens": 16, "depth": 128, "rows": 1, "chains": 2, "parts": 4, "stages": 4}
    record = tmp_path / "configs.json"
    record.write_text(json.dumps({"NVIDIA H200": {some.key: found}}))
    monkeypatch.setattr(mosaic_config, "RECORD", record)
    mosaic_config._recorded.cache_clear()
    try:
        assert best_known(some, "NVIDIA H200") == Config(8, 128, 1, 2, 4, 4)
        assert best_known(replace(some, rows=40), "NVIDIA H200") == Config(16, 128, 1, 2, 4, 4)
        assert best_known(some, "NVIDIA H100") is None
        assert best_known(problem(3, 4096, 8192), "NVIDIA H200") is None
    finally:
        mosaic_config._recorded.cache_clear()


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (3, {"tokens": 12}),
        (3, {"depth": 32}),
        (3, {"rows": 2}),
        (3, {"chains": 8, "stages": 8}),
        (3, {"parts": 16}),
        (3, {"stages": 32}),
        (130, {"tokens": 128, "rows": 3, "chains": 1}),
        (130, {"tokens": 128}),
        (130, {"chains": 1}),
    ],
)
def test_a_recorded_tiling_that_no_search_tries_is_passed_over(
    rows: int, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    some = problem(rows, 4096 * 3, 4096)
    usual = {"tokens": 8, "depth": 128, "rows": 1, "chains": 2, "parts": 4, "stages": 4}
    monkeypatch.setattr(
        mosaic_config, "_recorded", lambda: {"NVIDIA H200": {some.key: usual | change}}
    )
    assert best_known(some, "NVIDIA H200") is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(8, 128, 2, 1, 1, 4), "192 rows of the matrix are no multiple of 128"),
        (Config(8, 128, 1, 4, 3, 4), "512 columns are no 3 parts of 4 times 128"),
        (Config(8, 128, 1, 2, 1, 3), "3 stages are no multiple of 2 chains"),
        (Config(32, 128, 1, 1, 1, 20), "bytes of shared memory are more than there are"),
    ],
)
def test_a_configuration_that_does_not_fit_is_declined(config: Config, reason: str):
    assert reason in str(problem(8, 192, 512, "int8").why_not(config))
    wide = replace(problem(8, 192, 576, "int4"), groups=3)
    assert wide.why_not(Config(8, 64, 1, 1, 1, 2)) is None
    assert wide.why_not(Config(8, 576, 1, 1, 1, 1)) is None
    assert "do not fit each other" in str(
        replace(wide, groups=6).why_not(Config(8, 64, 1, 1, 1, 2))
    )


def test_what_the_kernel_was_not_written_for_is_declined():
    def declined(x: Any, matrix: Any, **options: Any) -> str:
        with interpreted(), pytest.raises(ExceptionGroup) as caught:
            quantized_matmul(x, matrix, implementation="mosaic", **options)
        return str(caught.value.exceptions[0])

    x = jnp.ones((2, 128), jnp.bfloat16)
    matrix = jax.tree.map(jnp.asarray, quantized(np.ones((64, 128), np.float32), "int8"))
    assert "must be repacked at load, see for_gpu" in declined(x, matrix)
    repacked = for_gpu(matrix)
    many = jnp.ones((MOST_ROWS + 1, 128), jnp.bfloat16)
    assert f"by more than {MOST_ROWS} rows, and by none; there are 513" in declined(many, repacked)
    assert "there are 0" in declined(many[:0], repacked)
    assert declined(x, jnp.ones((64, 128))) == "the matrix is not quantized, and XLA multiplies it"
    wide = declined(x.astype(jnp.float32), repacked)
    assert wide == "activations are bfloat16 or float16, got float32"
    assert declined(x, repacked, dtype=jnp.int32).endswith("float16, got int32")
    odd = for_gpu(jax.tree.map(jnp.asarray, quantized(np.ones((60, 128), np.float32), "int8")))
    assert declined(x, odd) == "60 rows of the matrix are no multiple of 64"
    short = for_gpu(jax.tree.map(jnp.asarray, quantized(np.ones((64, 96), np.float32), "int8")))
    assert "96 columns are no 1 parts of 1 times 64" in declined(x[:, :96], short)
    with pytest.raises(ExceptionGroup) as caught:
        quantized_matmul(x, repacked, implementation="mosaic")
    assert "this program is for cpu" in str(caught.value.exceptions[0])
    with pytest.raises(ValueError, match=r"scales are \[64, 3\], and values \[64, 128\] of int8"):
        quantized_matmul(x, replace(repacked, scale=jnp.ones((3, 64), jnp.float16)))
