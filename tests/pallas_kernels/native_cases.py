"""Writes cases with the reference's answers for ``native_check.cc``, which runs without Python.

    python -m tests.pallas_kernels.native_cases FILE

For each case a line of text: name, then every number that ``Header`` in the program reads. After
it the arrays, little-endian and without gaps: both pools, q, table, start, length, the answer, and
of pages with scales both of these. A product begins with ``matmul``; its arrays are x, those of the
matrix, the answer, and two sums that an error may be a fraction of: of the products' sizes, and of
the same with every activation as large as the largest of its group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import FORMATS as PAGE_FORMATS
from pallas_kernels.paged_attention import IMPLEMENTATIONS, POOL_DTYPES
from pallas_kernels.paged_attention.cases import (
    CASES,
    LAYER,
    LAYERS,
    Case,
    Inputs,
    Row,
    share_pages,
)
from pallas_kernels.quantized_attention.cases import arrays
from pallas_kernels.quantized_matmul import (
    GROUP,
    Quantized,
    dequantized,
    feed_forward,
    quantized_matmul,
)
from pallas_kernels.quantized_matmul import cases as matmul
from pallas_kernels.quantized_matmul.ffn import ACTIVATIONS

DTYPES = (*POOL_DTYPES, *PAGE_FORMATS)
"""Of pages, by the numbers that the program knows them by."""
BY_NAME = {case.name: case for case in CASES}


def sanitized() -> Iterator[Case]:
    """Every case, and what is odd enough to be read past its end."""
    yield from CASES
    tiny, chunk = BY_NAME["tiny"], BY_NAME["smollm2-chunk"]
    yield replace(tiny, name="padding-only", rows=(Row(0, 0),) * 3)
    # Enough tiles that a thread takes all heads of one, and asks for the next head's keys.
    many = tuple(Row(7 * row, 1) for row in range(20))
    for name, head_dim, window in (("many", 64, 0), ("many-windows", 80, 50)):
        decode = BY_NAME["smollm2-decode"]
        pages = {"head_dim": head_dim, "window": window, "rows": many}
        yield replace(decode, name=name, **pages)
    sharing = tuple(Row(tokens, 1) for tokens in (300, 255, 256, 299, 511, 520, 7, 90))
    yield replace(BY_NAME["smollm2-decode"], name="sharing", rows=sharing)
    yield replace(tiny, name="one-token-pages", page_tokens=1, table_width=24, window=5)
    yield replace(tiny, name="full-table", rows=(Row(20, 4), Row(23, 1)))
    yield replace(chunk, name="head-dim-80", head_dim=80, q_heads=6, page_tokens=7, table_width=80)
    yield replace(
        chunk, name="cut", rows=(Row(1400, 24),), table_width=45, window=900, softcap=30.0
    )


def inputs_of(case: Case, dtype: str) -> Inputs:
    """The arrays of a case; queries of pages with scales are float32."""
    if (format := PAGE_FORMATS.get(dtype)) is not None:
        inputs = arrays(case, seed=0, format=format)
    else:
        inputs = case.arrays(seed=0, dtype=dtype)
    return share_pages(inputs, range(6), 8) if case.name == "sharing" else inputs


def write(path: Path) -> None:
    """Writes every case in every dtype."""
    with path.open("wb") as file:
        for case in sanitized():
            for number, dtype in enumerate(DTYPES):
                inputs = inputs_of(case, dtype)
                # The implementation by itself: queries of int4 pages are rotated by the public one.
                answer = IMPLEMENTATIONS["reference"](
                    *inputs,
                    layer=LAYER,
                    scale=case.scale,
                    window=case.window,
                    softcap=case.softcap,
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


# -- products --------------------------------------------------------------------------------------

NUMBERS = ("float32", "bfloat16", "float16")
"""In the order of ``Number`` in number.h."""
FORMATS = ("number", "int8", "int4")
"""In the order of ``Format`` in kernel.h."""
ROUNDED = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
)
"""Dtypes of activations and of the answer, beside float32 for both."""
FAR_LAYER = 9
"""Not in a stack: the last one is meant."""

ODD = (
    matmul.Case("no-rows", 0, 5, 64),
    matmul.Case("no-outputs", 3, 0, 64),
    matmul.Case("one-group", 3, 9, 32),
    matmul.Case("one-row", 1, 13, 32),  # Eight outputs at a time, then four, then one.
    matmul.Case("one-number", 1, 1, 32),
    matmul.Case("half-a-group", 7, 6, 16),  # Plain numbers alone.
    matmul.Case("group-and-a-half", 2, 7, 48),
    matmul.Case("scales-and-one", 2, 5, 2080),  # 64 scales are converted at a time.
    matmul.Case("panels-and-some", 9, 53, 4096),  # Panels of 24 rows.
    matmul.Case("small-panels-and-some", 6, 197, 512),  # Of 12, several at a time.
    matmul.Case("widest-panels-and-some", 13, 195, 224),  # Of 64.
    matmul.Case("vocabulary", 13, 1101, 32),  # Several panels for each of two threads.
)
"""What is odd enough to be read, or written, past its end."""


def products() -> Iterator[tuple[matmul.Case, matmul.Storage, str, str]]:
    """Every case and every odd one in every format, with the dtypes of activations and answer."""
    for case in (*matmul.CASES, *ODD):
        for storage in matmul.STORAGES:
            if storage in FORMATS and case.depth % GROUP:
                continue
            yield case, storage, "float32", "float32"
            if case in ODD or case.name == "chunk":
                for dtype, out_dtype in ROUNDED:
                    yield case, storage, dtype, out_dtype


def append_products(path: Path) -> None:
    """Writes the products behind the other cases."""
    with path.open("ab") as file:
        for case, storage, dtype, out_dtype in products():
            x, stack = case.arrays(storage, dtype=dtype)
            answer = quantized_matmul(
                x, stack, layer=matmul.LAYER, dtype=jnp.float32, implementation="reference"
            )
            matrix = dequantized(stack[matmul.LAYER], jnp.float32)
            weights = np.abs(np.asarray(matrix, np.float64)).T
            x_sizes = np.abs(np.asarray(x, np.float64))
            sizes, spreads = x_sizes @ weights, largest_of_group(x_sizes) @ weights
            is_plain = not isinstance(stack, Quantized)
            header = (
                "matmul", f"{case.name}-{storage}-{dtype}-{out_dtype}", NUMBERS.index(dtype),
                NUMBERS.index(out_dtype), FORMATS.index("number" if is_plain else storage),
                NUMBERS.index(storage if is_plain else "float32"), matmul.LAYERS,
                FAR_LAYER if case in ODD else matmul.LAYER, case.rows, case.out, case.depth,
            )  # fmt: skip
            file.write((" ".join(map(str, header)) + "\n").encode())
            fractions = (sizes.astype(np.float32), spreads.astype(np.float32))
            for array in (x, *jax.tree.leaves(stack), answer, *fractions):
                file.write(np.asarray(array).tobytes())


type FeedForward = tuple[int, int, int, int, matmul.Storage, matmul.Storage]
FEED_FORWARDS: tuple[FeedForward, ...] = (
    # Rows, depth, hidden numbers, outputs, and how the matrices are stored.
    (1, 64, 96, 33, "int8", "int8"),
    (7, 32, 64, 13, "int4", "int8"),
    (6, 96, 1536, 64, "int4", "int4"),
    (9, 48, 80, 21, "bfloat16", "bfloat16"),  # The last piece is half as long.
    (3, 512, 48, 5, "float32", "float32"),  # Two panels to a piece.
    (5, 64, 32, 7, "float32", "int8"),
    (5, 64, 32, 7, "int8", "float16"),
    (0, 64, 32, 7, "int8", "int8"),
)


def append_feed_forwards(path: Path) -> None:
    """Writes some feed-forwards behind the products, in both activations."""
    with path.open("ab") as file:
        for activation, name in enumerate(ACTIVATIONS):
            for rows, depth, hidden, out, first, second in FEED_FORWARDS:
                dtype = "bfloat16" if rows == 9 else "float32"
                gate_up = matmul.Case("", rows, 2 * hidden, depth).arrays(first, dtype=dtype)
                x, stacks = gate_up[0], [gate_up[1]]
                stacks.append(matmul.Case("", 0, out, hidden).arrays(second)[1])
                answer = feed_forward(
                    x.astype(jnp.float32), *stacks, layer=matmul.LAYER, activation=name,
                    implementation="reference",
                )  # fmt: skip
                number = NUMBERS.index(dtype)
                stored = (*stored_as(first), *stored_as(second))
                header = (
                    "feed-forward", f"{rows}x{depth}x{hidden}x{out}-{name}", number, number,
                    activation, *stored, rows, depth, hidden, out,
                )  # fmt: skip
                file.write((" ".join(map(str, header)) + "\n").encode())
                for array in (x, *jax.tree.leaves(stacks), answer):
                    file.write(np.asarray(array).tobytes())


def stored_as(storage: matmul.Storage) -> tuple[int, int, int, int]:
    """A stack's fields of a header: format, number, layers, and the layer that is meant."""
    is_plain = storage not in FORMATS
    return (
        FORMATS.index("number" if is_plain else storage),
        NUMBERS.index(storage if is_plain else "float32"),
        matmul.LAYERS,
        matmul.LAYER,
    )


def largest_of_group(x: np.ndarray) -> np.ndarray:
    """Every number as large as the largest of its group; the last group may be a part."""
    first_of_group = np.arange(0, x.shape[-1], GROUP)
    largest = np.maximum.reduceat(x, first_of_group, axis=-1)
    return largest.repeat(GROUP, axis=-1)[:, : x.shape[-1]]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    append_products(Path(sys.argv[1]))
    append_feed_forwards(Path(sys.argv[1]))
