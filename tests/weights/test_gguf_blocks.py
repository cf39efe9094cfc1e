"""GGUF's blocks taken apart: the numbers of the ``gguf`` package, or as near as is promised."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from jaxserve.errors import CheckpointError
from pallas_kernels.quantized_matmul import Quantized, dequantized, quantized_matmul
from tests.weights.test_gguf import one_tensor

TENSOR = "model.embed_tokens.weight"


def blocks(kind: Kind, rows: int, count: int, seed: int = 1) -> np.ndarray:
    """Random blocks with finite float16 scales: the top bits of their bytes are clear."""
    size = GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, count, size), np.uint8)
    raw[..., :4] &= 63
    return raw.reshape(rows, count * size)


@pytest.mark.parametrize(("first", "last"), [(0, 16), (3, 11), (8, 16), (1, 2)])
@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q4_K"])
def test_a_box_has_the_numbers_of_the_blocks(
    name: str, first: int, last: int, tmp_path: Path
) -> None:
    """Q4_K's scales and minima are products, rounded to float16: by 2**-11 of each at most."""
    kind = Kind[name]
    raw = blocks(kind, 48, 512 // GGML_QUANT_SIZES[kind][0])
    with closing(one_tensor(tmp_path / "m.gguf", raw, kind)) as checkpoint:
        format = checkpoint.stored_format(TENSOR)
        assert checkpoint.stored_as(TENSOR) == name
        assert checkpoint.read_order(TENSOR) is None
        width, rows = (32 if format == "int8" else 16), slice(5, 9)
        values = checkpoint.read_stored(
            TENSOR, "values", (rows, slice(first * width, last * width))
        )
        groups = (rows, slice(first, last))
        scale = checkpoint.read_stored(TENSOR, "scale", groups)
        minimum = None
        if format == "int4":
            minimum = checkpoint.read_stored(TENSOR, "minimum", groups)
    box = Quantized(values, scale, minimum)
    quantized_matmul(jnp.ones((1, box.shape[-1])), box)  # Checks that its arrays belong together.
    found = np.asarray(dequantized(box, jnp.float32), np.float64)
    expected = dequantize(raw, kind)[rows, 32 * first : 32 * last].astype(np.float64)
    if name != "Q4_K":
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        return
    spread = np.abs(np.asarray(scale, np.float64)).repeat(32, axis=-1) * 15
    most = spread + np.abs(np.asarray(minimum, np.float64)).repeat(32, axis=-1)
    assert (np.abs(found - expected) <= 2**-11 * most * 1.001 + 2**-24).all()
    assert (np.abs(found - expected) <= 2**-11 * most * 1.001).mean() > 0.99


@pytest.mark.parametrize("name", ["Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K"])
def test_other_blocks_are_widened(name: str, tmp_path: Path) -> None:
    kind = Kind[name]
    raw = blocks(kind, 48, 512 // GGML_QUANT_SIZES[kind][0]) & 63
    with closing(one_tensor(tmp_path / "m.gguf", raw, kind)) as checkpoint:
        assert checkpoint.stored_format(TENSOR) is None
        assert checkpoint.stored_as(TENSOR) == name
        np.testing.assert_array_equal(checkpoint.read(TENSOR), dequantize(raw, kind))


def spoilt(name: str, at: int, number: float, six_bits: int = 0) -> np.ndarray:
    """Blocks with one float16 of the third row's second block replaced, and Q4_K's bytes of six."""
    kind = Kind[name]
    raw = blocks(kind, 48, 512 // GGML_QUANT_SIZES[kind][0])
    block = raw.reshape(48, -1, GGML_QUANT_SIZES[kind][1])[2, 1]
    block[at : at + 2] = np.asarray([number], np.float16).view(np.uint8)
    if name == "Q4_K":
        block[4:16] = six_bits
    return raw


DAMAGED = (
    *((name, "scale", 0) for name in ("Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q4_K")),
    *(("Q4_0", "minimum", 0), ("Q4_1", "minimum", 2), ("Q4_K", "minimum", 2)),
)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "array", "at"), DAMAGED)
def test_a_block_that_is_not_finite_is_refused(
    name: str, array: str, at: int, number: float, tmp_path: Path
) -> None:
    with closing(one_tensor(tmp_path / "m.gguf", spoilt(name, at, number), Kind[name])) as file:
        groups = file.shape(TENSOR)[-1] // 32
        said = f"'token_embd.weight' has a block whose {array} is {number}, so .*; fetch it again"
        with pytest.raises(CheckpointError, match=said):
            file.read_stored(TENSOR, array, (slice(2, 3), slice(0, groups)))
        # What is not read is not looked at.
        file.read_stored(TENSOR, array, (slice(3, 48), slice(0, groups)))


@pytest.mark.parametrize(
    ("name", "array", "at", "number"),
    [
        ("Q4_0", "minimum", 0, 8192),
        ("Q4_0", "minimum", 0, -8192),
        ("Q4_K", "scale", 0, 1040),
        ("Q4_K", "minimum", 2, 1040),
    ],
)
def test_a_product_beyond_float16_is_refused_with_the_remedy(
    name: str, array: str, at: int, number: float, tmp_path: Path
) -> None:
    """Blocks of sound numbers: widened, as the remedy has it, they are what they are."""
    raw = spoilt(name, at, number, six_bits=255)
    with closing(one_tensor(tmp_path / "m.gguf", raw, Kind[name])) as file:
        groups = file.shape(TENSOR)[-1] // 32
        said = f"whose {array} is beyond float16, which ends at 65504; give --quantization none"
        with pytest.raises(CheckpointError, match=said):
            file.read_stored(TENSOR, array, (slice(0, 48), slice(0, groups)))
        assert np.isfinite(file.read(TENSOR)).all()


def test_products_that_float16_just_holds_are_kept(tmp_path: Path) -> None:
    raw = spoilt("Q4_0", 0, 8184)
    with closing(one_tensor(tmp_path / "m.gguf", raw, Kind.Q4_0)) as file:
        minimum = file.read_stored(TENSOR, "minimum", (slice(2, 3), slice(1, 2)))
    assert minimum == -65472
