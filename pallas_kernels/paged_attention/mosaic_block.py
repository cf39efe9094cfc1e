"""What one thread block of the GPU kernel of paged attention does; see ``mosaic_kernel.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels.mosaic import LINES, drain, product, release
from pallas_kernels.paged_attention import work
from pallas_kernels.paged_attention.mosaic_launch import Launch
from pallas_kernels.paged_attention.work import LOG2E, NOTHING

MASKED = -1e30
FLOOR = -1e20
"""Scores of invisible keys, and where the running maximum starts; see ``blocked.py``."""


@dataclass(frozen=True)
class Memory:
    """Every ref of a thread block, by name."""

    q: Any
    k: Any
    v: Any
    table: Any
    units: Any
    numbers: Any
    out: Any
    sums: Any
    q_sm: Any
    k_sm: Any
    v_sm: Any
    out_sm: Any
    sum_sm: Any
    q_here: Any
    q_free: Any
    k_here: Any
    v_here: Any
    free: Any
    together: Any = None
    k_scale: Any = None
    v_scale: Any = None
    k_scale_sm: Any = None
    v_scale_sm: Any = None
    k_wide: Any = None
    v_wide: Any = None


class _Visible(NamedTuple):
    """What the lines of a tile of queries see: keys from ``begin`` on, and before ``before``."""

    begin: Int32[Array, "*M"] | None
    before: Int32[Array, "*M"]
    all_begin: Int32[Array, ""]
    """From here on all lines see, as far as ``begin`` is concerned."""
    all_before: Int32[Array, ""]
    """Likewise, up to here."""


class _At(NamedTuple):
    """Where a warpgroup is."""

    unit: Int32[Array, ""]
    tile: Int32[Array, ""]
    """Of keys, from the start of the context."""
    slot: Int32[Array, ""]
    """Of the ring."""
    columns: Any
    """Of values, that are this warpgroup's."""


class Block:
    """One thread block's share of a launch."""

    def __init__(self, launch: Launch, memory: Memory) -> None:
        self.launch, self.memory, self.config = launch, memory, launch.config
        self.number = lax.axis_index("block")
        total = memory.numbers[0] * launch.kv_heads
        ahead = jnp.int32(self.config.blocks - 1)
        self.units = lax.div(jnp.maximum(total - self.number + ahead, 0), self.config.blocks)
        """So many units and key heads are this block's: its number, and every ``blocks``-th on."""

    def _unit(self, i: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """The unit of this block's i-th turn, and its key head."""
        turn = self.number + i * self.config.blocks
        return lax.div(turn, self.launch.kv_heads), lax.rem(turn, self.launch.kv_heads)

    def fetch(self) -> None:
        """Copies queries and pages into the rings, as far ahead as they have room."""
        memory, config = self.memory, self.config
        stages, query_stages = config.stages, config.query_stages

        def unit(i: Int32[Array, ""], fetched: Int32[Array, ""]) -> Int32[Array, ""]:
            u, head = self._unit(i)
            slot = lax.rem(i, query_stages)

            @pl.when(i >= query_stages)
            def _() -> None:
                plgpu.barrier_wait(memory.q_free.at[slot])

            begin = pl.multiple_of(memory.units[u, work.FIRST_QUERY], work.ALIGNED)
            plgpu.copy_gmem_to_smem(
                memory.q.at[head, pl.ds(begin, config.tiles * LINES)],
                memory.q_sm.at[slot],
                memory.q_here.at[slot],
            )
            row = memory.units[u, work.ROW]
            begin, end = memory.units[u, work.FROM], memory.units[u, work.TO]

            def tile(t: Int32[Array, ""], carry: _Fetching) -> _Fetching:
                fetched, pages = carry
                # The next pages' numbers are read now: that takes as long as a copy.
                following = self._pages(row, jnp.minimum(t + 1, end - 1))
                slot = lax.rem(fetched, stages)

                @pl.when(fetched >= stages)
                def _() -> None:
                    plgpu.barrier_wait(memory.free.at[slot])

                self._copy(head, t, pages, slot)
                return fetched + 1, following

            return lax.fori_loop(begin, end, tile, (fetched, self._pages(row, begin)))[0]

        fetched = lax.fori_loop(0, self.units, unit, jnp.int32(0))
        # A barrier is waited for as often as it comes about.
        drain(memory.free, fetched, stages)
        drain(memory.q_free, self.units, query_stages)

    def _pages(self, row: Int32[Array, ""], t: Int32[Array, ""]) -> list[Int32[Array, ""]]:
        """Reads which rows of the pool a tile of keys is in."""
        page_tokens, width = self.launch.page_tokens, self.launch.table_width
        first = lax.div(t * self.config.tile_keys, page_tokens)
        count = max(self.config.tile_keys // page_tokens, 1)
        base = self.memory.numbers[1]
        entries = (jnp.minimum(first + j, width - 1) for j in range(count))
        return [base + self.memory.table[row, entry] for entry in entries]

    def _copy(
        self,
        head: Int32[Array, ""],
        t: Int32[Array, ""],
        pages: list[Int32[Array, ""]],
        slot: Int32[Array, ""],
    ) -> None:
        """Starts the copies of a tile of keys and values, and of their scales."""
        memory, tile_keys, page_tokens = self.memory, self.config.tile_keys, self.launch.page_tokens
        part = min(tile_keys, page_tokens)
        within = pl.multiple_of(lax.rem(t * tile_keys, page_tokens), part)
        for j, page in enumerate(pages):
            into = pl.ds(j * part, part)
            for cells, scales, ring, scale_ring, here in (
                (memory.k, memory.k_scale, memory.k_sm, memory.k_scale_sm, memory.k_here),
                (memory.v, memory.v_scale, memory.v_sm, memory.v_scale_sm, memory.v_here),
            ):
                barrier = here.at[slot]
                source = pl.ds(within, part)
                plgpu.copy_gmem_to_smem(cells.at[page, head, source], ring.at[slot, into], barrier)
                if scales is not None:
                    plgpu.copy_gmem_to_smem(
                        scales.at[page, head, source], scale_ring.at[slot, into], barrier
                    )

    def attend(self) -> None:
        """Computes what has been fetched."""
        memory, config = self.memory, self.config
        # Which tile of queries is mine, and which columns of values.
        me = lax.axis_index("warpgroup")
        mine, column = (me, jnp.int32(0)) if config.columns == 1 else (jnp.int32(0), me)
        width = self.launch.width
        columns = pl.ds(pl.multiple_of(column * width, width), width)

        def unit(i: Int32[Array, ""], used: Int32[Array, ""]) -> Int32[Array, ""]:
            u, head = self._unit(i)
            slot = lax.rem(i, config.query_stages)
            begin, end = memory.units[u, work.FROM], memory.units[u, work.TO]
            see = self._visible(u, mine)
            plgpu.barrier_wait(memory.q_here.at[slot])
            lines = pl.ds(pl.multiple_of(mine * LINES, LINES), LINES)
            queries = memory.q_sm.at[slot, lines]

            def tile(t: Int32[Array, ""], state: _Softmax) -> _Softmax:
                at = _At(u, t, lax.rem(used + t - begin, config.stages), columns)
                return self._fold(queries, at, see, state)

            acc = _spread(jnp.zeros((LINES, width), jnp.float32), plgpu.Layout.WGMMA)
            state = lax.fori_loop(begin, end, tile, (acc, _line(FLOOR), _line(0.0)))
            release(memory.q_free.at[slot])
            self._put(u, head, mine, columns, state)
            return used + end - begin

        lax.fori_loop(0, self.units, unit, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _visible(self, u: Int32[Array, ""], mine: Int32[Array, ""]) -> _Visible:
        """Says what the lines of a tile see: positions from the first to before the second."""
        memory, group = self.memory, self.launch.group
        first = memory.units[u, work.START] + 1
        if self.launch.one_query:
            before = all_before = first
            most = first
        else:
            query = memory.units[u, work.QUERY] + mine * LINES
            line = plgpu.broadcasted_iota(
                jnp.int32, (LINES,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
            )
            before = first + lax.div(query + line, group)
            all_before = first + lax.div(query, group)
            most = first + lax.div(query + LINES - 1, group)
        if not self.launch.has_window:
            return _Visible(None, before, jnp.int32(0), all_before)
        window = memory.numbers[2]
        return _Visible(before - window, before, most - window, all_before)

    def _fold(self, queries: Any, at: _At, see: _Visible, state: _Softmax) -> _Softmax:
        """Takes one more tile of keys and values into the running softmax."""
        memory, launch, slot = self.memory, self.launch, at.slot
        shape = (LINES, self.config.tile_keys)
        acc, most, total = state

        plgpu.barrier_wait(memory.k_here.at[slot])
        keys = self._wide_keys(at)
        scores = product(None, queries, keys, shape, transposed=True)
        if self.launch.has_scales:
            scores = scores * _across(memory.k_scale_sm[slot].astype(jnp.float32), shape)
        factor = launch.scale * LOG2E
        if launch.softcap:
            scores = jnp.tanh(scores * (launch.scale / launch.softcap))
            factor = launch.softcap * LOG2E
        scores = self._masked(scores, at.tile, see)
        now = jnp.maximum(most, scores.max(axis=1))
        shrink = jnp.exp2((most - now) * factor)
        weights = jnp.exp2((scores - _down(now, shape)) * factor)
        total = total * shrink + weights.sum(axis=1)
        acc = acc * _down(shrink, acc.shape)

        plgpu.barrier_wait(memory.v_here.at[slot])
        if self.launch.has_scales:
            weights = weights * _across(self._clean_scale(at), shape)
        weights = weights.astype(self.launch.dtype)
        acc = product(acc, weights, self._clean_values(at), (LINES, acc.shape[1]))
        release(memory.free.at[slot])
        return acc, now, total

    def _masked(
        self, scores: Float32[Array, "M S"], t: Int32[Array, ""], see: _Visible
    ) -> Float32[Array, "M S"]:
        """Masks what the queries do not see; most tiles are seen by all of them."""
        begin = t * self.config.tile_keys

        def mask(scores: Float32[Array, "M S"]) -> Float32[Array, "M S"]:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            is_seen = key < self._limit(see.before - begin, scores.shape)
            if see.begin is not None:
                is_seen = is_seen & (key >= self._limit(see.begin - begin, scores.shape))
            return jnp.where(is_seen, scores, MASKED)

        is_edge = (begin + self.config.tile_keys > see.all_before) | (begin < see.all_begin)
        return lax.cond(is_edge, mask, lambda scores: scores, scores)

    def _limit(self, limit: Int32[Array, "*M"], shape: tuple[int, ...]) -> Int32[Array, "*MS"]:
        return limit if self.launch.one_query else _down(limit, shape)

    def _span(self, at: _At) -> tuple[Array, Array]:
        """First key of a tile that any query of the unit sees, and one past the row's last."""
        units, begin = self.memory.units, at.tile * self.config.tile_keys
        return units[at.unit, work.SEEN] - begin, units[at.unit, work.END] - begin

    def _clean_scale(self, at: _At) -> Float32[Array, " S"]:
        """The scales of a tile of values; 0 for a cell that nobody sees, whose own may be NaN."""
        layout = plgpu.Layout.WGMMA.reduce(0)
        scale = _spread(self.memory.v_scale_sm[at.slot].astype(jnp.float32), layout)
        key = plgpu.broadcasted_iota(jnp.int32, scale.shape, 0, layout=layout)
        seen, end = self._span(at)
        return jnp.where((key >= seen) & (key < end), scale, 0.0)

    def _wide_keys(self, at: _At) -> Any:
        """A tile of keys as the tensor cores take it."""
        memory = self.memory
        if not self.launch.has_scales:
            return memory.k_sm.at[at.slot]
        # All columns of keys are needed by each of two warpgroups, which widen half of them each.
        if self.config.columns > 1:
            self._meet()
        self._widen(memory.k_sm, memory.k_wide, at)
        if self.config.columns > 1:
            self._meet()
        return memory.k_wide

    def _clean_values(self, at: _At) -> Any:
        """My columns of a tile of values as the tensor cores take them.

        Values that nobody sees are zeros: no weight of 0 silences a NaN.
        """
        memory, config = self.memory, self.config
        if self.launch.has_scales:
            self._widen(memory.v_sm, memory.v_wide, at)
        values = memory.v_wide if self.launch.has_scales else memory.v_sm.at[at.slot]
        seen, end = self._span(at)

        def clean(part: Any) -> None:
            cells = _spread(values[:, part], plgpu.Layout.WGMMA)
            key = plgpu.broadcasted_iota(jnp.int32, cells.shape, 0, layout=plgpu.Layout.WGMMA)
            is_seen = (key >= seen) & (key < end)
            values[:, part] = jnp.where(is_seen, cells, jnp.zeros_like(cells))

        @pl.when((seen > 0) | (end < config.tile_keys))
        def _() -> None:
            if config.tiles == 1:
                self._by_parts(at.columns, clean)
                plgpu.commit_smem()
                return

            @pl.when(lax.axis_index("warpgroup") == 0)
            def _() -> None:
                self._by_parts(at.columns, clean)
                plgpu.commit_smem()

            self._meet()

        return values.at[:, at.columns] if config.columns > 1 else values

    def _widen(self, ring: Any, wide: Any, at: _At) -> None:
        """Makes 16 bits of my columns of a tile of codes."""

        def widen(part: Any) -> None:
            wide[:, part] = ring[at.slot, :, part].astype(self.launch.dtype)

        self._by_parts(at.columns, widen)
        plgpu.commit_smem()

    def _by_parts(self, columns: Any, do: Callable[[Any], None]) -> None:
        """Does something with columns of a tile, as few at a time as swizzles allow."""
        parts, rest = divmod(columns.size, self.launch.part)
        assert parts > 0 == rest, f"{columns.size} columns are no parts of {self.launch.part}"

        def one(i: Int32[Array, ""], _: None) -> None:
            begin = columns.start + i * self.launch.part
            do(pl.ds(pl.multiple_of(begin, self.launch.part), self.launch.part))

        lax.fori_loop(0, parts, one, None)

    def _meet(self) -> None:
        """Waits until all that attend are here."""
        plgpu.barrier_arrive(self.memory.together)
        plgpu.barrier_wait(self.memory.together)

    def _put(
        self,
        u: Int32[Array, ""],
        head: Int32[Array, ""],
        mine: Int32[Array, ""],
        columns: Any,
        state: _Softmax,
    ) -> None:
        """Starts the copy of an answer out of the block."""
        memory, launch = self.memory, self.launch
        acc, most, total = state
        # What was put last must have been read before it is overwritten.
        plgpu.wait_smem_to_gmem(0)
        acc = acc * _down(1 / jnp.maximum(total, 1e-30), acc.shape)
        me = lax.axis_index("warpgroup")
        memory.out_sm[me] = acc.astype(launch.out_dtype)
        factor = (launch.softcap or launch.scale) * LOG2E
        sums = most * factor + jnp.log2(jnp.maximum(total, 1e-30))
        lines = pl.ds(0, launch.out_lines)

        def put_sums() -> None:
            memory.sum_sm[mine] = jnp.where(total > 0, sums, NOTHING)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory.sum_sm.at[mine, lines], memory.sums.at[u, head, mine])

        if self.config.columns == 1:
            put_sums()
        else:
            plgpu.commit_smem()
            pl.when(me == 0)(put_sums)
        plgpu.copy_smem_to_gmem(
            memory.out_sm.at[me, lines], memory.out.at[u, head, mine, :, columns]
        )


type _Fetching = tuple[Int32[Array, ""], list[Int32[Array, ""]]]
type _Softmax = tuple[Float32[Array, "M H"], Float32[Array, " M"], Float32[Array, " M"]]
"""What has been weighed, not divided; the largest score; the sum of weights."""


def _spread(value: Array, layout: Any) -> Array:
    return plgpu.layout_cast(value, layout)


def _line(value: float) -> Float32[Array, " M"]:
    """One number for each line of a product."""
    return _spread(jnp.full((LINES,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _down(line: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(line, shape, [0])


def _across(line: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(line, shape, [1])
