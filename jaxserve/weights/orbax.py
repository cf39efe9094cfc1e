"""Saves and restores placed parameters, with what is needed to serve them beside them.

    DIRECTORY/
    ├── jaxserve.json      format version and the caller's metadata (config, model digest)
    ├── tokenizer/         the tokenizer's files, or gguf.json for one that came out of GGUF
    └── params/            orbax's own

Unlike a ``Checkpoint``, the tree here is the program's own (names, stacked layers, dtypes). Orbax
writes the tree; what is in its arrays goes in and out through TensorStore, which orbax stores them
with, in pieces. Orbax writes and reads whole shards: what waits for a slow disk is a second copy of
them, and what was read another, which a CPU device then copies. Orbax is imported where it is used:
it takes a second, and most launches read other formats.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer_source import TOKENIZER_FILES, TokenizerSource
from jaxserve.weights.reading import Index
from sharding.placement import host_zeros

FORMAT = 1
MARKER = "jaxserve.json"
CHUNK_BYTES = 4 << 20
"""A chunk is read as a whole. Small: more of them to find. Large: a box reads more beside it."""
PIECE_BYTES = 8 << 20
"""Read or written at a time: what waits to be decompressed, or for the disk, is in memory too.
Without pieces loading a gigabyte needed 0.26 of one beside the weights; with them loading needs
0.04 and saving 0.09 (bench/load_memory.py)."""
_GGUF_FILE = "gguf.json"


def is_orbax(path: Path) -> bool:
    """Whether ``save`` wrote this directory, completely."""
    return (path / MARKER).is_file()


def check_new(path: Path) -> None:
    """Finds out that ``save`` would refuse a path before anything is loaded.

    Raises:
        CheckpointError: it exists, or nothing can be written there.
    """
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already; remove it or save under another name")
    partial = _partial(path)
    try:
        partial.mkdir(parents=True)
        partial.rmdir()
    except OSError as error:
        raise _unwritable(path, error) from error


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def _unwritable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)[:500]
    return CheckpointError(
        f"{path} cannot be written: {reason}; check the path, its permissions and the disk's free "
        "space"
    )


def save(
    path: Path,
    params: Any,
    metadata: Mapping[str, Any],
    tokenizer: TokenizerSource | None = None,
    *,
    split: Any = None,
) -> None:
    """Writes parameters, metadata and tokenizer into a new directory.

    The directory gets its name last, so one that exists is complete.

    Args:
        path: must not exist.
        params: nested dicts of jax or numpy arrays, of one axis at least and dtypes that jax has.
        metadata: anything JSON; by convention ``config`` and ``model_digest``.
        tokenizer: copied, so that the directory can be served alone.
        split: for each parameter a ``Split``, which axes are cut at every entry.

    Raises:
        CheckpointError: the path exists or cannot be written, or JAX runs without a CPU.
    """
    path = path.absolute()
    check_new(path)
    partial = _partial(path)

    split = jax.tree.map(lambda _: Split(), params) if split is None else split
    try:
        partial.mkdir(parents=True)
        try:
            _write_tree(partial, params, split)
            for keys, array in _leaves(params):
                _write_array(_open(partial, _name(keys), write=True), array)
        except ValueError as error:  # What TensorStore raises when a disk is full.
            raise _unwritable(path, error) from error
        if tokenizer is not None:
            _write_tokenizer(partial / "tokenizer", tokenizer)
        document = {"format": FORMAT, "metadata": dict(metadata)}
        (partial / MARKER).write_text(json.dumps(document, indent=1), "utf-8")
        partial.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tree(path: Path, params: Any, split: Any) -> None:
    """Has orbax write names, shapes, dtypes and chunks of the parameters, and zeros into them.

    The zeros are one buffer that is never written, so they take no memory.
    """
    import orbax.checkpoint as ocp

    largest = max((array.nbytes for array in jax.tree.leaves(params)), default=0)
    zeros = host_zeros((largest,), np.uint8)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise CheckpointError(
            f"weights cannot be saved: {error}; unset JAX_PLATFORMS, or add cpu to it"
        ) from error

    def hollow(array: Any) -> jax.Array:
        view = zeros[: array.nbytes].view(array.dtype).reshape(array.shape)
        return jax.device_put(view, cpu)

    def save_args(axes: Split) -> ocp.SaveArgs:
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes.axes)

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeSave(
            jax.tree.map(hollow, params), save_args=jax.tree.map(save_args, split)
        )
        checkpointer.save(path / "params", args=args)


def _write_array(stored: ts.TensorStore, array: jax.Array | np.ndarray) -> None:
    """Writes the shards of one parameter, piece by piece: the next when one is on the disk."""
    for index, data in _shards(array):
        start = tuple(part.start for part in index)
        for piece in _pieces(stored, index):
            values = data[_moved(piece, start)]
            stored[piece].write(values, can_reference_source_data_indefinitely=True).result()


def _shards(array: jax.Array | np.ndarray) -> Iterator[tuple[Index, np.ndarray]]:
    """Every part of an array, once, on the host."""
    if isinstance(array, np.ndarray):
        yield tuple(slice(0, size) for size in array.shape), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            ends = (part.indices(size) for part, size in zip(shard.index, array.shape, strict=True))
            yield tuple(slice(start, stop) for start, stop, _ in ends), np.asarray(shard.data)


@dataclass(frozen=True)
class Split:
    """How one parameter is cut into chunks, beside their size."""

    axes: tuple[int, ...] = ()
    """Cut at every entry, so that a box that has few of them reads little else."""


class StoredArray:
    """One saved parameter, of which boxes are read: no more than the chunks that they touch."""

    def __init__(self, path: Path, name: str) -> None:
        """Opens it; ``name`` is its keys, joined with dots."""
        self._path = path
        with _damage(path):
            self._array = _open(path, name)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fills ``out`` with a box, cast to its dtype.

        Raises:
            CheckpointError: the data is damaged.
        """
        start = tuple(part.start for part in index)
        with _damage(self._path):
            for piece in _pieces(self._array, index):
                into = out[_moved(piece, start)]
                box = self._array[piece]
                if out.dtype == self._array.dtype.numpy_dtype:
                    ts.array(into).write(box.translate_to[0]).result()
                else:
                    into[...] = box.read().result()


def _open(path: Path, name: str, *, write: bool = False) -> ts.TensorStore:
    base = {"driver": "file", "path": f"{path / 'params'}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "fill_missing_data_reads": False,  # What is lost is not zero.
    }
    return ts.open(spec, read=True, write=write).result()


def _pieces(stored: ts.TensorStore, index: Index, axis: int = 0) -> Iterator[Index]:
    """Cuts a box, between chunks, into pieces of bounded size: along the first axes that do."""
    chunk = stored.chunk_layout.read_chunk.shape
    assert chunk is not None, "save says what chunks are"
    part, rows = index[axis], chunk[axis] or 1
    below = math.prod(part.stop - part.start for part in index[axis + 1 :])
    rows_bytes = max(1, rows * below * stored.dtype.numpy_dtype.itemsize)
    step = max(1, PIECE_BYTES // rows_bytes) * rows
    start = part.start
    while start < part.stop:
        stop = min(start - start % step + step, part.stop)
        piece = (*index[:axis], slice(start, stop), *index[axis + 1 :])
        if rows_bytes > PIECE_BYTES and axis + 1 < len(index):
            yield from _pieces(stored, piece, axis + 1)
        else:
            yield piece
        start = stop


def _moved(index: Index, start: Sequence[int]) -> Index:
    """A box, seen from where another one starts."""
    return tuple(
        slice(part.start - zero, part.stop - zero) for part, zero in zip(index, start, strict=True)
    )


def open_arrays(path: Path, abstract: Any) -> Any:
    """Opens what ``save`` wrote.

    Args:
        path: the directory.
        abstract: nested dicts of anything with the ``shape`` that is expected.

    Returns:
        The same tree of ``StoredArray``.

    Raises:
        CheckpointError: not such a directory, damaged, or of another tree or other shapes.
    """
    import orbax.checkpoint as ocp

    path = path.absolute()
    read_metadata(path)
    with _damage(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(path / "params").item_metadata
        if stored is None:
            raise CheckpointError(
                f"{path} is damaged (its parameters are not found); save it again from the "
                "original checkpoint"
            )
        _check_tree(path, getattr(stored, "tree", stored), abstract)

    def opened(keys: tuple[Any, ...], _: Any) -> StoredArray:
        return StoredArray(path, _name(keys))

    return jax.tree.map_with_path(opened, abstract, is_leaf=lambda leaf: hasattr(leaf, "shape"))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What is raised while reading is a damaged checkpoint."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:500]}); save it again from "
            "the original checkpoint"
        ) from error


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata given to ``save``.

    Raises:
        CheckpointError: not such a directory, or of another format version.
    """
    try:
        document = json.loads((path / MARKER).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} was not written by jaxserve ({MARKER} cannot be read: {error}); give a "
            "directory that jaxserve saved"
        ) from None
    match document:
        case {"format": int(number), "metadata": dict(metadata)} if number == FORMAT:
            return metadata
    found = document.get("format") if isinstance(document, dict) else None
    raise CheckpointError(
        f"{path / MARKER} has format {found!r} and this version reads {FORMAT}; save it again from "
        "the original checkpoint"
    )


def read_tokenizer(path: Path) -> TokenizerSource:
    """Returns the tokenizer given to ``save``; empty when there was none."""
    directory = path / "tokenizer"
    gguf = directory / _GGUF_FILE
    try:
        if gguf.is_file():
            return TokenizerSource(source=str(path), gguf=json.loads(gguf.read_bytes()))
        files = {
            name: (directory / name).read_bytes()
            for name in TOKENIZER_FILES
            if (directory / name).is_file()
        }
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} cannot be read ({error}); save it again from the original checkpoint"
        ) from error
    return TokenizerSource(source=str(path), files=files)


def _check_tree(path: Path, stored: Any, wanted: Any) -> None:
    """Compares names and shapes first: orbax would leave half-done reads behind."""
    found = {jax.tree_util.keystr(key): leaf.shape for key, leaf in _leaves(stored)}
    asked = {jax.tree_util.keystr(key): leaf.shape for key, leaf in _leaves(wanted)}
    missing, extra = sorted(asked.keys() - found.keys()), sorted(found.keys() - asked.keys())
    wrong = [
        f"{key} has shape {list(found[key])}, not {list(asked[key])}"
        for key in sorted(asked.keys() & found.keys())
        if tuple(found[key]) != tuple(asked[key])
    ]
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path} holds other parameters: missing {missing[:5]}, unknown {extra[:5]}, "
            f"wrong {wrong[:5]}; save it again from the original checkpoint"
        )


def _name(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in keys)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))


def _write_tokenizer(directory: Path, tokenizer: TokenizerSource) -> None:
    directory.mkdir()
    for name, raw in tokenizer.files.items():
        (directory / name).write_bytes(raw)
    if tokenizer.gguf is not None:
        (directory / _GGUF_FILE).write_text(json.dumps(dict(tokenizer.gguf)), "utf-8")
