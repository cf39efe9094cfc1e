"""One compiled program per bucket, and the dispatch to them.

Programs are loaded from files, or lowered from abstract arrays and compiled, in parallel, small
buckets first, before the first request or beside serving (``late.py``), and then called as compiled
programs: an unexpected shape is an error that names the leaf, not a silent recompilation. What the
programs compute is in ``programs.py``; the files are in ``executables.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxserve.engine.constraint import mask_words
from jaxserve.engine.publish import StepHandle, StepResult
from jaxserve.engine.step import (
    RESULT_COLUMNS,
    MaskUpdate,
    ProgramCall,
    StepInputs,
    StepShape,
    prompt_columns,
)
from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Model, Params
from jaxserve.runner.cache import (
    DeviceState,
    abstract_state,
    state_specs,
    zero_state,
)
from jaxserve.runner.compiling import CompileCounter, cores, planned_compiles
from jaxserve.runner.config import MASK_ROWS, ProgramKey, RunnerConfig
from jaxserve.runner.executables import (
    KERNELS,
    ExecutableFolder,
    Signature,
    native_targets,
    without_jax_cache,
)
from jaxserve.runner.programs import StepPrograms
from jaxserve.runner.repacking import repack, repacked_shapes, repacked_specs, unpacked
from pallas_kernels.dispatch import forced, recorded
from sharding.placement import unstack_in_place
from sharding.specs import check_divisible, named_shardings, partition_specs

logger = logging.getLogger(__name__)

MORE_RESULTS = {"score": 2, "embed": 1}
"""Results beside the newest samples: scores and hidden states, or what prompts mean."""


class _Handle:
    """A dispatched step: the arrays that will come back."""

    def __init__(self, result: Array, scores: list[Array | None], data_shards: int) -> None:
        self._result = result
        self._scores = scores
        self._data_shards = data_shards
        for array in (result, *scores):
            if array is not None:
                array.copy_to_host_async()

    def wait(self) -> StepResult:
        """Blocks until the step has run."""
        shards = self._data_shards
        scores = [
            None if array is None else np.asarray(array).reshape(shards, -1, array.shape[1])
            for array in self._scores
        ]
        return StepResult(np.asarray(self._result), scores)


class Runner:
    """Weights, device state and compiled programs of one model on one mesh."""

    def __init__(self, model: Model, config: RunnerConfig, mesh: Mesh | AbstractMesh) -> None:
        """Decides every shape and where it lives; compiles and allocates nothing.

        On an abstract mesh, whose devices need not exist, programs can be traced but not compiled.

        Raises:
            MeshShapeError: the mesh does not divide a weight or the pool.
            ValueError: weights are to be repacked and programs unrolled.
        """
        if config.repacked and config.unrolled_rows:
            raise ValueError(
                f"unrolled_rows is {config.unrolled_rows} and repacked weights stay stacked: it "
                "must be 0"
            )
        self._model = model
        self._config = config
        self._mesh = mesh
        tensor = mesh.shape["tensor"] > 1
        self._programs = StepPrograms(
            model,
            config.step.table_width,
            "tensor" if tensor else None,
            has_native=config.has_native,
            activations=config.activations,
            # A model of 16 bits is not exacter than that; one of float32 was asked to be.
            narrow=config.dtype.itemsize == 2,
        )
        self._abstract_params = model.abstract(config.dtype, stacked=True)
        self._param_specs = partition_specs(model.logical_axes(stacked=True), config.rules)
        check_divisible(self._abstract_params, self._param_specs, mesh)
        self._held_params, self._held_specs = self._abstract_params, self._param_specs
        if config.repacked:
            loaded = (self._abstract_params, self._param_specs)
            self._held_params = repacked_shapes(model, loaded[0])
            self._held_specs = repacked_specs(model, *loaded)
        self._abstract_state = abstract_state(config.cache, model.config)
        self._state_specs = state_specs(self._abstract_state, config.rules)
        self._by_row = partition_specs(("batch",), config.rules)
        check_divisible(self._abstract_state, self._state_specs, mesh)
        self._compiled: dict[tuple[str, int, int], Any] = {}
        self._made_of: dict[tuple[str, int, int], dict[str, list[str]]] = {}
        """Of each program that was traced, or whose tracing is noted beside its file."""
        self._executables: ExecutableFolder | None = None
        self._params: Params | None = None
        self._unstacked: Params | None = None
        self._state: DeviceState | None = None
        self._blank: Array | None = None
        self._counter = CompileCounter.instance()
        self._compiles_at_ready: int | None = None
        self.on_scored: Callable[[ProgramCall, Array], None] | None = None
        """Called with each scoring call and its hidden states ``[shards * T, D]``, which are still
        being computed; on the thread that dispatches."""
        self._gathers: dict[tuple[tuple[int, ...], jnp.dtype], Any] = {}
        """Programs that bring data shards of other hosts here, by shape and dtype; empty on one
        host."""

    # -- before ready --------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """What is computed, laid out for the mesh."""
        return self._model

    @property
    def programs(self) -> StepPrograms:
        """The functions that are compiled."""
        return self._programs

    @property
    def config(self) -> RunnerConfig:
        """What is compiled."""
        return self._config

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """The devices."""
        return self._mesh

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Devices along each axis of the mesh."""
        return dict(self._mesh.shape)

    def program_keys(self) -> list[ProgramKey]:
        """Every program of the grid, cheapest first."""
        return self._config.program_keys()

    def largest_keys(self) -> list[ProgramKey]:
        """The programs that need most beside their arguments: the largest of each kind.

        Those of prompts have the most places. That of decoding has the most rows, each of which
        reads a block of its context: of SmolLM2's programs decode of 64 rows needs 88 MB, score
        of 512 tokens 25.
        """
        keys = self.program_keys()
        kinds = [
            [key for key in keys if key.kind == kind]
            for kind in ("score", "embed", "prefill", "decode")
        ]
        return [max(some) for some in kinds if some]

    def first_keys(self) -> list[ProgramKey]:
        """The programs that serving can begin with, cheapest first: few, and the largest."""
        return self._config.first_keys()

    def missing_keys(self) -> list[ProgramKey]:
        """The programs of the grid that are not there yet, cheapest first."""
        return self._missing(self.program_keys())

    @property
    def loaded_shape(self) -> StepShape:
        """The shapes whose programs are there now. From any thread."""
        step, there = self._config.step, self._compiled.copy()
        return replace(
            step,
            decode_buckets=tuple(
                rows for rows in step.decode_buckets if ("decode", rows, 1) in there
            ),
            prefill_buckets=tuple(
                bucket for bucket in step.prefill_buckets if ("prefill", *bucket) in there
            ),
            score_buckets=tuple(
                bucket for bucket in step.score_buckets if ("score", *bucket) in there
            ),
            embed_buckets=tuple(
                bucket for bucket in step.embed_buckets if ("embed", *bucket) in there
            ),
        )

    @property
    def param_shardings(self) -> Params:
        """Where every weight is to be loaded."""
        return named_shardings(self._param_specs, self._mesh)

    @property
    def abstract_params(self) -> Params:
        """Global shape and dtype of every weight, as it is loaded."""
        return self._abstract_params

    @property
    def executables(self) -> ExecutableFolder | None:
        """Where programs are kept, if they are."""
        return self._executables

    def use(self, executables: ExecutableFolder) -> None:
        """Takes programs from files where they are, and writes those that it has to compile."""
        self._executables = executables

    def compile(
        self, keys: Iterable[ProgramKey], *, workers: int | None = None
    ) -> Generator[ProgramKey]:
        """Loads or compiles programs in parallel; yields each key as it is done.

        A program is begun when a worker is free, so that closing the generator, and any error,
        waits for those that have begun and for no other.
        """
        missing = self._missing(keys)
        workers = workers or min(len(missing) or 1, cores())
        waiting, running = iter(missing), dict[Future[Any], ProgramKey]()
        with ThreadPoolExecutor(workers, thread_name_prefix="jaxserve-compile") as pool:
            while True:
                for key in islice(waiting, workers - len(running)):
                    running[pool.submit(self._make_one, key)] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    self._compiled[_name(key)] = future.result()
                    yield key

    def _missing(self, keys: Iterable[ProgramKey]) -> list[ProgramKey]:
        return [key for key in keys if _name(key) not in self._compiled]

    def _make_one(self, key: ProgramKey) -> Any:
        loaded = None if self._executables is None else self._load_one(key)
        return self._compile_one(key) if loaded is None else loaded

    def memory_analyses(self) -> dict[tuple[str, int, int], Any]:
        """What XLA says about the memory of every program compiled so far. From any thread."""
        there = self._compiled.copy()  # Another thread may add to it.
        analyses = {name: program.memory_analysis() for name, program in there.items()}
        return {name: analysis for name, analysis in analyses.items() if analysis is not None}

    def temporary_bytes(self) -> int:
        """The most that any program compiled so far needs beside its arguments, per device."""
        analyses = self.memory_analyses().values()
        return max((int(analysis.temp_size_in_bytes) for analysis in analyses), default=0)

    def allocate(self) -> None:
        """Allocates the device state, which ``make_ready`` does otherwise.

        Filling it takes a second for each GiB of a CPU's memory, and can go on beside compiling.
        """
        assert isinstance(self._mesh, Mesh), "an abstract mesh holds no arrays"
        state = zero_state(self._abstract_state, self._mesh, self._state_specs)
        self._state = jax.block_until_ready(state)

    def make_ready(self, params: Params, *, strict: bool = False) -> None:
        """Takes the weights, allocates the device state and runs what has to be run once.

        After this no request waits for XLA, and device memory does not grow. Weights that are
        repacked are deleted where they were.
        """
        assert isinstance(self._mesh, Mesh), "an abstract mesh holds no arrays"
        if self._config.repacked:
            held = named_shardings(self._held_specs, self._mesh)
            params = repack(self._model, params, held)
        self._params = params
        if self._config.unrolled_rows:
            assert isinstance(params.layers, dict)
            self._unstacked = Params(params.ends, unstack_in_place(params.layers))
        if self._state is None:
            self.allocate()
        self._blank = jnp.zeros(
            (self._config.step.all_rows, RESULT_COLUMNS),
            jnp.int32,
            device=NamedSharding(self._mesh, self._by_row),
        )
        self._compile_gathers()
        self._warm_up()
        self._compiles_at_ready = self._counter.unplanned
        self._counter.strict = strict

    def _compile_gathers(self) -> None:
        """Host 0 reads what every data shard sampled: across hosts that takes one all-gather."""
        assert isinstance(self._mesh, Mesh)
        shards = self._mesh.devices[:, 0]
        if len({device.process_index for device in shards}) == 1:
            return
        step = self._config.step
        heights = [step.all_rows, *(step.data_shards * tokens for _, tokens in step.score_buckets)]
        shapes = [((height, RESULT_COLUMNS), jnp.int32) for height in heights]
        width = self._model.config.embed
        embedded = {step.data_shards * lines for lines, _ in step.embed_buckets}
        shapes += [((lines, width), jnp.float32) for lines in embedded]
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        for shape, dtype in shapes:
            program = jax.jit(lambda array: array, out_shardings=everywhere)
            lowered = program.lower(self._host_array(shape, dtype, self._by_row))
            self._gathers[shape, jnp.dtype(dtype)] = lowered.compile()

    def _gather(self, array: Array) -> Array:
        program = self._gathers.get((array.shape, array.dtype))
        return array if program is None else program(array)

    def _warm_up(self) -> None:
        """Runs programs on padding lines, through the path that serving uses."""
        assert self._state is not None
        assert self._blank is not None
        step = self._config.step
        for kind, rows, tokens in self._to_warm_up():
            if kind == "set_row":
                self._set_row(
                    step.null_row,
                    np.zeros(step.vocab_size, np.int32),
                    np.zeros(step.vocab_size, np.float32),
                )
                continue
            if kind == "set_masks":
                width = mask_words(step.vocab_size)
                self._set_masks(MaskUpdate([step.null_row], np.zeros((1, width), np.int32)))
                continue
            extra = 0 if kind == "decode" else prompt_columns((rows, tokens))
            buffer = np.zeros((step.data_shards * rows, step.line_columns + extra), np.int32)
            buffer[:, 0] = step.null_row
            self._call((kind, rows, tokens), self._blank, buffer)
        for shape, dtype in self._gathers:
            zeros = jnp.zeros(shape, dtype, device=NamedSharding(self._mesh, self._by_row))
            self._gather(zeros)
        jax.block_until_ready(self._state)

    def _to_warm_up(self) -> list[tuple[str, int, int]]:
        """Every program, or on CPUs the smallest of each kind.

        A GPU loads a program, and makes room for it, when it first runs. A CPU has nothing to do
        then but the work itself: padding costs what tokens cost, and the first run of 15 programs
        took 7.0 s where the second took 6.3.
        """
        names = sorted(self._compiled)
        assert isinstance(self._mesh, Mesh)
        if self._mesh.devices.flat[0].platform != "cpu" or self._gathers:
            return names
        return list(
            {(name[0], self._is_unrolled(*name[:2])): name for name in reversed(names)}.values()
        )

    def _load_one(self, key: ProgramKey) -> Any:
        assert self._executables is not None
        assert isinstance(self._mesh, Mesh), "an abstract mesh loads nothing"
        state, leaf = self._abstract_state, 0
        if key.kind == "set_row":
            arguments, results = (state, leaf, leaf, leaf), state
        elif key.kind == "set_masks":
            arguments, results = (state, leaf, leaf), state
        else:
            arguments = (self._weights(key)[0], state, leaf, leaf)
            results = (state, leaf, *((leaf,) * MORE_RESULTS.get(key.kind, 0)))
        signature = Signature(arguments, results, list(self._mesh.devices.flat))
        if isinstance(noted := self._executables.note(key.file_name, KERNELS), dict):
            self._made_of[_name(key)] = noted
        return self._executables.load(key.file_name, signature)

    def _compile_one(self, key: ProgramKey) -> Any:
        traced = self.trace(key)
        stored = nullcontext() if self._executables is None else without_jax_cache()
        with planned_compiles(), stored:
            compiled = traced.lower().compile(self.compiler_options)
        if self._executables is not None:
            targets = native_targets(traced.jaxpr)
            self._executables.save(key.file_name, compiled, targets)
            self._executables.write_note(key.file_name, KERNELS, self._made_of[_name(key)])
        return compiled

    def kernels(self) -> dict[str, list[str]]:
        """What programs made so far consist of: implementations by family of kernels."""
        together: dict[str, list[str]] = {}
        for made_of in self._made_of.copy().values():  # Another thread may add to it.
            for family, names in made_of.items():
                have = together.setdefault(family, [])
                have += [name for name in names if name not in have]
        return together

    def trace(self, key: ProgramKey) -> Any:
        """Traces one program from abstract arrays.

        Returns:
            JAX's ``Traced``: what it computes stands in its ``jaxpr``.

        Raises:
            ConfigError: kernels that were asked for cannot compute it; says why.
        """
        try:
            with forced(self._config.kernels), recorded() as choices:
                traced = self._trace(key)
        except ExceptionGroup as error:
            if not self._config.kernels:
                raise
            asked = ",".join(f"{family}={name}" for family, name in self._config.kernels.items())
            reasons = "; ".join(map(str, error.exceptions))
            raise ConfigError(
                f"--kernels {asked}: {error.message}: {reasons}; choose another, or auto"
            ) from error
        self._made_of[_name(key)] = choices.taken
        for family, reasons in choices.declined.items():
            for name, reason in reasons.items():
                logger.info("%s: %s declined %s: %s", key.file_name, name, family, reason)
        return traced

    def _trace(self, key: ProgramKey) -> Any:
        step = self._config.step
        if key.kind == "set_row":
            return self._trace_set_row()
        if key.kind == "set_masks":
            return self._trace_set_masks()
        abstract, specs = self._weights(key)
        function = getattr(self._programs, key.kind)
        columns = step.line_columns
        if key.kind != "decode":
            columns += prompt_columns((key.rows, key.tokens))
            function = partial(function, tokens=key.tokens)
        by_row = self._by_row
        packed = self._host_array((step.data_shards * key.rows, columns), jnp.int32, by_row)
        result = self._host_array((step.all_rows, RESULT_COLUMNS), jnp.int32, by_row)
        outputs = (self._state_specs, by_row)
        outputs += (by_row,) * MORE_RESULTS.get(key.kind, 0)
        mapped = jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=(specs, self._state_specs, by_row, by_row),
            out_specs=outputs,
            check_vma=False,
        )
        program = jax.jit(mapped, donate_argnums=(1,))
        return program.trace(
            self._with_shardings(abstract, specs),
            self._with_shardings(self._abstract_state, self._state_specs),
            result,
            packed,
        )

    def _weights(self, key: ProgramKey) -> tuple[Params, Any]:
        """The weights that a program takes, abstract, and their specs."""
        if not self._is_unrolled(key.kind, key.rows):
            return self._held_params, self._held_specs
        model, config = self._model, self._config
        specs = partition_specs(model.logical_axes(stacked=False), config.rules)
        return model.abstract(config.dtype, stacked=False), specs

    def _is_unrolled(self, kind: str, rows: int) -> bool:
        return kind == "decode" and rows <= self._config.unrolled_rows

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What XLA is told of every program."""
        assert isinstance(self._mesh, Mesh), "an abstract mesh compiles nothing"
        if self._mesh.devices.flat[0].platform != "cpu":
            return dict(self._config.compiler_options)
        # Layers depend on each other: looking for operations to run side by side finds none, and
        # costs 10 to 20 % of a decode step.
        options = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
        return {**options, **self._config.compiler_options}

    def _trace_set_row(self) -> Any:
        vocab = partition_specs(("vocab",), self._config.rules)
        size = self._model.config.vocab_size
        mapped = jax.shard_map(
            self._programs.set_row,
            mesh=self._mesh,
            in_specs=(self._state_specs, self._by_row, vocab, vocab),
            out_specs=self._state_specs,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=(0,)).trace(
            self._with_shardings(self._abstract_state, self._state_specs),
            self._host_array((self._config.step.data_shards,), jnp.int32, self._by_row),
            self._host_array((size,), jnp.int32, vocab),
            self._host_array((size,), jnp.float32, vocab),
        )

    def _trace_set_masks(self) -> Any:
        mapped = jax.shard_map(
            self._programs.set_masks,
            mesh=self._mesh,
            in_specs=(self._state_specs, self._by_row, self._by_row),
            out_specs=self._state_specs,
            check_vma=False,
        )
        rows, width = self._config.step.data_shards * MASK_ROWS, self._abstract_state.masks.shape[1]
        return jax.jit(mapped, donate_argnums=(0,)).trace(
            self._with_shardings(self._abstract_state, self._state_specs),
            self._host_array((rows,), jnp.int32, self._by_row),
            self._host_array((rows, width), jnp.int32, self._by_row),
        )

    def _host_array(
        self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

    def _with_shardings(self, tree: Any, specs: Any) -> Any:
        def shard(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(self._mesh, spec)
            )

        return jax.tree.map(shard, tree, specs)

    # -- after ready ---------------------------------------------------------------------------

    def dispatch(self, inputs: StepInputs) -> StepHandle:
        """Starts every call of a step; returns without waiting for the device."""
        assert self._blank is not None, "make_ready comes first"
        for setup in inputs.setups:
            self._set_row(setup.row, setup.counts, setup.bias)
        if inputs.masks is not None:
            self._set_masks(inputs.masks)
        result = self._blank
        scores: list[Array | None] = []
        for call in inputs.calls:
            result, *more = self._call((call.kind, *call.bucket), result, call.buffer)
            scores.append(self._gather(more[0]) if more else None)
            if call.kind == "score" and self.on_scored is not None:
                self.on_scored(call, more[1])
        return _Handle(self._gather(result), scores, self._config.step.data_shards)

    def reset(self) -> None:
        """Allocates the device state anew; what it held is lost."""
        strict, self._counter.strict = self._counter.strict, False
        self._state = None
        assert isinstance(self._mesh, Mesh)
        self._state = zero_state(self._abstract_state, self._mesh, self._state_specs)
        self._counter.strict = strict

    @property
    def compiles_after_ready(self) -> int:
        """Compilations of the whole process since ``make_ready``, but for programs of a grid."""
        if self._compiles_at_ready is None:
            return 0
        return self._counter.unplanned - self._compiles_at_ready

    @property
    def params(self) -> Params | None:
        """The weights, for looking inside; None before ``make_ready`` and after ``close``."""
        return self._params

    def stored_params(self) -> Params:
        """Returns the weights as they were loaded; repacked ones are copied to the host."""
        assert self._params is not None, "make_ready comes first, and close last"
        return unpacked(self._model, self._params)

    def arrays(self) -> dict[str, Any]:
        """Everything that is held on the devices, by what it is for."""
        assert self._state is not None, "make_ready comes first"
        state = self._state
        return {
            "weights": (self._params, self._unstacked),
            "pages": state.pools,
            "row state": (state.last_token, state.counts, state.bias, state.masks),
        }

    def close(self) -> None:
        """Drops weights, state and programs, so that their memory can be used again."""
        self._counter.strict = False
        self._params = self._unstacked = self._state = self._blank = None
        self._compiled.clear()

    def _call(
        self, name: tuple[str, int, int], result: Array, buffer: np.ndarray
    ) -> tuple[Array, ...]:
        """Runs a program; returns its result and, of some, ``MORE_RESULTS``."""
        program = self._compiled[name]
        params = self._unstacked if self._is_unrolled(*name[:2]) else self._params
        outputs = program(params, self._state, result, buffer)
        self._state = outputs[0]
        return outputs[1:]

    def _set_row(self, row: int, counts: np.ndarray, bias: np.ndarray) -> None:
        step = self._config.step
        program = self._compiled["set_row", 1, 0]
        shard, place = divmod(row, step.shard_rows)
        rows = np.full(step.data_shards, step.null_row, np.int32)
        rows[shard] = place
        if missing := self._model.config.vocab_size - counts.size:
            counts, bias = np.pad(counts, (0, missing)), np.pad(bias, (0, missing))
        self._state = program(self._state, rows, counts, bias)

    def _set_masks(self, masks: MaskUpdate) -> None:
        step = self._config.step
        program = self._compiled["set_masks", MASK_ROWS, 0]
        width = self._abstract_state.masks.shape[1]
        by_shard: list[list[tuple[int, int]]] = [[] for _ in range(step.data_shards)]
        for line, row in enumerate(masks.rows):
            shard, place = divmod(row, step.shard_rows)
            by_shard[shard].append((place, line))
        for first in range(0, max(map(len, by_shard)), MASK_ROWS):
            rows = np.full((step.data_shards, MASK_ROWS), step.null_row, np.int32)
            words = np.zeros((step.data_shards, MASK_ROWS, width), np.int32)
            for shard, own in enumerate(by_shard):
                for slot, (place, line) in enumerate(own[first : first + MASK_ROWS]):
                    rows[shard, slot] = place
                    words[shard, slot, : masks.words.shape[1]] = masks.words[line]
            self._state = program(self._state, rows.ravel(), words.reshape(-1, width))


def _name(key: ProgramKey) -> tuple[str, int, int]:
    return (key.kind, key.rows, key.tokens)
