"""A kernel to test the tests with: adds blocks of rows through a ring of shared memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels import mosaic

ROWS, WIDTH, STAGES = 8, 64, 2


def sum_of_blocks(x: Float32[Array, "N H"]) -> Float32[Array, "8 H"]:
    """Adds ``x``'s blocks of eight rows: one warpgroup fetches, another adds."""
    mosaic.decline_elsewhere()
    count = x.shape[0] // ROWS

    def body(x_ref: Any, out: Any, ring: Any, sums: Any, here: Any, free: Any) -> None:
        @pl.when(lax.axis_index("warpgroup") == 1)
        def _() -> None:
            def fetch(i: Array, _: None) -> None:
                slot = lax.rem(i, jnp.int32(STAGES))

                @pl.when(i >= STAGES)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                source = x_ref.at[pl.ds(i * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot], here.at[slot])

            lax.fori_loop(0, count, fetch, None)
            mosaic.drain(free, count, STAGES)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _() -> None:
            def add(i: Array, acc: Array) -> Array:
                slot = lax.rem(i, jnp.int32(STAGES))
                plgpu.barrier_wait(here.at[slot])
                acc = acc + ring[slot]
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[slot])
                return acc

            zero = jnp.zeros((ROWS, WIDTH), jnp.float32)
            sums[...] = lax.fori_loop(0, count, add, plgpu.layout_cast(zero, LAYOUT))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, out)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
        scratch_types=(
            plgpu.SMEM((STAGES, ROWS, WIDTH), jnp.float32),
            plgpu.SMEM((ROWS, WIDTH), jnp.float32),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
        ),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="sum_of_blocks",
    )(x)


LAYOUT = plgpu.Layout.WG_STRIDED((ROWS, WIDTH), 4)
