"""What the tests of attention share, whatever the pages hold: cases, calls and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.paged_attention import NULL_PAGE
from pallas_kernels.paged_attention.cases import (
    CASES,
    LAYER,
    Case,
    Inputs,
    Row,
    share_pages,
    share_places,
)

from .dense_attention import dense_attention

TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}
"""By the dtype of queries; relative, and absolute for answers below 1. Both sides compute in
float32 in another order; the narrower dtypes then round once, so two answers may differ by one unit
in the last place. What int8 pages themselves lose is in the reference, too."""

BY_NAME = {case.name: case for case in CASES}
STATIC = ("scale", "softcap", "implementation")

SHARING_TOKENS = (700, 512, 513, 600, *range(530, 566), 0, 300, 256, 400, 257, 90, 700, 700, 255)
LONG = replace(
    BY_NAME["smollm2-chunk"],
    name="long",
    table_width=64,
    query_tokens=24,
    rows=tuple(Row(start, 24) for start in (0, 40, 239, 500, 1000, 1500, 1900, 2000)),
)
"""Rows of many parts: alone, one is cut over the threads; together, whole tiles are dealt out."""

SHARING = replace(
    BY_NAME["smollm2-decode"],
    name="sharing",
    # What rows share ends where they do, in the middle of a part, and before they do.
    rows=tuple(Row(tokens - 1, 1 if tokens else 0) for tokens in SHARING_TOKENS),
)
"""Decoding rows that may begin with the same pages."""

type Attend = Callable[..., np.ndarray]


def attend(
    compiled: Callable[..., jax.Array],
    case: Case,
    inputs: Inputs,
    implementation: str,
    *,
    window: int | None = None,
    first: jax.Array | None = None,
) -> np.ndarray:
    """One program per shape: layer and window are data, as they are in a scanned model."""
    out = compiled(
        *inputs,
        layer=jnp.int32(LAYER),
        scale=case.scale,
        window=jnp.int32(case.window if window is None else window),
        softcap=case.softcap,
        implementation=implementation,
        first=first,
    )
    return np.asarray(out.astype(jnp.float32))


def expect_sharing_to_change_no_bit(attend: Attend, inputs: Inputs) -> None:
    """Rows of ``SHARING`` with the same pages in front, and with copies of these pages."""
    shared = share_pages(inputs, range(40), 16)  # More rows than one tile takes.
    shared = share_pages(shared, range(41, 45), 8)
    shared = share_pages(shared, range(46, 48), 8)  # Too few rows to be computed together.
    pools = inputs.pools
    offset = LAYER * pools.pages
    own, first = np.asarray(inputs.table), np.asarray(shared.table)
    copied = jax.tree.map(
        lambda pool: pool.at[offset + own].set(pool[offset + first]) if pool.ndim > 1 else pool,
        pools,
    )
    apart = inputs._replace(pools=copied)
    together = attend(SHARING, shared._replace(pools=copied), "native")
    np.testing.assert_array_equal(together, attend(SHARING, apart, "native"))
    tolerance = 0.02 if inputs.q.dtype == jnp.bfloat16 else TOLERANCE["float32"]
    expected = attend(SHARING, apart, "reference")
    np.testing.assert_allclose(together, expected, rtol=tolerance, atol=tolerance)


def expect_ragged_rows_to_answer_alike(
    attend: Attend, case: Case, inputs: Inputs, implementation: str, *, tolerance: float
) -> None:
    """Rows among places that they share answer what they do in places of their own."""
    apart = attend(case, inputs, implementation)
    shared, first = share_places(inputs)
    together = attend(case, shared, implementation, first=first)[0]
    is_padding = np.ones(len(together), bool)
    for b, row in enumerate(case.rows):
        begin = int(first[b])
        own = slice(begin, begin + row.length)
        is_padding[own] = False
        np.testing.assert_allclose(
            together[own], apart[b, : row.length], rtol=tolerance, atol=tolerance
        )
    assert is_padding.sum() > len(case.rows)
    assert not together[is_padding].any(), "padding answers zero"


def appending(query_tokens: int) -> tuple[Case, int]:
    """A case whose last row runs past its table, once that is cut to the width returned."""
    rows = (Row(30, query_tokens), Row(0, 0), Row(3, 1), Row(639, query_tokens))
    case = replace(BY_NAME["smollm2-chunk"], query_tokens=query_tokens, rows=rows, table_width=27)
    return case, 20


def make_mesh(shape: tuple[int, int]) -> Mesh:
    """A mesh of data times tensor devices."""
    devices = np.array(jax.devices()[: shape[0] * shape[1]])
    return Mesh(devices.reshape(shape), ("data", "tensor"))


def expect_dense(
    case: Case,
    inputs: Inputs,
    k_pool: np.ndarray,
    v_pool: np.ndarray,
    answer: np.ndarray,
    sinks: np.ndarray | None = None,
) -> None:
    """Compares with an oracle that shares no line with the kernels: numpy, one sequence, no pages.

    The pools are what the pages of ``inputs`` stand for.
    """
    q = np.asarray(inputs.q)
    for b, row in enumerate(case.rows):
        end = row.start + row.length
        pages = np.asarray(inputs.table[b])
        k_SKH, v_SKH = (
            np.concatenate(
                [pool[LAYER * inputs.pools.pages + page].swapaxes(0, 1) for page in pages]
            )[:end]
            for pool in (k_pool, v_pool)
        )
        q_SNH = np.zeros((end, case.q_heads, case.head_dim))
        q_SNH[row.start :] = q[b, : row.length]
        options = {"scale": case.scale, "window": case.window, "softcap": case.softcap}
        expected = dense_attention(q_SNH, k_SKH, v_SKH, **options, sinks=sinks)[row.start :]
        np.testing.assert_allclose(answer[b, : row.length], expected, rtol=1e-5, atol=1e-5)
        assert not answer[b, row.length :].any(), "padding answers zero"


def expect_rows_alone(attend: Attend, case: Case, inputs: Inputs) -> None:
    """Compares each row of a native step with a step of that row only, bit for bit."""
    together = attend(case, inputs, "native")
    for b in range(len(case.rows)):
        row = slice(b, b + 1)
        alone = inputs._replace(
            q=inputs.q[row],
            table=inputs.table[row],
            start=inputs.start[row],
            length=inputs.length[row],
        )
        np.testing.assert_array_equal(attend(case, alone, "native")[0], together[b])


def expect_rows_alone_in_the_bucket(attend: Attend, case: Case, inputs: Inputs) -> None:
    """The same in plain XLA: the same bucket, the other rows padding.

    Their lengths move the loop's bounds, no more.
    """
    together = attend(case, inputs, "blocked")
    for b in range(len(case.rows)):
        alone = np.arange(len(case.rows)) == b
        masked = inputs._replace(
            table=jnp.where(alone[:, None], inputs.table, NULL_PAGE),
            start=jnp.where(alone, inputs.start, 0),
            length=jnp.where(alone, inputs.length, 0),
        )
        np.testing.assert_array_equal(attend(case, masked, "blocked")[b], together[b])


def expect_any_chunk(attend: Attend, case: Case, inputs: Inputs, chunk: int) -> None:
    """Compares a native step with the same queries in steps of ``chunk``, bit for bit."""
    whole = attend(case, inputs, "native")
    for first in range(0, case.query_tokens, chunk):
        real = min(chunk, case.query_tokens - first)
        q = jnp.zeros((len(case.rows), chunk, *inputs.q.shape[2:]), inputs.q.dtype)
        part = inputs._replace(
            q=q.at[:, :real].set(inputs.q[:, first : first + real]),
            start=inputs.start + first,
            length=jnp.full_like(inputs.length, real),
        )
        np.testing.assert_array_equal(
            attend(case, part, "native")[:, :real], whole[:, first : first + real]
        )
