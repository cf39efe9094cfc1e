"""Blocks of a GGUF file taken apart into the arrays of ``Quantized`` (ggml-common.h).

A type is here if int8 or int4 in groups of 32 has its numbers. Those of Q8_0, Q5_0, Q4_0 and Q4_1
are the same numbers. Q4_K's scales and minima are products of a float16 and six bits, and are
rounded to float16 here: each by at most 2**-11 of itself. Q5_1 and Q5_K would need int8 with a
minimum, and Q6_K, Q3_K and Q2_K have scales for 16 values; they are widened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType

if TYPE_CHECKING:  # Reading a tokenizer needs no JAX.
    from pallas_kernels.quantized_matmul import Format

GROUP = 32
"""Values with a scale; those of ``Quantized`` are as many where nothing else is said."""


@dataclass(frozen=True)
class Blocks:
    """How one type's blocks are taken apart."""

    format: Format
    size: int
    """Bytes of a block."""
    values: Callable[[np.ndarray], np.ndarray]
    """Blocks ``[..., size]``, uint8, to values ``[..., entries]``."""
    scale: Callable[[np.ndarray], np.ndarray]
    """Likewise to float16, one for each 32 values."""
    minimum: Callable[[np.ndarray], np.ndarray] | None = None
    minimum_at: int = 0
    """The byte where the float16 begins that minima are made of; that of scales begins a block."""
    groups: int = 1
    """Of a block."""

    def entries(self, array: str) -> int:
        """Of one of the arrays of ``Quantized``, for each block."""
        each = GROUP if self.format == "int8" else GROUP // 2
        return self.groups * (each if array == "values" else 1)

    def take(self, blocks: np.ndarray, array: str) -> np.ndarray:
        """Takes one array out of blocks, uint8 ``[..., size]``."""
        return getattr(self, array)(blocks)

    def stored(self, blocks: np.ndarray, array: str) -> np.ndarray:
        """Takes the float16 that a block's scales, or minima, are made of: ``[..., 1]``."""
        return _float16(0 if array == "scale" else self.minimum_at)(blocks)


def _float16(at: int) -> Callable[[np.ndarray], np.ndarray]:
    """Takes the float16 that begins at a byte."""

    def take(blocks: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)

    return take


def _bytes(at: int) -> Callable[[np.ndarray], np.ndarray]:
    """Takes what ends a block, from a byte on."""
    return lambda blocks: np.ascontiguousarray(blocks[..., at:])


def _q8_0_values(blocks: np.ndarray) -> np.ndarray:
    return _bytes(2)(blocks).view(np.int8)


def _q5_0_values(blocks: np.ndarray) -> np.ndarray:
    """Four bits as in Q4_0, and the fifth of value ``j`` in bit ``j`` of an int32; from -16."""
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    pairs = blocks[..., 6:]
    low = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
    return (low | fifth << 4).view(np.int8) - np.int8(16)


def _q4_0_minimum(blocks: np.ndarray) -> np.ndarray:
    """Values are counted from -8."""
    with np.errstate(over="ignore"):
        return _float16(0)(blocks) * np.float16(-8)


def _q4_k_values(blocks: np.ndarray) -> np.ndarray:
    """Each 32 bytes hold one group in their lower halves and the next in their upper."""
    quads = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 1, 32)
    groups = np.concatenate([quads & 15, quads >> 4], axis=-2)
    pairs = groups[..., :16] | groups[..., 16:] << 4
    return pairs.reshape(*blocks.shape[:-1], 128)


def _q4_k_factors(at: int) -> Callable[[np.ndarray], np.ndarray]:
    """The eight scales (``at`` 0) or minima (``at`` 2) of six bits, times their float16."""

    def take(blocks: np.ndarray) -> np.ndarray:
        packed = blocks[..., 4:16]
        scales, minima, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        if at == 0:
            first, last = scales, rest & 15 | scales >> 6 << 4
        else:
            first, last = minima, rest >> 4 | minima >> 6 << 4
        six_bits = np.concatenate([first & 63, last], axis=-1).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            product = _float16(at)(blocks).astype(np.float32) * six_bits
            return (product if at == 0 else -product).astype(np.float16)

    return take


BLOCKS = {
    GGMLQuantizationType.Q8_0: Blocks("int8", 34, _q8_0_values, _float16(0)),
    GGMLQuantizationType.Q5_0: Blocks("int8", 22, _q5_0_values, _float16(0)),
    GGMLQuantizationType.Q4_0: Blocks("int4", 18, _bytes(2), _float16(0), _q4_0_minimum),
    GGMLQuantizationType.Q4_1: Blocks(
        *("int4", 20, _bytes(4), _float16(0), _float16(2)),
        minimum_at=2,
    ),
    GGMLQuantizationType.Q4_K: Blocks(
        *("int4", 144, _q4_k_values, _q4_k_factors(0), _q4_k_factors(2)),
        minimum_at=2,
        groups=8,
    ),
}
"""Scales and minima may come out infinite, of a block that says so or beyond float16: whoever takes
them looks."""
