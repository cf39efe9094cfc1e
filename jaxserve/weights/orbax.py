"""Saves and restores placed parameters, with what is needed to serve them beside them.

    DIRECTORY/
    ├── jaxserve.json      format version and the caller's metadata (config, model digest)
    ├── tokenizer/         the tokenizer's files, or gguf.json for one that came out of GGUF
    └── params/            orbax's own

Unlike a ``Checkpoint``, the tree here is the program's own (names, stacked layers, dtypes). Orbax
writes it; boxes of it are read through TensorStore, which orbax stores arrays with, because orbax
restores whole shards, all at once, into memory that a CPU device then copies: twice the weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer_source import TOKENIZER_FILES, TokenizerSource

FORMAT = 1
MARKER = "jaxserve.json"
CHUNK_BYTES = 4 << 20
"""A chunk is read as a whole. Small: more of them to find. Large: a box reads more beside it."""
FILE_BYTES = 16 << 20
"""Of a data file, which is put together in memory. Saving a gigabyte needed 0.2 of one beside the
weights with 16 MiB, 0.6 with 128 MiB and 1.0 with orbax's 2 GiB (bench/load_memory.py)."""
PIECE_BYTES = 32 << 20
"""Read at a time: what waits to be decompressed is in memory too. Without pieces loading a gigabyte
needed 0.26 of one beside the weights, with them 0.06."""
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


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error.strerror or error}; check the path, its permissions and "
        "the disk's free space"
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
        params: nested dicts of jax or numpy arrays.
        metadata: anything JSON; by convention ``config`` and ``model_digest``.
        tokenizer: copied, so that the directory can be served alone.
        split: for each parameter a ``Split``, which axes are cut at every entry.

    Raises:
        CheckpointError: the path exists or cannot be written.
    """
    path = path.absolute()
    check_new(path)
    partial = _partial(path)

    def save_args(axes: Split) -> ocp.SaveArgs:
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes.axes)

    split = jax.tree.map(lambda _: Split(), params) if split is None else split
    try:
        partial.mkdir(parents=True)
        with ocp.Checkpointer(_one_at_a_time(params)) as checkpointer:
            args = ocp.args.PyTreeSave(
                params,
                save_args=jax.tree.map(save_args, split),
                ocdbt_target_data_file_size=FILE_BYTES,
            )
            checkpointer.save(partial / "params", args=args)
        if tokenizer is not None:
            _write_tokenizer(partial / "tokenizer", tokenizer)
        document = {"format": FORMAT, "metadata": dict(metadata)}
        (partial / MARKER).write_text(json.dumps(document, indent=1), "utf-8")
        partial.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _one_at_a_time(params: Any) -> ocp.PyTreeCheckpointHandler:
    """Writes as much at once as the largest parameter: what waits for the disk is held."""
    largest = max((array.nbytes for array in jax.tree.leaves(params)), default=0)
    # What may be in flight has to be more than any parameter; this class takes it in bytes.
    limited = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=largest + 1)
    return ocp.PyTreeCheckpointHandler(handler_impl=limited)


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
        base = {"driver": "file", "path": f"{path / 'params'}/"}
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
            "fill_missing_data_reads": False,  # What is lost is not zero.
        }
        with _damage(path):
            self._array = ts.open(spec, read=True).result()

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills ``out`` with a box, cast to its dtype.

        Raises:
            CheckpointError: the data is damaged.
        """
        with _damage(self._path):
            for piece in self._pieces(index):
                start = piece.start - index[0].start
                into = out[start : start + piece.stop - piece.start]
                box = self._array[(piece, *index[1:])]
                if out.dtype == self._array.dtype.numpy_dtype:
                    ts.array(into).write(box.translate_to[0]).result()
                else:
                    into[...] = box.read().result()

    def _pieces(self, index: tuple[slice, ...]) -> Iterator[slice]:
        """Cuts a box along its first axis, between chunks, into pieces of bounded size."""
        rows = index[0]
        chunk = self._array.chunk_layout.read_chunk.shape
        assert chunk is not None, "save says what chunks are"
        chunk_rows = chunk[0] or 1
        row_values = math.prod(part.stop - part.start for part in index[1:])
        row_bytes = max(1, row_values * self._array.dtype.numpy_dtype.itemsize)
        step = max(1, PIECE_BYTES // (row_bytes * chunk_rows)) * chunk_rows
        start = rows.start
        while start < rows.stop:
            stop = min(start - start % step + step, rows.stop)
            yield slice(start, stop)
            start = stop


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
        return StoredArray(path, ".".join(str(key.key) for key in keys))

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


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))


def _write_tokenizer(directory: Path, tokenizer: TokenizerSource) -> None:
    directory.mkdir()
    for name, raw in tokenizer.files.items():
        (directory / name).write_bytes(raw)
    if tokenizer.gguf is not None:
        (directory / _GGUF_FILE).write_text(json.dumps(dict(tokenizer.gguf)), "utf-8")
