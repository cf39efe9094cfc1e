"""The product of few activations with a quantized matrix, on the tensor cores of Hopper.

The matrix is the left operand: 64 of its rows are what one warpgroup multiplies at a time, however
few rows the activations have. Its values come by TMA, are widened in registers on their way into
the tensor cores, and what they amount to is scaled a group at a time, in float32:

    out[o, b]  =  sum over groups g of  scale[o, g] * (values[o, g] . x[b, g])
                                       + minimum[o, g] * (ones . x[b, g])

The sums of activations that the minima take are products with ones, for few rows: the tensor cores
have nothing else to do. For many they are given.

A grid of as many programs as the device has cores walks a list of items: ``rows`` times 64 rows of
the matrix, ``tokens`` rows of activations, one part of the depth. In each program one warpgroup
fetches, for the next item while the others still compute; ``rows * chains`` warpgroups multiply,
of which ``chains`` share the same 64 rows and take turns along the depth. Their sums are added in
order at an item's end, those of parts of the depth by XLA afterwards. What is added to what depends
on the matrix's shape alone, so that a row's answer has the same bits in any company.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import mosaic
from pallas_kernels.mosaic import LINES
from pallas_kernels.quantized_matmul.mosaic_config import Config

CODE_OFFSET = 8
"""A value of int4 as the kernel reads it, -8 to 7, is so much less than what it stands for."""
SPREAD = plgpu.Layout.WGMMA
"""How the numbers of a product lie over the threads of a warpgroup."""
REGISTERS = {2: (232, 40), 3: (160, 32), 4: (112, 32)}
"""Of each thread that multiplies, and that fetches, by how many warpgroups multiply: all that the
processor has."""


def mosaic_product(
    x: Shaped[Array, "B I"],
    values: Shaped[Array, "L O I"],
    scale: Float[Array, "L G O"],
    minimum: Float[Array, "L G O"] | None,
    sums_of_x: Float[Array, "G B"] | None,
    factor: Float[Array, " B"] | None,
    layer: Int[Array, " 1"],
    *,
    config: Config,
    dtype: jnp.dtype,
) -> Float[Array, "parts B O"]:
    """Launches the kernel.

    Args:
        x: Activations: bfloat16 or float16, or of the dtype of ``values``, int8 or float8_e4m3fn,
            which are then multiplied as they are. Rows are a multiple of ``config.tokens``.
        values: int8, int4 or float8_e4m3fn.
        scale: Of ``G`` equal groups of the depth.
        minimum: With int4: ``CODE_OFFSET`` values are added to it.
        sums_of_x: Sums of a row's activations in each group; None has the kernel add them up.
        factor: What a row of the answer is multiplied by in the end.
        layer: The matrix of the stack; the nearest one where there is none such.
        config: How the work is cut.
        dtype: Of the result; float32 where there are parts to add up.
    """
    layers, outs, depth = values.shape
    rows, chains, tokens, tile = config.rows, config.chains, config.tokens, config.depth
    block, workers = rows * LINES, rows * chains
    group = depth // scale.shape[1]
    step = min(group, tile)  # Of the depth, between two scalings.
    steps = tile // step
    by_row = group == depth and minimum is None
    native = x.dtype == values.dtype
    token_blocks, parts = x.shape[0] // tokens, config.parts
    tiles = depth // tile // parts  # Of one item.
    items = outs // block * parts * token_blocks
    programs = min(config.programs, items)
    # Numbers of 32 bits cannot be turned on their way into shared memory; XLA turns those.
    turned = jnp.dtype(dtype).itemsize == 2
    total = jnp.int32 if native and values.dtype == jnp.int8 else jnp.float32
    # Sums of products of float8 lose digits in the tensor cores where they are long.
    in_place = by_row and not (native and total == jnp.float32)
    operands = {"x": x, "values": values, "scale": scale, "layer": layer}
    if minimum is not None:
        operands["minimum"] = minimum
    if sums_of_x is not None:
        operands["sums_of_x"] = sums_of_x
    if factor is not None:
        operands["factor"] = factor

    def kernel(*refs: Any, full: Any, free: Any, **shared: Any) -> None:
        given = dict(zip((*operands, "out"), refs, strict=True))
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        number = lax.clamp(jnp.int32(0), given["layer"][0], jnp.int32(layers - 1))
        mine = lax.div(items - program + (programs - 1), jnp.int32(programs))

        def item_of(turn: Any) -> tuple[Any, Any, Any]:
            """First row of the matrix, first row of activations, part of the depth."""
            item = program + turn * programs
            rest = lax.div(item, jnp.int32(token_blocks))
            return (
                lax.div(rest, jnp.int32(parts)) * block,
                lax.rem(item, jnp.int32(token_blocks)) * tokens,
                lax.rem(rest, jnp.int32(parts)),
            )

        def slot_of(turn: Any, t: Any) -> Any:
            return lax.rem(turn * tiles + t, jnp.int32(config.stages))

        def fetch(turn: Any, _: None) -> None:
            row, token, part = item_of(turn)

            def fetch_tile(t: Any, _: None) -> None:
                slot = slot_of(turn, t)

                @pl.when(turn * tiles + t >= config.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                start = (part * tiles + t) * tile
                columns, these = pl.ds(start, tile), pl.ds(row, block)
                groups = pl.ds(lax.div(start, jnp.int32(group)), steps)
                where = {
                    "values": (number, these, columns),
                    "x": (pl.ds(token, tokens), columns),
                    "scale": (number, groups, these),
                    "minimum": (number, groups, these),
                    "sums_of_x": (groups, pl.ds(token, tokens)),
                }
                for name in stage_names:
                    plgpu.copy_gmem_to_smem(
                        given[name].at[where[name]], shared[name].at[slot], full.at[slot]
                    )

            lax.fori_loop(0, tiles, fetch_tile, None)

        @pl.when(warpgroup == workers)
        def _() -> None:
            if registers is not None:
                plgpu.set_max_registers(registers[1], action="decrease")
            lax.fori_loop(0, mine, fetch, None)
            mosaic.drain(free, mine * tiles, config.stages)

        strip = lax.rem(warpgroup, jnp.int32(rows))
        chain = lax.div(warpgroup, jnp.int32(rows))
        lines = pl.ds(strip * LINES, LINES)
        product = partial(mosaic.product, shape=(LINES, tokens), transposed=True, dtype=total)

        def spread(column: Any) -> Any:
            column = plgpu.layout_cast(column, SPREAD.reduce(1))
            return lax.broadcast_in_dim(column, (LINES, tokens), [0])

        def spread_down(row: Any) -> Any:
            row = plgpu.layout_cast(row, SPREAD.reduce(0))
            return lax.broadcast_in_dim(row, (LINES, tokens), [1])

        def multiply_tile(turn: Any, u: Any, sums: Any) -> Any:
            slot = slot_of(turn, u * chains + chain)
            plgpu.barrier_wait(full.at[slot])
            weights = shared["values"].at[slot, lines]
            if not native:
                weights = weights[...].astype(x.dtype)
            for j in range(steps):
                left = weights if steps == 1 else weights[:, j * step : (j + 1) * step]
                right = shared["x"].at[slot, :, pl.ds(j * step, step)]
                if in_place:
                    sums = product(sums, left, right)
                    continue
                some = product(None, left, right)
                if by_row:
                    sums = sums + some
                    continue
                scales = shared["scale"][slot, j, lines].astype(jnp.float32)
                sums = sums + some * spread(scales)
                if minimum is None:
                    continue
                least = shared["minimum"][slot, j, lines].astype(jnp.float32)
                if sums_of_x is None:
                    ones = plgpu.layout_cast(jnp.full((LINES, step), 1, x.dtype), SPREAD)
                    of_x = product(None, ones, right)
                else:
                    of_x = spread_down(shared["sums_of_x"][slot, j])
                sums = sums + of_x * spread(least + CODE_OFFSET * scales)
            mosaic.release(free.at[slot])
            return sums

        def finish(turn: Any, sums: Any) -> None:
            row, token, part = item_of(turn)
            these = pl.ds(row + strip * LINES, LINES)
            if chains > 1:
                plgpu.barrier_wait(shared["ready"].at[strip])
                for other in range(chains - 1):
                    sums = sums + plgpu.layout_cast(shared["sums"][jnp.int32(other), strip], SPREAD)
                plgpu.barrier_arrive(shared["taken"].at[strip])
            sums = sums.astype(jnp.float32)
            if by_row:
                plgpu.barrier_wait(shared["scaled"].at[strip])
                sums = sums * spread(shared["scale"][strip].astype(jnp.float32))
                if factor is not None:
                    sums = sums * spread_down(shared["factor"][strip])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            answers = plgpu.layout_cast(sums.astype(dtype), SPREAD)
            if not turned:
                shared["out"][strip] = answers
                place = given["out"].at[part, these, pl.ds(token, tokens)]
            else:
                if mosaic.is_interpreted():
                    shared["out"][strip] = answers.T
                else:
                    shared["out"].at[strip].transpose((1, 0))[...] = answers
                place = given["out"].at[part, pl.ds(token, tokens), these]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared["out"].at[strip], place)

        def fetch_scales(turn: Any) -> None:
            """Fetches what an item's answers are multiplied by when they are summed."""
            row, token, _ = item_of(turn)
            of_rows = given["scale"].at[number, 0, pl.ds(row + strip * LINES, LINES)]
            barrier = shared["scaled"].at[strip]
            plgpu.copy_gmem_to_smem(of_rows, shared["scale"].at[strip], barrier)
            if factor is not None:
                of_tokens = given["factor"].at[pl.ds(token, tokens)]
                plgpu.copy_gmem_to_smem(of_tokens, shared["factor"].at[strip], barrier)

        def multiply(turn: Any, _: None) -> None:
            if by_row:

                @pl.when(chain == 0)
                def _() -> None:
                    fetch_scales(turn)

            zeros = plgpu.layout_cast(jnp.zeros((LINES, tokens), total), SPREAD)
            sums = lax.fori_loop(0, tiles // chains, partial(multiply_tile, turn), zeros)

            @pl.when(chain == 0)
            def _() -> None:
                finish(turn, sums)

            if chains > 1:

                @pl.when(chain > 0)
                def _() -> None:
                    shared["sums"][chain - 1, strip] = sums
                    plgpu.barrier_arrive(shared["ready"].at[strip])
                    plgpu.barrier_wait(shared["taken"].at[strip])

        @pl.when(warpgroup < workers)
        def _() -> None:
            if registers is not None:
                plgpu.set_max_registers(registers[0], action="increase")
            lax.fori_loop(0, mine, multiply, None)
            plgpu.wait_smem_to_gmem(0)

    x_tile = (config.stages, tokens, tile)
    stages = {
        "values": mosaic.tile((config.stages, block, tile), values.dtype),
        "x": plgpu.SMEM(x_tile, x.dtype, transforms=mosaic.transforms(step, x.dtype)),
    }
    out_tile = (rows, tokens, LINES) if turned else (rows, LINES, tokens)
    out_shape = (parts, x.shape[0], outs) if turned else (parts, outs, x.shape[0])
    scratch: dict[str, Any] = {"out": plgpu.SMEM(out_tile, dtype)}
    if by_row:
        scratch["scale"] = plgpu.SMEM((rows, LINES), scale.dtype)
        scratch["scaled"] = plgpu.Barrier(
            num_barriers=rows, num_arrivals=1 if factor is None else 2
        )
        if factor is not None:
            scratch["factor"] = plgpu.SMEM((rows, tokens), factor.dtype)
    else:
        stages["scale"] = plgpu.SMEM((config.stages, steps, block), scale.dtype)
        if minimum is not None:
            stages["minimum"] = plgpu.SMEM((config.stages, steps, block), minimum.dtype)
        if sums_of_x is not None:
            shape = (config.stages, steps, tokens)
            stages["sums_of_x"] = plgpu.SMEM(shape, sums_of_x.dtype)
    if chains > 1:
        scratch["sums"] = plgpu.SMEM((chains - 1, rows, LINES, tokens), total)
        scratch["ready"] = plgpu.Barrier(num_barriers=rows, num_arrivals=chains - 1)
        scratch["taken"] = plgpu.Barrier(num_barriers=rows)
    stage_names = tuple(stages)
    registers = REGISTERS.get(workers)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name="quantized_matmul",
        scratch_types={
            **stages,
            **scratch,
            "full": plgpu.Barrier(num_barriers=config.stages, num_arrivals=len(stages)),
            "free": plgpu.Barrier(num_barriers=config.stages, num_arrivals=rows),
        },
    )(*operands.values())
    return out if turned else jnp.swapaxes(out, 1, 2)
