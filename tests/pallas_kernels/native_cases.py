"""Writes cases with the reference's answers for ``native_check.cc``, which runs without Python.

    python -m tests.pallas_kernels.native_cases FILE

For each case a line of text: name, then every number that ``Header`` in the program reads. After
it the arrays, little-endian and without gaps: both pools, q, table, start, length, the answer, and
of int8 pools both scales.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import POOL_DTYPES, paged_attention
from pallas_kernels.paged_attention.cases import CASES, LAYER, LAYERS, Case, Inputs, Row
from pallas_kernels.quantized_attention.cases import arrays

DTYPES = (*POOL_DTYPES, "int8")
"""Of pages, by the numbers that the program knows them by."""
BY_NAME = {case.name: case for case in CASES}


def sanitized() -> Iterator[Case]:
    """Every case, and what is odd enough to be read past its end."""
    yield from CASES
    tiny, chunk = BY_NAME["tiny"], BY_NAME["smollm2-chunk"]
    yield replace(tiny, name="padding-only", rows=(Row(0, 0),) * 3)
    yield replace(tiny, name="one-token-pages", page_tokens=1, table_width=24, window=5)
    yield replace(tiny, name="full-table", rows=(Row(20, 4), Row(23, 1)))
    yield replace(chunk, name="head-dim-80", head_dim=80, q_heads=6, page_tokens=7, table_width=80)
    yield replace(
        chunk, name="cut", rows=(Row(1400, 24),), table_width=45, window=900, softcap=30.0
    )


def inputs_of(case: Case, dtype: str) -> Inputs:
    """The arrays of a case; queries of int8 pages are float32."""
    if dtype == "int8":
        return arrays(case, seed=0)
    return case.arrays(seed=0, dtype=dtype)


def write(path: Path) -> None:
    """Writes every case in every dtype."""
    with path.open("wb") as file:
        for case in sanitized():
            for number, dtype in enumerate(DTYPES):
                inputs = inputs_of(case, dtype)
                answer = paged_attention(
                    *inputs,
                    layer=LAYER,
                    scale=case.scale,
                    window=case.window,
                    softcap=case.softcap,
                    implementation="reference",
                ).astype(jnp.float32)
                q, pools, *where = inputs
                header = (
                    f"{case.name}-{dtype}", number, LAYERS, pools.pages, case.kv_heads,
                    case.page_tokens, case.head_dim, len(case.rows), case.query_tokens,
                    case.table_width, LAYER, case.q_heads, case.window, case.scale, case.softcap,
                )  # fmt: skip
                file.write((" ".join(map(str, header)) + "\n").encode())
                scales = (pools.k_scale, pools.v_scale) if pools.has_scales else ()
                for array in (pools.k, pools.v, q, *where, answer, *scales):
                    file.write(np.asarray(array).tobytes())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
