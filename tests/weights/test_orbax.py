from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights import orbax

METADATA = {"config": {"model_type": "llama"}, "model_digest": "ab12"}


def params() -> dict[str, Any]:
    return {
        "layers": {"w": jnp.arange(32, dtype=jnp.float32).reshape(8, 4).astype(jnp.bfloat16)},
        "norm": jnp.arange(4, dtype=jnp.float32),
    }


def abstract(tree: dict[str, Any], *axes: str | None) -> Any:
    """Shapes, placed over every device there is."""
    mesh = jax.make_mesh((len(jax.devices()),), ("tensor",))

    def place(array: jax.Array) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*axes[: array.ndim]) if array.ndim > 1 else PartitionSpec()
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def test_parameters_come_back_in_the_shardings_that_were_asked_for(tmp_path: Path) -> None:
    path, tree = tmp_path / "saved", params()
    orbax.save(path, tree, METADATA)
    assert orbax.is_orbax(path)
    wanted = abstract(tree, "tensor", None)
    found = orbax.restore(path, wanted)
    assert found["layers"]["w"].sharding == wanted["layers"]["w"].sharding
    assert found["layers"]["w"].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, tree)
    assert orbax.read_metadata(path) == METADATA


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
    wanted = abstract(params())
    if change == "missing":
        del wanted["norm"]
    elif change == "extra":
        wanted["other"] = wanted["norm"]
    else:
        norm = wanted["norm"]
        wanted["norm"] = jax.ShapeDtypeStruct((5,), norm.dtype, sharding=norm.sharding)
    with pytest.raises(CheckpointError, match=message):
        orbax.restore(tmp_path / "a", wanted)


def test_lost_parameters_are_a_checkpoint_error(tmp_path: Path) -> None:
    orbax.save(tmp_path / "a", params(), {})
    shutil.rmtree(tmp_path / "a" / "params")
    with pytest.raises(CheckpointError, match=r"a is damaged \(its parameters are not found\); sa"):
        orbax.restore(tmp_path / "a", abstract(params()))


def test_what_orbax_raises_while_reading_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orbax.save(tmp_path / "a", params(), {})

    def fail(*_: Any) -> None:
        raise ValueError("checksum")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
    with pytest.raises(
        CheckpointError, match=r"a is damaged \(ValueError: checksum\); save it aga"
    ):
        orbax.restore(tmp_path / "a", abstract(params()))


def test_a_directory_that_was_not_saved_here_is_refused(tmp_path: Path) -> None:
    assert not orbax.is_orbax(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"was not written by jaxserve \(jaxserve.json cannot"
    ):
        orbax.restore(tmp_path, {})
    (tmp_path / "jaxserve.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"jaxserve.json has format 99 and this version rea"):
        orbax.read_metadata(tmp_path)
