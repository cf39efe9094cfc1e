"""`jaxserve convert`: one directory for every mesh, with the arrays and tokens of a direct load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ServeConfig
from jaxserve.convert import convert, open_model
from jaxserve.errors import CheckpointError, MeshError, UnsupportedModelError
from jaxserve.models.decoder import Params
from jaxserve.runner.compiling import CompileCounter
from jaxserve.weights import orbax
from jaxserve.weights.saved import save_model
from tests.agreement.ways import GREEDY, ask_together, engine_over, make_service, requests

TINY = Path(__file__).parent / "golden" / "tiny"
CASES = [
    # Read whole; padded (heads in groups, feed-forward, vocabulary); by two data shards.
    ("tiny-llama", "1x1", ("1x2", "1x3", "2x2")),
    # From a mesh that does not divide it.
    ("tiny-llama", "1x3", ("1x1", "1x2")),
    # One group of heads, copied for each device, and dealt out anew.
    ("tiny-gemma3", "1x1", ("1x4",)),
    ("tiny-gemma3", "2x4", ("1x1", "1x3")),
    # Biases.
    ("tiny-qwen2", "1x2", ("1x1", "1x3")),
    # Experts, and one beside them, both padded.
    ("tiny-qwen2-moe", "1x1", ("1x3",)),
]


def config(model: str | Path, tmp_path: Path, mesh: str = "1x1", **options: Any) -> ServeConfig:
    options = {"device": "cpu", "dtype": "float32", "offline": True, **options}
    places = {"assets_dir": tmp_path, "cache_dir": tmp_path}
    return ServeConfig(model=str(model), mesh=mesh, **places, **options)


def loaded(asked: ServeConfig) -> Params:
    with open_model(asked) as opened:
        return opened.load()


def assert_same(found: Params, expected: Params) -> None:
    def same(one: jax.Array, other: jax.Array) -> None:
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)

    jax.tree.map(same, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "others"), CASES)
def test_a_converted_model_has_the_arrays_of_a_direct_load_on_every_mesh(
    name: str, mesh: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    """Zeros and copies that the mesh needs are compared too."""
    model = f"dummy:{name}"
    convert(config(model, tmp_path, mesh), tmp_path / "out")
    for other in (mesh, *others):
        found = loaded(config(tmp_path / "out", tmp_path, other))
        assert_same(found, loaded(config(model, tmp_path, other)))


@pytest.mark.parametrize(("name", "mesh"), [("tiny-llama", "1x3"), ("tiny-gemma3", "2x4")])
def test_what_a_mesh_has_added_to_served_weights_is_not_saved(
    name: str, mesh: str, tmp_path: Path
) -> None:
    model = f"dummy:{name}"
    with open_model(config(model, tmp_path, mesh)) as opened:
        assert opened.model.config != opened.plan.model
        save_model(tmp_path / "out", opened.model, opened.load(), opened.source)
    for other in ("1x1", mesh):
        found = loaded(config(tmp_path / "out", tmp_path, other))
        assert_same(found, loaded(config(model, tmp_path, other)))


def test_no_device_gets_more_than_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boxes that are read of a split weight are the shards, each read once."""
    convert(config("dummy:tiny-llama", tmp_path), tmp_path / "out")
    boxes: list[tuple[str, int]] = []
    read_into = orbax.StoredArray.read_into

    def recorded(self: orbax.StoredArray, out: np.ndarray, index: tuple[slice, ...]) -> None:
        name = self._array.spec().to_json()["kvstore"]["path"]
        boxes.append((name, out.size))
        read_into(self, out, index)

    monkeypatch.setattr(orbax.StoredArray, "read_into", recorded)
    params = loaded(config(tmp_path / "out", tmp_path, "1x2"))
    assert isinstance(params.layers, dict)
    for group, arrays in (("ends", params.ends), ("layers", params.layers)):
        for key, array in arrays.items():
            sizes = [size for name, size in boxes if name == f"{group}.{key}/"]
            shards = 1 if array.sharding.is_fully_replicated else 2
            assert sizes == [array.size // shards] * shards, key
    assert params.layers["w_down"].sharding.is_fully_replicated is False


def test_a_checkpoint_is_converted_with_its_dtype_digest_and_tokenizer_and_compiles_nothing(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(TINY / "llama", source)
    files = {
        "tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"}).encode(),
        "generation_config.json": b'{"eos_token_id": 5}',
    }
    for name, raw in files.items():
        (source / name).write_bytes(raw)
    counter, stages = CompileCounter.instance(), list[tuple[str, int, int]]()
    asked = config(source, tmp_path, dtype="bfloat16")
    before = counter.compiles

    done = convert(
        asked, tmp_path / "out", lambda stage, n, total, detail: stages.append((stage, n, total))
    )

    assert counter.compiles == before
    assert stages[-2:] == [("save", 0, 1), ("save", 1, 1)]
    assert stages[0][0] == "weights"
    assert (done.dtype, done.path) == ("bfloat16", tmp_path / "out")
    kept = orbax.read_tokenizer(tmp_path / "out").files
    assert files.items() <= kept.items()
    with open_model(asked) as direct, open_model(replace(asked, model=str(done.path))) as saved:
        assert done.parameters == direct.plan.model.params
        assert done.file_bytes > done.parameters, "two bytes each, compressed"
        assert saved.source.digest() == direct.source.digest()
        assert saved.plan.model == direct.plan.model
        assert_same(saved.load(), direct.load())


def test_a_saved_dtype_is_cast_to_the_one_that_is_asked_for(tmp_path: Path) -> None:
    convert(config("dummy:tiny-llama", tmp_path, dtype="bfloat16"), tmp_path / "half")
    direct = loaded(config("dummy:tiny-llama", tmp_path, dtype="bfloat16"))
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), direct)
    assert_same(loaded(config(tmp_path / "half", tmp_path)), wide)
    # And again, from orbax to orbax.
    convert(config(tmp_path / "half", tmp_path, "1x2", dtype="float16"), tmp_path / "again")
    narrow = jax.tree.map(lambda array: array.astype(jnp.float16), wide)
    assert_same(loaded(config(tmp_path / "again", tmp_path, dtype="float16")), narrow)


def test_random_weights_of_a_config_are_converted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(TINY / "llama" / "config.json", source)
    asked = config(source, tmp_path, load_format="dummy", seed=3)
    convert(asked, tmp_path / "out")
    assert_same(loaded(config(tmp_path / "out", tmp_path)), loaded(asked))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "other"), [("1x3", "1x1"), ("1x1", "2x2")])
def test_a_converted_model_answers_with_the_same_greedy_tokens(
    mesh: str, other: str, tmp_path: Path, cache_dir: Path
) -> None:
    settings: dict[str, Any] = {"max_rows": 4, "step_tokens": 16, "context_tokens": 256}
    settings |= {"prompt_logprobs": False, "strict_compile": False}
    batch = requests(500, replace(GREEDY, max_tokens=8))[:6]

    def answers(model: str, mesh: str) -> list[list[int]]:
        with (
            make_service(model, cache_dir, tmp_path, mesh=mesh, **settings) as service,
            engine_over(service) as engine,
        ):
            return ask_together(engine, batch)

    convert(config("dummy:tiny-llama", tmp_path, mesh), tmp_path / "out")
    assert answers(str(tmp_path / "out"), other) == answers("dummy:tiny-llama", "1x1")


@pytest.mark.parametrize("kind", ["file", "directory", "broken link"])
def test_what_is_there_is_never_replaced_and_nothing_is_loaded_before(
    kind: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    elif kind == "directory":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"out exists already; remove it or save under anoth"):
        convert(config("dummy:no-such-model", tmp_path), out)


def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out cannot be written: Not a directory; check the"):
        convert(config("dummy:no-such-model", tmp_path), tmp_path / "file" / "out")


def test_a_model_or_mesh_that_cannot_be_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="nope"):
        convert(config("dummy:nope", tmp_path), tmp_path / "out")
    with pytest.raises(MeshError, match=r"--mesh 1x99: .* needs 99 devices"):
        convert(config("dummy:tiny-llama", tmp_path, "1x99"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_says_what_was_written_and_how_to_serve_it(tmp_path: Path) -> None:
    out = tmp_path / "my model"
    command = [sys.executable, "-m", "jaxserve", "convert", "dummy:tiny-llama", str(out)]
    command += ["--dtype", "bfloat16", "--device", "cpu:2", "--mesh", "1x2"]
    command += ["--cache-dir", str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    wrote, serve = done.stdout.splitlines()
    assert wrote.startswith(f"wrote {out}: ")
    assert " bytes, 0.1M parameters, bfloat16, in " in wrote
    assert serve == f"  jaxserve launch '{out}' --dtype bfloat16"
    for stage in ("[environment] python", "[weights] ", "[save] "):
        assert stage in done.stderr
    direct = loaded(config("dummy:tiny-llama", tmp_path, dtype="bfloat16"))
    assert_same(loaded(config(out, tmp_path, dtype="bfloat16")), direct)

    again = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.splitlines()[-1].startswith(f"error: {out} exists already; remove it")
