"""Writes a model as an orbax checkpoint that restores straight onto any mesh.

    open the source -> decide mesh and dtype -> load shard by shard -> write (weights/saved.py)

No step program is compiled and no engine is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import ServeConfig
from jaxserve.errors import CheckpointError
from jaxserve.launch import Report, open_configured, silent
from jaxserve.models.decoder import Model, Params
from jaxserve.resolve import LaunchPlan, configure_jax, resolve
from jaxserve.weights.orbax import check_new
from jaxserve.weights.saved import SavedSource, save_model
from jaxserve.weights.source import ModelSource
from pallas_kernels.quantized_matmul import spec
from sharding.rules import ShardingRules
from sharding.specs import named_shardings, partition_specs, where_divisible


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written."""

    path: Path
    file_bytes: int
    """Of everything in the directory."""
    parameters: int
    dtype: str
    seconds: float


@dataclass(frozen=True)
class OpenModel:
    """A model whose mesh and dtype are decided and whose weights are not loaded."""

    source: ModelSource
    plan: LaunchPlan
    model: Model

    @property
    def abstract(self) -> Params:
        """Global shape and dtype of every weight."""
        return self.model.abstract(self.plan.dtype, stacked=True)

    @property
    def shardings(self) -> Params:
        """Where every weight goes; an axis that the mesh does not divide is not split."""
        specs = partition_specs(self.model.logical_axes(stacked=True), ShardingRules())
        mesh = self.plan.mesh
        return named_shardings(where_divisible(self.abstract, specs, mesh), mesh)

    def load(self, report: Report = silent) -> Params:
        """Puts the weights onto their devices."""
        return self.source.load(
            self.model,
            dtype=self.plan.dtype,
            shardings=self.shardings,
            progress=lambda done, total: report("weights", done, total, self.source.name),
        )


@contextmanager
def open_model(config: ServeConfig, *, stretched: bool = True) -> Iterator[OpenModel]:
    """Opens a model as a launch with this config would; what is of serving is not used.

    Args:
        config: of the model, its weights and the mesh.
        stretched: give the weights the sizes that the mesh divides, as a launch does.

    Raises:
        LaunchError: a flag, a file or the machine has to change; the message says which and how.
    """
    configure_jax(config)
    source = open_configured(config)
    try:
        if isinstance(source, SavedSource) and (held := source.formats("auto")):
            kinds = "+".join(sorted({spec(format).kind for format in held.values()}))
            raise CheckpointError(
                f"{source.name} was saved as {kinds}, which is neither rounded nor widened again; "
                "give the checkpoint that it was made from"
            )
        plan = resolve(config, source.model_config())
        tensor = plan.mesh.shape["tensor"] if stretched else 1
        yield OpenModel(source, plan, Model(plan.model, tensor))
    finally:
        source.close()


def convert(config: ServeConfig, out: Path, report: Report = silent) -> Converted:
    """Loads a model and writes it to a new directory, which is a model that can be launched.

    Args:
        config: of the model, its weights and the mesh that they are loaded on.
        out: must not exist.
        report: hears of the stages ``weights`` and ``save``.

    Raises:
        LaunchError: a flag, a file or the machine has to change; the message says which and how.
    """
    start_s = time.perf_counter()
    check_new(out)  # Before the weights are loaded for nothing.
    # Nothing is added to the weights that would have to be taken out again, in a copy of them.
    with open_model(config, stretched=False) as opened:
        params = opened.load(report)
        report("save", 0, 1, str(out))
        save_model(out, opened.model, params, opened.source)
        report("save", 1, 1, str(out))
    return Converted(
        path=out,
        file_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        parameters=opened.plan.model.params,
        dtype=opened.plan.dtype.name,
        seconds=time.perf_counter() - start_s,
    )
