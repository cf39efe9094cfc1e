"""What one device would hold: the bytes that a launch plans, on devices that need not exist.

The page count is ``plan_memory``'s and the sizes are ``launch``'s, so that the two cannot disagree.
Temporaries are XLA's own number where it can compile, and a bound otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxserve.errors import MemoryPlanError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model
from jaxserve.planning.costs import peak_bytes, step_body
from jaxserve.planning.devices import DeviceFacts
from jaxserve.planning.sizes import Sizes, kv_name
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.memory import MemoryBudget, host_free_bytes, plan_memory
from jaxserve.runner.runner import Runner
from pallas_kernels.paged_attention import FORMATS
from pallas_kernels.quantized_matmul import bytes_per_weight
from sharding.mesh import AXES, MeshShape
from sharding.placement import bytes_per_device

MOST_DEVICES = 64
"""The nearest mesh that fits is looked for among meshes of so many."""
GPU_WORKSPACE_BYTES = 256 * 2**20
"""For what cuBLAS and NCCL allocate for themselves, which no program shows. An assumption."""


@dataclass(frozen=True)
class Memory:
    """What one device holds."""

    runner: Runner
    budget: MemoryBudget
    temp_source: str
    pages: int
    """Of one data shard, the null page included; 0 when they are too few."""
    refusal: str | None
    """Why launch would not start."""

    def rows(self, tokens: int) -> int:
        """Returns how many sequences of so many tokens one data shard holds; at most its rows."""
        config = self.runner.config
        pages_each = -(-tokens // config.cache.page_tokens)
        # The null page holds none.
        return min(config.step.max_rows, max(self.pages - 1, 0) // pages_each)


def plan_device(
    model: ModelConfig,
    shape: MeshShape,
    facts: DeviceFacts,
    sizes: Sizes,
    *,
    compile_on: Mesh | None = None,
) -> Memory:
    """Counts the bytes of one device, as ``launch`` would, and the pages that are left."""
    least = sizes.step.table_width + 1
    runner = _make_runner(model, shape, facts, sizes, least, compile_on)
    budget = budget_of(runner, free_bytes(facts, shape), sizes)
    temp_source = "estimated"
    # The first guess takes no temporaries, as in a launch, which finds the program compiled.
    pages, refusal = _pages(budget, sizes)
    if compile_on is not None and refusal is None:
        runner = _make_runner(model, shape, facts, sizes, pages, compile_on)
        list(runner.compile(runner.largest_keys()))
        temp_source, temporary = "compiled", runner.temporary_bytes()
    else:
        temporary = estimate_temporaries(runner, facts)
    budget = replace(budget, temporary_bytes=temporary)
    pages, refusal = _pages(budget, sizes)
    return Memory(runner, budget, temp_source, pages, refusal)


def budget_of(
    runner: Runner, free_bytes: int, sizes: Sizes, *, temporary_bytes: int = 0
) -> MemoryBudget:
    """Adds up what one device holds beside its pages, and what becomes of the rest."""
    cache, laid_out = runner.config.cache, runner.model.config
    tensor = runner.mesh_shape["tensor"]
    return MemoryBudget(
        free_bytes=free_bytes,
        weight_bytes=bytes_per_device(runner.abstract_params, runner.param_shardings),
        row_state_bytes=cache.row_bytes(laid_out) // tensor,
        temporary_bytes=temporary_bytes,
        page_bytes=cache.page_bytes(laid_out) // tensor,
        fraction=sizes.kv_fraction,
        kv_bytes=sizes.kv_bytes,
        most_kv_bytes=sizes.most_kv_bytes,
    )


def tokens_by_precision(memory: Memory, sizes: Sizes) -> dict[str, int]:
    """Returns how many tokens the pages of one data shard would hold in each precision.

    Temporaries are taken to be those of the precision that is planned.
    """
    runner = memory.runner
    laid_out, tensor = runner.model.config, runner.mesh_shape["tensor"]
    dtypes = [jnp.dtype(jnp.bfloat16), *(format.dtype for format in FORMATS.values())]
    if sizes.kv_dtype not in dtypes:
        dtypes.insert(0, sizes.kv_dtype)
    tokens = {}
    for dtype in dtypes:
        pages = memory.pages
        if dtype != sizes.kv_dtype:
            cache = replace(runner.config.cache, dtype=dtype)
            budget = replace(memory.budget, page_bytes=cache.page_bytes(laid_out) // tensor)
            pages, _ = _pages(budget, sizes)
        tokens[kv_name(dtype)] = max(pages - 1, 0) * sizes.page_tokens
    return tokens


def free_bytes(facts: DeviceFacts, shape: MeshShape) -> int:
    """What ``launch`` would find free on each device before it loads anything."""
    memory = host_free_bytes() if facts.memory_bytes is None else facts.memory_bytes
    return int(memory * facts.usable_memory) // (shape.devices if facts.simulated else 1)


def estimate_temporaries(runner: Runner, facts: DeviceFacts) -> int:
    """Bounds what the largest programs keep beside their arguments."""
    peak = max(peak_bytes(step_body(runner.trace(key).jaxpr)) for key in runner.largest_keys())
    return peak + (GPU_WORKSPACE_BYTES if facts.platform == "gpu" else 0)


def nearest_fit(
    model: ModelConfig, facts: DeviceFacts, sizes: Sizes, known: dict[MeshShape, bool]
) -> str | None:
    """Finds the mesh of fewest devices that has room for one sequence of full context.

    Only the tensor axis is tried: a data axis repeats the model, so a mesh ``DxT`` that fits has
    a smaller one that does, ``1xT``.

    Args:
        model: its config.
        facts: of one device.
        sizes: of the launch.
        known: whether it fits on meshes that were planned already.
    """
    for tensor in range(1, MOST_DEVICES + 1):
        shape = MeshShape(tensor=tensor)
        fits = known.get(shape)
        if fits is None:
            fits = _may_fit(model, shape, facts, sizes)
            fits = fits and plan_device(model, shape, facts, sizes).refusal is None
        if fits:
            return short(shape)
    return None


def _may_fit(model: ModelConfig, shape: MeshShape, facts: DeviceFacts, sizes: Sizes) -> bool:
    """Whether it would fit without temporaries, which take a second to trace."""
    # No layout is smaller than its even share, and even that is known sooner than the layout.
    smallest = min((sizes.dtype.itemsize, *map(bytes_per_weight, sizes.formats.values())))
    if model.params * smallest / shape.tensor > free_bytes(facts, shape):
        return False
    runner = _make_runner(model, shape, facts, sizes, sizes.step.table_width + 1, None)
    budget = budget_of(runner, free_bytes(facts, shape), sizes)
    return _pages(budget, sizes)[1] is None


def layout_notes(runner: Runner, shape: MeshShape) -> list[str]:
    """Returns a line for each axis that is padded, copied or replicated, with its cost."""
    layout, abstract = runner.model.layout, runner.abstract_params
    plain = Model(layout.config, 1, runner.model.formats)
    stretched = _bytes(abstract)
    held = bytes_per_device(abstract, runner.param_shardings)
    notes = layout.notes()
    if extra := stretched - _bytes(plain.abstract(runner.config.dtype, stacked=True)):
        notes.append(f"padding and copies: {_mb(extra)} of weights over the tensor axis")
    if whole := held * shape.tensor - stretched:
        here = whole // (shape.tensor - 1)
        what = "norms and routers" if layout.config.experts else "norms"
        notes.append(f"replicated over tensor={shape.tensor}: {what}, {_mb(here)} on every device")
    if (experts := layout.config.experts) and not runner.config.has_native:
        notes.append(
            f"experts: {layout.config.experts_per_token} of {experts} are counted for each token, "
            f"as a good kernel computes; plain XLA multiplies by all {experts}"
        )
    if shape.data > 1:
        notes.append(
            f"replicated over data={shape.data}: all weights, {_mb(held * shape.tensor)} on each"
        )
    return notes


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _pages(budget: MemoryBudget, sizes: Sizes) -> tuple[int, str | None]:
    """The page count of a launch; 0 and the reason when it would refuse."""
    least = sizes.step.table_width + 1
    most = sizes.step.max_rows * sizes.step.table_width + 1
    try:
        return plan_memory(budget, least_pages=least, most_pages=most), None
    except MemoryPlanError as error:
        return 0, str(error)


def _make_runner(
    model: ModelConfig,
    shape: MeshShape,
    facts: DeviceFacts,
    sizes: Sizes,
    num_pages: int,
    mesh: Mesh | None,
) -> Runner:
    config = RunnerConfig(
        step=replace(sizes.step, data_shards=shape.data),
        cache=CacheShape(
            num_pages=num_pages,
            page_tokens=sizes.page_tokens,
            max_rows=sizes.step.max_rows,
            dtype=sizes.kv_dtype,
            data_shards=shape.data,
        ),
        dtype=sizes.dtype,
        activations=sizes.activations,
        unrolled_rows=sizes.unrolled_rows,
        kernels=sizes.kernels,
        has_native=facts.platform == "cpu",
    )
    abstract = AbstractMesh((shape.data, shape.tensor), AXES)
    laid_out = Model(model, shape.tensor, sizes.formats)
    return Runner(laid_out, config, abstract if mesh is None else mesh)


def short(shape: MeshShape) -> str:
    """Returns a mesh as people write it, ``2x4``."""
    return f"{shape.data}x{shape.tensor}"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
