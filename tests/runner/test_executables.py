"""Compiled programs in files: used without tracing, and never when anything differs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.step import StepShape
from jaxserve.errors import ExecutablesError
from jaxserve.launch import Service
from jaxserve.models.decoder import Model
from jaxserve.models.presets import preset
from jaxserve.runner import executables as executables_module
from jaxserve.runner import fingerprint as fingerprint_module
from jaxserve.runner.cache import CacheShape
from jaxserve.runner.config import ProgramKey, RunnerConfig
from jaxserve.runner.executables import (
    KEY_FILE,
    ExecutableFolder,
    ExecutableStore,
    check_key,
    key_digest,
    open_written,
    without_jax_cache,
)
from jaxserve.runner.fingerprint import fingerprint, traced_files
from jaxserve.runner.runner import Runner
from pallas_kernels import native
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import ShardingRules
from tests.agreement.ways import ask_together, engine_over, make_service

SET_ROW = ProgramKey(0, "set_row", 1, 0)
STEP = StepShape(
    max_rows=1,
    table_width=4,
    vocab_size=512,
    decode_buckets=(1,),
    prefill_buckets=((1, 16),),
)
CACHE = CacheShape(num_pages=8, page_tokens=16, max_rows=1, dtype=jnp.dtype(jnp.float32))
CONFIG = RunnerConfig(step=STEP, cache=CACHE, dtype=jnp.dtype(jnp.float32))


def make_runner(config: RunnerConfig = CONFIG, mesh: MeshShape | None = None) -> Runner:
    shape = MeshShape() if mesh is None else mesh
    model = Model(preset("tiny-llama"), shape.tensor)
    return Runner(model, config, make_mesh(shape, jax.devices("cpu")))


def set_row(folder: ExecutableFolder, traced: list[ProgramKey]) -> Runner:
    """A runner that has the quickest program; ``traced`` hears if it had to be traced."""
    runner = make_runner()
    runner.use(folder)
    trace = runner.trace

    def spy(key: ProgramKey) -> Any:
        traced.append(key)
        return trace(key)

    runner.trace = spy
    assert list(runner.compile([SET_ROW])) == [SET_ROW]
    return runner


@pytest.fixture
def folder(tmp_path: Path) -> ExecutableFolder:
    """Holds the quickest program."""
    folder = ExecutableStore(tmp_path).folder(fingerprint(make_runner()))
    traced: list[ProgramKey] = []
    set_row(folder, traced)
    assert traced == [SET_ROW]
    return folder


# -- a whole service -------------------------------------------------------------------------------


SETTINGS: dict[str, object] = {
    "max_rows": 4,
    "step_tokens": 16,
    "context_tokens": 64,
    "kv_memory_bytes": 2**20,
    "strict_compile": False,
}
SAMPLING = SamplingParams(
    max_tokens=12, temperature=0.8, seed=5, ignore_eos=True, prompt_logprobs=1
)


def answers(service: Service) -> list[list[int]]:
    """Prompts of one bucket and of several chunks, scored, together."""
    batch = [
        Request(request_id=f"{n}", prompt=list(range(5, 5 + 9 * n)), sampling=SAMPLING)
        for n in range(1, 5)
    ]
    with engine_over(service) as engine:
        return ask_together(engine, batch)


@pytest.fixture(scope="module", params=["1x1", "2x2"])
def launches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[list[int]], dict[Any, int], Service]]:
    """What a launch answered that compiled, its temporaries, and one that could trace nothing."""
    places = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("assets")
    options = {**SETTINGS, "mesh": request.param}
    with make_service("dummy:tiny-llama", *places, **options) as first:
        expected, memory = answers(first), temporaries(first)

    def refuse(runner: Runner, key: ProgramKey) -> Any:
        raise AssertionError(f"{key} was traced")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "trace", refuse)
        second = make_service("dummy:tiny-llama", *places, **options)
    with second:
        yield expected, memory, second


def temporaries(service: Service) -> dict[Any, int]:
    analyses = service.runner.memory_analyses()
    return {name: analysis.temp_size_in_bytes for name, analysis in analyses.items()}


@pytest.mark.slow
def test_a_second_launch_traces_nothing_and_answers_the_same(
    launches: tuple[list[list[int]], dict[Any, int], Service],
) -> None:
    expected, memory, service = launches
    assert answers(service) == expected
    assert temporaries(service) == memory
    assert len(memory) == len(service.runner.program_keys())


@pytest.mark.slow
def test_loaded_programs_take_the_pool_over_instead_of_copying_it(
    launches: tuple[list[list[int]], dict[Any, int], Service],
) -> None:
    runner = launches[2].runner

    def places() -> list[int]:
        return [
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(runner._state)
            for shard in leaf.addressable_shards
        ]

    for name in sorted(runner._compiled):
        before, given = places(), runner._state
        runner._to_warm_up = lambda name=name: [name]
        runner._warm_up()
        assert places() == before, name
        assert given is not None
        assert given.pools.k.is_deleted()


@pytest.mark.slow
def test_a_loaded_program_refuses_other_shapes(
    launches: tuple[list[list[int]], dict[Any, int], Service],
) -> None:
    runner = launches[2].runner
    with pytest.raises(TypeError, match="compiled with int32"):
        runner._call(("decode", 4, 1), runner._blank, np.zeros((1, 3), np.int32))  # pyright: ignore[reportArgumentType]


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_the_same_for_the_same_and_in_another_process() -> None:
    program = """
import jax
from tests.runner.test_executables import fingerprint, key_digest, make_runner
print(key_digest(fingerprint(make_runner())))
"""
    assert fingerprint(make_runner()) == fingerprint(make_runner())
    environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split()[-1] == key_digest(fingerprint(make_runner()))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (replace(CONFIG, step=replace(STEP, decode_buckets=(1, 4))), "step.decode_buckets"),
        (replace(CONFIG, step=replace(STEP, prefill_buckets=((1, 32),))), "step.prefill_buckets"),
        (replace(CONFIG, step=replace(STEP, table_width=8)), "step.table_width"),
        (replace(CONFIG, step=replace(STEP, score_buckets=((1, 16),))), "step.score_buckets"),
        (replace(CONFIG, cache=replace(CACHE, num_pages=9)), "cache.num_pages"),
        (replace(CONFIG, cache=replace(CACHE, dtype=jnp.dtype(jnp.bfloat16))), "cache.dtype"),
        (replace(CONFIG, dtype=jnp.dtype(jnp.bfloat16)), "dtype"),
        (replace(CONFIG, activations=jnp.dtype(jnp.bfloat16)), "activations"),
        (replace(CONFIG, unrolled_rows=1), "unrolled_rows"),
        (replace(CONFIG, has_native=False), "has_native"),
        (replace(CONFIG, rules=ShardingRules(ffn=None)), "rules.ffn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_part_of_what_is_compiled_is_in_the_key(change: RunnerConfig, part: str) -> None:
    before, after = fingerprint(make_runner()), fingerprint(make_runner(change))
    differing = {name for name in before if before[name] != after[name]}
    assert part in differing
    assert differing <= {part, "weights' shapes"}


def test_the_mesh_and_its_devices_are_in_the_key() -> None:
    before, after = fingerprint(make_runner()), fingerprint(make_runner(mesh=MeshShape(tensor=2)))
    assert (before["mesh"], after["mesh"]) == ("data=1, tensor=1", "data=1, tensor=2")
    assert (before["devices"], after["devices"]) == ("0", "0, 1")


def test_the_model_is_in_the_key() -> None:
    runner = make_runner()
    other = replace(preset("tiny-llama"), rms_eps=1e-3)
    changed = Runner(Model(other, 1), CONFIG, runner.mesh)
    before, after = fingerprint(runner), fingerprint(changed)
    assert {name for name in before if before[name] != after[name]} == {"model.rms_eps"}


def change_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "source_digest", lambda: "other")


def change_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**jax.config.values, "jax_default_matmul_precision": "highest"}
    monkeypatch.setattr(type(jax.config), "values", property(lambda self: values))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("jax", lambda patch: patch.setattr(jax, "__version__", "0.0")),
        ("jaxlib", lambda patch: patch.setattr(fingerprint_module, "version", lambda name: "0.0")),
        ("native kernels", lambda patch: patch.setattr(native, "why_not", lambda: "broken")),
        ("CPU", lambda patch: patch.setattr(fingerprint_module, "cpu_facts", lambda: "other")),
        ("CPU cores", lambda patch: patch.setattr(os, "sched_getaffinity", lambda pid: range(99))),
        ("source code", change_source),
        ("jax_default_matmul_precision", change_setting),
        ("compiler options", lambda patch: patch.setattr(Runner, "compiler_options", {"a": 1})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_surrounds_a_program_is_in_the_key_and_leads_to_a_compilation(
    folder: ExecutableFolder,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    change: Callable[[pytest.MonkeyPatch], None],
) -> None:
    before = fingerprint(make_runner())
    with monkeypatch.context() as patch:
        change(patch)
        after = fingerprint(make_runner())
    assert part in {name for name in before if before[name] != after[name]}
    traced: list[ProgramKey] = []
    set_row(ExecutableStore(folder.path.parents[1]).folder(after), traced)
    assert traced == [SET_ROW]
    with pytest.raises(ExecutablesError, match="was compiled for something else") as refused:
        check_key(Path("dir"), before, after)
    assert f"{part} is {before[part]} there and {after[part]} here" in str(refused.value)
    assert "compile again with `jaxserve compile`" in str(refused.value)


def test_xla_flags_are_in_the_key() -> None:
    program = """
from jaxserve.runner.fingerprint import fingerprint
from tests.runner.test_executables import make_runner
print(fingerprint(make_runner())["XLA flags"])
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split()[-1] != fingerprint(make_runner())["XLA flags"]


def test_all_code_that_a_runner_imports_is_in_the_key() -> None:
    program = """
import sys
import jaxserve.runner.runner
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("jaxserve", "pallas_kernels", "sharding"):
        print(module.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    package = Path(executables_module.__file__).parents[1]
    # What the name of the package imports: nothing but names.
    idle = {str(package / "__init__.py"), str(package / "version.py")}
    assert set(done.stdout.split()) - idle <= {str(path) for path in traced_files()}


def test_source_code_is_hashed_by_content_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text("a")
    (tmp_path / "two.py").write_text("b")
    monkeypatch.setattr(fingerprint_module, "traced_files", lambda: sorted(tmp_path.iterdir()))
    digests: list[str] = []
    for text in ("a", "changed"):
        (tmp_path / "one.py").write_text(text)
        digests.append(fingerprint_module.source_digest.__wrapped__())
    (tmp_path / "one.py").rename(tmp_path / "three.py")
    digests.append(fingerprint_module.source_digest.__wrapped__())
    assert len(set(digests)) == 3


# -- files -----------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def behead(path: Path) -> None:
    path.write_bytes(path.read_bytes().partition(b"\n")[2])


def another_program(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"set_row-1x0"', b'"decode-1x1"', 1))


def another_key(path: Path) -> None:
    head, _, content = path.read_bytes().partition(b"\n")
    digest = head.partition(b'"key": "')[2][:64]
    path.write_bytes(head.replace(digest, b"0" * 64) + b"\n" + content)


@pytest.mark.parametrize("damage", [truncate, flip, behead, another_program, another_key])
def test_a_damaged_file_is_compiled_again_which_is_said_once(
    folder: ExecutableFolder, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    path = folder.path / "set_row-1x0.xla"
    intact = path.read_bytes()
    damage(path)
    assert path.read_bytes() != intact
    traced: list[ProgramKey] = []
    with caplog.at_level(logging.WARNING):
        set_row(folder, traced)
        damage(path)
        set_row(folder, traced)
    assert traced == [SET_ROW, SET_ROW]
    assert len(caplog.records) == 1
    assert "set_row-1x0.xla cannot be loaded and is compiled again" in caplog.text
    set_row(folder, traced)
    assert len(traced) == 2, "it was written anew"


def test_a_disk_that_cannot_be_written_costs_the_file_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "executables").touch()
    traced: list[ProgramKey] = []
    with caplog.at_level(logging.WARNING):
        set_row(ExecutableStore(tmp_path).folder(fingerprint(make_runner())), traced)
    assert traced == [SET_ROW]
    assert "cannot be written" in caplog.text


def test_the_folders_used_longest_ago_are_removed_first(tmp_path: Path) -> None:
    store = ExecutableStore(tmp_path, most_bytes=250)
    folders = [store.folder({"number": str(number)}) for number in range(4)]
    for age, folder in enumerate(folders):
        folder.path.mkdir(parents=True)
        (folder.path / "decode-1x1.xla").write_bytes(bytes(100))
        os.utime(folder.path, (1000 + age, 1000 + age))
    store.folder({"number": "0"})  # Used now.

    store.evict(folders[3])

    assert [folder.path.exists() for folder in folders] == [True, False, False, True]
    ExecutableStore(tmp_path, most_bytes=10).evict(folders[3])
    assert [folder.path.exists() for folder in folders] == [False, False, False, True]


def test_a_note_of_a_program_is_for_its_key_alone(folder: ExecutableFolder) -> None:
    assert folder.note("set_row-1x0", "costs") is None
    folder.write_note("set_row-1x0", "costs", {"flops": 7})
    assert folder.note("set_row-1x0", "costs") == {"flops": 7}
    assert folder.note("set_row-1x0", "others") is None
    assert ExecutableFolder(folder.path, {"jax": "other"}).note("set_row-1x0", "costs") is None
    (folder.path / "set_row-1x0.costs.json").write_text("{")
    assert folder.note("set_row-1x0", "costs") is None


def test_a_directory_that_was_compiled_ahead_is_not_written_to(folder: ExecutableFolder) -> None:
    ahead = ExecutableFolder(folder.path, fingerprint(make_runner()), must_hold=True)
    before = sorted(folder.path.iterdir())
    ahead.write_note("set_row-1x0", "costs", {})
    assert sorted(folder.path.iterdir()) == before


def test_nothing_is_left_of_a_file_that_was_not_finished(
    folder: ExecutableFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path, target: Path) -> None:
        raise OSError("no space left")

    runner = make_runner()
    runner.use(folder)
    (compiled,) = set_row(folder, [])._compiled.values()
    for path in folder.path.glob("set_row-1x0.*"):
        path.unlink()
    compiled = runner.trace(SET_ROW).lower().compile()
    monkeypatch.setattr(Path, "replace", fail)
    folder.save("set_row-1x0", compiled, ())
    assert [path.name for path in folder.path.iterdir()] == [KEY_FILE]
    assert "no space left" in caplog.text


def test_jax_caches_what_other_threads_compile_meanwhile() -> None:
    asked: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: asked.append(event))

    def asks(number: int) -> bool:
        """Whether JAX's cache is looked into for a program that is new."""
        asked.clear()
        jax.jit(lambda x: x * number).lower(jnp.zeros(7)).compile()
        return "/jax/compilation_cache/compile_requests_use_cache" in asked

    assert asks(90001)
    with without_jax_cache():
        assert not asks(90002)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(asks, 90003).result()
    assert asks(90004)


# -- a directory that was compiled ahead -----------------------------------------------------------


def test_a_directory_has_to_hold_what_it_says(folder: ExecutableFolder, tmp_path: Path) -> None:
    key = fingerprint(make_runner())
    out = tmp_path / "out"
    assert folder.copy_to(out, ["set_row-1x0"]) > 1000
    assert open_written(out) == key
    ahead = ExecutableFolder(out, key, must_hold=True)
    set_row(ahead, traced := [])
    assert not traced
    runner = make_runner()
    runner.use(ahead)
    with pytest.raises(ExecutablesError, match=r"\w+-\d+x\d+.xla cannot be loaded: No such file"):
        list(runner.compile(runner.program_keys()))
    truncate(out / "set_row-1x0.xla")
    with pytest.raises(ExecutablesError, match=r"damaged.*; write the directory again with"):
        set_row(ahead, [])
    with pytest.raises(ExecutablesError, match=r"--out .*out exists"):
        folder.copy_to(out, ["set_row-1x0"])
    with pytest.raises(ExecutablesError, match="cannot be written"):
        folder.copy_to(tmp_path / "other", ["decode-1x1"])
    assert {path.name for path in tmp_path.iterdir()} == {"executables", "out"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("{", "Expecting"), ("{}", "'format'"), ('{"format": 9}', "is 9 and")],
)
def test_what_is_no_such_directory_is_refused(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / KEY_FILE).write_text(content)
    with pytest.raises(ExecutablesError, match=reason):
        open_written(tmp_path)
