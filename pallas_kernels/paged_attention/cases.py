"""Shapes of paged attention that matter, and where each comes from.

Tests walk ``CASES`` and compare implementations; ``bench/kernels.py`` walks ``SERVING`` and
measures them. A case is head counts, a page size and a list of rows; its arrays are the worst that
the contract allows: pages scattered over the pool, and every cell that no row may see holding NaN,
an infinity or a huge number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.pool import NULL_PAGE, Pools, pool_shape

LAYERS = 2
LAYER = 1
"""The layer that a case attends in: not the first, so that a lost layer offset shows."""


class Inputs(NamedTuple):
    """The positional arguments of ``paged_attention``."""

    q: Float[Array, "B T N H"]
    pools: Pools
    table: Int[Array, "B W"]
    start: Int[Array, " B"]
    length: Int[Array, " B"]


class Row(NamedTuple):
    """One row of a step."""

    start: int
    """Context tokens before this step."""
    length: int
    """New tokens; 0 for a padding row."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one step."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    table_width: int
    query_tokens: int
    rows: tuple[Row, ...]
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    is_ragged: bool = False
    """Rows share places; see ``share_places``."""

    def __str__(self) -> str:
        """The name, as a test's id."""
        return self.name

    @property
    def scale(self) -> float:
        """The usual scale of the scores."""
        return self.head_dim**-0.5

    def pages_of(self, row: Row) -> int:
        """Pages that hold a row's context and its new tokens."""
        return -(-(row.start + row.length) // self.page_tokens) if row.length else 0

    def arrays(self, *, seed: int, dtype: DTypeLike, spare_pages: int = 1) -> Inputs:
        """Draws the arrays of this case; the same ones for the same seed."""
        rng = np.random.default_rng(seed)
        pages = 1 + sum(map(self.pages_of, self.rows)) + spare_pages
        shape = pool_shape(
            layers=LAYERS,
            pages=pages,
            kv_heads=self.kv_heads,
            page_tokens=self.page_tokens,
            head_dim=self.head_dim,
        )
        table = np.full((len(self.rows), self.table_width), NULL_PAGE, np.int32)
        free = iter(rng.permutation(np.arange(1, pages)))
        unseen = np.ones((shape[0], self.page_tokens), bool)
        for b, row in enumerate(self.rows):
            for entry in range(self.pages_of(row)):
                table[b, entry] = next(free)
                used = min(row.start + row.length - entry * self.page_tokens, self.page_tokens)
                unseen[LAYER * pages + table[b, entry], :used] = False

        def draw() -> Array:
            cells = rng.standard_normal(shape, np.float32)
            poison = rng.choice(np.array([np.nan, np.inf, -np.inf, 3e4, -3e4], np.float32), shape)
            return jnp.asarray(np.where(unseen[:, None, :, None], poison, cells), dtype)

        q_shape = (len(self.rows), self.query_tokens, self.q_heads, self.head_dim)
        return Inputs(
            q=jnp.asarray(rng.standard_normal(q_shape, np.float32), dtype),
            pools=Pools(k=draw(), v=draw(), pages=pages),
            table=jnp.asarray(table),
            start=jnp.asarray([row.start for row in self.rows], jnp.int32),
            length=jnp.asarray([row.length for row in self.rows], jnp.int32),
        )


def share_pages(inputs: Inputs, rows: Sequence[int], pages: int) -> Inputs:
    """The same with the first pages of the first of some rows in the tables of all of them."""
    table = np.array(inputs.table)
    table[rows, :pages] = table[rows[0], :pages]
    return inputs._replace(table=jnp.asarray(table))


def share_places(inputs: Inputs, gap: int = 1) -> tuple[Inputs, Int[Array, " B"]]:
    """The same rows among places that they share, the last row first, and where each begins.

    So many places of nobody stand before each row and behind the last; their queries are NaN.
    """
    q, lengths = np.asarray(inputs.q), np.asarray(inputs.length)
    first = np.zeros(len(lengths), np.int32)
    places = [np.full_like(q[0, :1], np.nan).repeat(gap, axis=0)]
    end = gap
    for b in reversed(range(len(lengths))):
        first[b] = end
        places += [q[b, : lengths[b]], places[0]]
        end += int(lengths[b]) + gap
    shared = jnp.asarray(np.concatenate(places)[None], inputs.q.dtype)
    return inputs._replace(q=shared), jnp.asarray(first)


def _decode(*context: int) -> tuple[Row, ...]:
    """One new token per row; a context of 0 is a padding row."""
    return tuple(Row(tokens - 1, 1) if tokens else Row(0, 0) for tokens in context)


CASES = (
    Case(
        name="smollm2-decode",  # Grouped heads; contexts on both sides of page and block edges.
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        page_tokens=32,
        table_width=24,
        query_tokens=1,
        rows=_decode(1, 32, 33, 255, 256, 257, 700, 0),
    ),
    Case(
        name="smollm2-chunk",  # Prompt chunks of unlike lengths, a decoding row, padding.
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        page_tokens=32,
        table_width=20,
        query_tokens=24,
        rows=(Row(0, 24), Row(250, 13), Row(511, 1), Row(0, 0)),
    ),
    Case(
        name="phi3-mini-decode",  # As many key heads as query heads; size 96.
        q_heads=32,
        kv_heads=32,
        head_dim=96,
        page_tokens=16,
        table_width=21,  # 336 tokens: the last block is wider than what is left of the table.
        query_tokens=1,
        rows=_decode(336, 5),
    ),
    Case(
        name="gemma3-270m-local",  # One key/value head, head size 256, window inside one block.
        q_heads=4,
        kv_heads=1,
        head_dim=256,
        page_tokens=16,
        table_width=48,
        query_tokens=8,
        rows=(Row(0, 8), Row(600, 8), Row(300, 3), Row(0, 0)),
        window=100,
    ),
    Case(
        name="gemma2-softcap",  # Caps its scores; a window that spans several blocks.
        q_heads=8,
        kv_heads=4,
        head_dim=256,
        page_tokens=64,
        table_width=17,
        query_tokens=2,
        rows=(Row(1000, 2), Row(3, 2)),
        window=512,
        softcap=50.0,
    ),
    Case(
        name="llama3-70b-shard",  # What one of eight devices sees: eight query heads, one key head.
        q_heads=8,
        kv_heads=1,
        head_dim=128,
        page_tokens=64,
        table_width=5,
        query_tokens=1,
        rows=_decode(300, 64, 65),
    ),
    Case(
        name="odd-pages",  # A page that neither divides a block nor is divided by one.
        q_heads=4,
        kv_heads=2,
        head_dim=64,
        page_tokens=48,
        table_width=13,
        query_tokens=5,
        rows=(Row(238, 5), Row(240, 5), Row(600, 4)),
    ),
    Case(
        name="page-over-block",  # A page wider than a block.
        q_heads=2,
        kv_heads=2,
        head_dim=64,
        page_tokens=320,
        table_width=3,
        query_tokens=3,
        rows=(Row(318, 3), Row(900, 3)),
    ),
    Case(
        name="tiny",  # The model of the engine's tests: less than one block in all.
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        page_tokens=8,
        table_width=3,
        query_tokens=4,
        rows=(Row(20, 4), Row(0, 1)),
    ),
)

SERVING = tuple(
    Case(
        name=f"{model}-{kind}",
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        page_tokens=32,
        table_width=width,
        query_tokens=query_tokens,
        rows=rows,
    )
    for model, heads in {"smollm2": (9, 3, 64), "llama3-8b-quarter": (8, 2, 128)}.items()
    for kind, width, query_tokens, rows in (
        ("decode-1-at-1024", 256, 1, _decode(1024)),
        ("decode-64-at-384", 256, 1, _decode(*[384] * 64)),
        ("chunk-512-at-4096", 256, 512, (Row(3584, 512),)),
    )
)
"""Steps of a server under load: one stream, a full batch, the last chunk of a long prompt."""


def _gpu(
    name: str,
    heads: tuple[int, int, int],
    page_tokens: int,
    rows: tuple[Row, ...],
    *,
    window: int = 0,
    softcap: float = 0.0,
    has_sinks: bool = False,
    is_ragged: bool = False,
) -> Case:
    """A case that the interpreter of GPU kernels runs in seconds; a table of six pages or more."""
    q_heads, kv_heads, head_dim = heads
    longest = max(row.start + row.length for row in rows)
    return Case(
        name=name,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        table_width=max(-(-longest // page_tokens) + 1, 6),
        query_tokens=max(row.length for row in rows),
        rows=rows,
        window=window,
        softcap=softcap,
        has_sinks=has_sinks,
        is_ragged=is_ragged,
    )


INTERPRETED = (
    # Every pair of kind, head_dim, page, heads and option is in one of them at least.
    _gpu("decode-64-page64", (4, 2, 64), 64, _decode(301, 1, 0, 64)),
    _gpu("decode-64-page16-window", (9, 3, 64), 16, _decode(90, 17, 16), window=33),
    _gpu("decode-96-page32-mha", (2, 2, 96), 32, _decode(160, 0, 33)),
    _gpu("decode-96-page64-sinks", (4, 1, 96), 64, _decode(65, 200), has_sinks=True),
    _gpu("decode-128-page128-softcap", (8, 1, 128), 128, _decode(130, 700), softcap=30.0),
    _gpu("decode-128-page64-mqa", (16, 1, 128), 64, _decode(384, 63)),
    _gpu("decode-128-page16-all", (6, 2, 128), 16, _decode(96, 5), window=40, softcap=20.0),
    _gpu("decode-256-page32-window", (4, 1, 256), 32, _decode(190, 31, 0), window=70),
    _gpu("decode-256-page64-sinks", (4, 2, 256), 64, _decode(129, 64), has_sinks=True),
    _gpu("decode-64-page64-pieces", (2, 1, 64), 64, _decode(1100, 513, 512), has_sinks=True),
    _gpu("decode-64-page32-wide-group", (72, 1, 64), 32, _decode(100, 32)),
    _gpu("chunk-64-page64", (4, 2, 64), 64, (Row(0, 70), Row(250, 13), Row(0, 0))),
    _gpu("chunk-64-page16-softcap", (3, 1, 64), 16, (Row(0, 20), Row(70, 9)), softcap=25.0),
    _gpu("chunk-96-page128-window", (4, 2, 96), 128, (Row(300, 9), Row(0, 40)), window=90),
    _gpu("chunk-128-page32-sinks", (8, 2, 128), 32, (Row(96, 40), Row(0, 1)), has_sinks=True),
    _gpu("chunk-256-page64", (2, 1, 256), 64, (Row(100, 30), Row(0, 64))),
    _gpu(
        "ragged-64-page32",
        (9, 3, 64),
        32,
        (Row(0, 24), Row(180, 1), Row(0, 0), Row(31, 50)),
        is_ragged=True,
    ),
    _gpu(
        "ragged-96-page16", (2, 1, 96), 16, (Row(40, 30), Row(95, 1)), is_ragged=True, softcap=20.0
    ),
    _gpu(
        "ragged-128-page64-window",
        (4, 1, 128),
        64,
        (Row(200, 33), Row(0, 5), Row(383, 1)),
        is_ragged=True,
        window=64,
    ),
    _gpu(
        "ragged-128-page128-sinks",
        (8, 2, 128),
        128,
        (Row(0, 50), Row(500, 1)),
        is_ragged=True,
        has_sinks=True,
    ),
    _gpu(
        "ragged-256-page16", (4, 1, 256), 16, (Row(17, 20), Row(64, 1)), is_ragged=True, window=24
    ),
)
"""Run by the interpreter of GPU kernels: contexts of a few pages, padding rows among them."""

APPENDED = (
    # A first slot, a last one, a full page, empty rows; lines of a token beyond one tile of 64.
    _gpu("append-64-page16", (4, 2, 64), 16, _decode(33, 1, 0, 16)),
    _gpu("append-128-page64", (8, 2, 128), 64, _decode(64, 65)),
    _gpu("append-96-page32-mha", (3, 3, 96), 32, _decode(40, 0, 32)),
    _gpu("append-256-page16-mqa", (2, 1, 256), 16, _decode(17, 5)),
    _gpu("append-64-page8-odd", (9, 3, 64), 8, _decode(9, 40)),
    _gpu("append-64-page16-wide", (72, 1, 64), 16, _decode(20, 3)),
    _gpu("append-64-page16-chunk", (4, 2, 64), 16, (Row(10, 9), Row(0, 16), Row(0, 0))),
    _gpu(
        "append-128-page16-ragged",
        (4, 2, 128),
        16,
        (Row(14, 4), Row(0, 1), Row(0, 0), Row(31, 5)),
        is_ragged=True,
    ),
)
"""Of ``rope_append``."""
