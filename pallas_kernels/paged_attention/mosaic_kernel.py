"""The GPU kernel of paged attention, for Hopper, in Mosaic.

Thread blocks take turns at the units of a launch (``work.py``). In each, one warpgroup *fetches*:
it follows the page table and has the hardware copy pages into a ring of shared memory, across the
borders of units, so that the next unit's keys arrive while this one's are computed. The others
*attend*, each for 64 rows of the tile of queries: two products on the tensor cores around a running
softmax (Dao et al. 2022, FlashAttention; Shah et al. 2024, FlashAttention-3, for the division of
labour). Pages of few bits are widened tile by tile in shared memory; the scale of a key's token
multiplies its scores, and that of a value's token its weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.mosaic import LINES, tile
from pallas_kernels.paged_attention.formats import SCALE_DTYPE
from pallas_kernels.paged_attention.mosaic_block import Block, Memory
from pallas_kernels.paged_attention.mosaic_launch import Launch

HAVE_REGISTERS = {1: (248, 40), 2: (232, 40)}
"""Of each thread that attends, and that fetches, by warpgroups that attend."""


def attend(
    launch: Launch,
    q: Float[Array, "K P H"],
    k: Array,
    v: Array,
    table: Int32[Array, "B W"],
    units: Int32[Array, "U 8"],
    numbers: Int32[Array, " 3"],
    scales: tuple[Array, Array] | None,
) -> tuple[Float[Array, "U K M H"], Float32[Array, "U K M"]]:
    """Runs the units of a launch.

    Args:
        launch: what is fixed.
        q: packed queries; a tile begins at a multiple of 8 and can be read whole.
        k: ``[LP K Z H]`` pages; of int8 or e4m3 with scales.
        v: as ``k``.
        table: pages of each row.
        units: see ``work.py``.
        numbers: real units; the layer's first page; the window.
        scales: ``[LP K Z]`` of keys and of values.

    Returns:
        The answers of units, and log2 of what their weights summed to, in the order of their slots;
        others are not written.
    """
    config, kv_heads = launch.config, launch.kv_heads
    attending, lines = config.warpgroups, launch.out_lines
    names = ["q", "k", "v", "table", "units", "numbers"]
    operands = [q, k, v, table, units, numbers]
    if scales is not None:
        names += ["k_scale", "v_scale"]
        operands += scales
    names += ["out", "sums"]

    def body(*refs: Any, **scratch: Any) -> None:
        block = Block(launch, Memory(**dict(zip(names, refs, strict=True)), **scratch))
        have, leave = HAVE_REGISTERS[attending]

        @pl.when(lax.axis_index("warpgroup") == attending)
        def _() -> None:
            plgpu.set_max_registers(leave, action="decrease")
            block.fetch()

        @pl.when(lax.axis_index("warpgroup") < attending)
        def _() -> None:
            plgpu.set_max_registers(have, action="increase")
            block.attend()

    shape = (launch.units, kv_heads, config.tiles, lines)
    out, sums = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*shape, launch.head_dim), launch.out_dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=_scratch(launch),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=attending + 1,
        thread_name="warpgroup",
        kernel_name="paged_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    together = (launch.units, kv_heads, config.tiles * lines)
    return out.reshape(*together, launch.head_dim), sums.reshape(together)


def _scratch(launch: Launch) -> dict[str, Any]:
    """Shared memory and barriers, by name."""
    config, H = launch.config, launch.head_dim
    stages, S, attending = config.stages, config.tile_keys, config.warpgroups
    arrivals = max(S // launch.page_tokens, 1) * (2 if launch.has_scales else 1)
    made = {
        "q_sm": tile((config.query_stages, config.tiles * LINES, H), launch.dtype),
        "k_sm": tile((stages, S, H), launch.pages, launch.cells),
        "v_sm": tile((stages, S, H), launch.pages, launch.cells),
        "out_sm": tile((attending, LINES, H // config.columns), launch.out_dtype),
        "sum_sm": plgpu.SMEM((config.tiles, LINES), jnp.float32),
        "q_here": plgpu.Barrier(num_barriers=config.query_stages),
        "q_free": plgpu.Barrier(num_barriers=config.query_stages, num_arrivals=attending),
        "k_here": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
        "v_here": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
        "free": plgpu.Barrier(num_barriers=stages, num_arrivals=attending),
    }
    if attending > 1:
        made["together"] = plgpu.Barrier(num_arrivals=attending)
    if launch.has_scales:
        wide, scale = tile((S, H), launch.dtype), plgpu.SMEM((stages, S), SCALE_DTYPE)
        made |= {"k_wide": wide, "v_wide": wide, "k_scale_sm": scale, "v_scale_sm": scale}
    return made
