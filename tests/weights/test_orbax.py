from __future__ import annotations

import math
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights import orbax

METADATA = {"config": {"model_type": "llama"}, "model_digest": "ab12"}


def params() -> dict[str, Any]:
    return {
        "layers": {"w": jnp.arange(32, dtype=jnp.float32).reshape(8, 4).astype(jnp.bfloat16)},
        "norm": jnp.arange(4, dtype=jnp.float32),
    }


def shapes(tree: dict[str, Any]) -> Any:
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


def whole(stored: orbax.StoredArray, like: Any) -> np.ndarray:
    out = np.zeros(like.shape, like.dtype)
    stored.read_into(out, tuple(slice(0, size) for size in like.shape))
    return out


def test_parameters_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path, tree = tmp_path / "saved", params()
    orbax.save(path, tree, METADATA)
    assert orbax.is_orbax(path)
    stored = orbax.open_arrays(path, shapes(tree))
    for found, expected in zip(jax.tree.leaves(stored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(whole(found, expected), expected)
    assert orbax.read_metadata(path) == METADATA


@pytest.mark.parametrize("piece_bytes", [1, 16, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_boxes_are_read_in_pieces_into_any_memory_and_dtype(
    piece_bytes: int, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of two rows and a piece for each: it starts and ends within them."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 2 * 5 * 4)
    monkeypatch.setattr(orbax, "PIECE_BYTES", piece_bytes)
    tree = {"w": np.arange(8 * 5, dtype=np.float32).reshape(8, 5)}
    orbax.save(tmp_path / "a", tree, {})
    stored = orbax.open_arrays(tmp_path / "a", shapes(tree))["w"]
    out = np.zeros((9, 6), dtype)
    stored.read_into(out[1:7:1, 2:5], (slice(1, 7), slice(1, 4)))
    expected = np.zeros((9, 6), dtype)
    expected[1:7, 2:5] = tree["w"][1:7, 1:4]
    np.testing.assert_array_equal(out, expected)


def test_what_is_saved_is_an_ordinary_orbax_checkpoint(tmp_path: Path) -> None:
    tree = params()
    orbax.save(tmp_path / "a", tree, {})
    restored = ocp.StandardCheckpointer().restore(tmp_path / "a" / "params", shapes(tree))
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


def test_shards_are_saved_once_in_pieces_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies on ``data``, shards that end within a chunk, rows that are larger than a piece."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 3 * 4)
    monkeypatch.setattr(orbax, "PIECE_BYTES", 8 * 4)
    pieces, cut = [], orbax._pieces

    def seen(*args: Any) -> Any:
        for piece in cut(*args):
            pieces.append(math.prod(part.stop - part.start for part in piece))
            yield piece

    monkeypatch.setattr(orbax, "_pieces", seen)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    whole_array = jnp.arange(2 * 2 * 10, dtype=jnp.float32).reshape(2, 2, 10)
    spec = jax.sharding.PartitionSpec(None, None, "tensor")
    tree = {"w": jax.device_put(whole_array, jax.sharding.NamedSharding(mesh, spec))}
    orbax.save(tmp_path / "a", tree, {})
    assert len(list(orbax._shards(tree["w"]))) == 2
    assert max(pieces) <= 8
    stored = orbax.open_arrays(tmp_path / "a", shapes(tree))["w"]
    np.testing.assert_array_equal(whole(stored, whole_array), whole_array)


def test_an_axis_that_is_split_is_cut_at_every_entry(tmp_path: Path) -> None:
    tree = {"w": np.zeros((4, 3, 40_000), np.int32)}
    orbax.save(tmp_path / "a", tree, {}, split={"w": orbax.Split((0, 1))})
    stored = orbax.open_arrays(tmp_path / "a", shapes(tree))["w"]
    assert stored._array.chunk_layout.read_chunk.shape == (1, 1, 40_000)


def test_the_tokenizer_travels_with_the_parameters(tmp_path: Path) -> None:
    files = TokenizerSource(source="x", files={"tokenizer.json": b"{}", "config.json": b"[1]"})
    orbax.save(tmp_path / "a", params(), {}, files)
    assert orbax.read_tokenizer(tmp_path / "a").files == files.files
    gguf = TokenizerSource(source="x", gguf={"tokenizer.ggml.tokens": ["ä", "b"]})
    orbax.save(tmp_path / "b", params(), {}, gguf)
    assert orbax.read_tokenizer(tmp_path / "b").gguf == gguf.gguf
    orbax.save(tmp_path / "c", params(), {})
    assert orbax.read_tokenizer(tmp_path / "c").files == {}


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    orbax.save(tmp_path / "a", params(), {}, TokenizerSource(source="x", gguf={}))
    (tmp_path / "a" / "tokenizer" / "gguf.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer cannot be read .* save it again"):
        orbax.read_tokenizer(tmp_path / "a")


def test_saving_never_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match=r"a exists already; remove it or save under another"):
        orbax.save(tmp_path / "a", params(), {})


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: Not a directory"):
        orbax.save(tmp_path / "file" / "a", params(), {})
    with pytest.raises(TypeError):
        orbax.save(tmp_path / "b", params(), {"config": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_is_a_checkpoint_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit of the size of files: what orbax writes of the tree is below it."""
    tree = {"w": np.random.default_rng(0).random((512, 512), np.float32)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"a cannot be written: .*; check the path"):
            orbax.save(tmp_path / "a", tree, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    orbax.save(tmp_path / "a", tree, {})


def test_saving_without_a_cpu_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(**_: Any) -> Any:
        raise RuntimeError("Unknown backend: 'cpu' requested")

    monkeypatch.setattr(jax, "local_devices", absent)
    with pytest.raises(CheckpointError, match=r"'cpu' requested; unset JAX_PLATFORMS, or add cpu"):
        orbax.save(tmp_path / "a", params(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"a holds other parameters: missing \[\], unknown \[\"\['norm'\]\"\]"),
        ("extra", r"a holds other parameters: missing \[\"\['other'\]\"\], unknown \[\]"),
        ("shape", r"wrong \[\"\['norm'\] has shape \[4\], not \[5\]\"\]; save it again"),
    ],
)
def test_another_tree_is_refused(change: str, message: str, tmp_path: Path) -> None:
    orbax.save(tmp_path / "a", params(), {})
    wanted = shapes(params())
    if change == "missing":
        del wanted["norm"]
    elif change == "extra":
        wanted["other"] = wanted["norm"]
    else:
        wanted["norm"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    with pytest.raises(CheckpointError, match=message):
        orbax.open_arrays(tmp_path / "a", wanted)


def test_lost_parameters_are_a_checkpoint_error(tmp_path: Path) -> None:
    orbax.save(tmp_path / "a", params(), {})
    shutil.rmtree(tmp_path / "a" / "params")
    with pytest.raises(CheckpointError, match=r"a is damaged \(its parameters are not found\); sa"):
        orbax.open_arrays(tmp_path / "a", shapes(params()))


def test_what_orbax_raises_while_opening_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orbax.save(tmp_path / "a", params(), {})

    def fail(*_: Any) -> None:
        raise ValueError("checksum")

    monkeypatch.setattr(ocp.Checkpointer, "metadata", fail)
    with pytest.raises(
        CheckpointError, match=r"a is damaged \(ValueError: checksum\); save it aga"
    ):
        orbax.open_arrays(tmp_path / "a", shapes(params()))


def test_data_that_is_lost_or_cut_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    tree = {"w": np.random.default_rng(0).random((64, 1024), np.float32)}
    orbax.save(tmp_path / "a", tree, {})
    stored = orbax.open_arrays(tmp_path / "a", shapes(tree))["w"]
    files = [f for f in (tmp_path / "a").rglob("d/*") if f.stat().st_size > 100_000]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"a is damaged \(.*save it again from the original"):
        whole(stored, tree["w"])
    for file in files:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"a is damaged \(.*save it again from the original"):
        whole(orbax.open_arrays(tmp_path / "a", shapes(tree))["w"], tree["w"])


def test_a_directory_that_was_not_saved_here_is_refused(tmp_path: Path) -> None:
    assert not orbax.is_orbax(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"was not written by jaxserve \(jaxserve.json cannot"
    ):
        orbax.open_arrays(tmp_path, {})
    (tmp_path / "jaxserve.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"jaxserve.json has format 99 and this version rea"):
        orbax.read_metadata(tmp_path)
