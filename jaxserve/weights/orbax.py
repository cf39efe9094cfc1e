"""Saves and restores placed parameters, with what is needed to serve them beside them.

    DIRECTORY/
    ├── jaxserve.json      format version and the caller's metadata (config, model digest)
    ├── tokenizer/         the tokenizer's files, or gguf.json for one that came out of GGUF
    └── params/            orbax's own

Unlike a ``Checkpoint``, the tree here is the program's own (names, stacked layers, dtypes), and
every device reads only its shard. The one file of ``weights/`` that imports jax.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer_source import TOKENIZER_FILES, TokenizerSource

FORMAT = 1
MARKER = "jaxserve.json"
_GGUF_FILE = "gguf.json"


def is_orbax(path: Path) -> bool:
    """Whether ``save`` wrote this directory, completely."""
    return (path / MARKER).is_file()


def save(
    path: Path, params: Any, metadata: Mapping[str, Any], tokenizer: TokenizerSource | None = None
) -> None:
    """Writes parameters, metadata and tokenizer into a new directory.

    The directory gets its name last, so one that exists is complete.

    Args:
        path: must not exist.
        params: nested dicts of jax arrays.
        metadata: anything JSON; by convention ``config`` and ``model_digest``.
        tokenizer: copied, so that the directory can be served alone.

    Raises:
        CheckpointError: the path exists or cannot be written.
    """
    path = path.absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already; remove it or save under another name")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "params", params)
            checkpointer.wait_until_finished()
        if tokenizer is not None:
            _write_tokenizer(partial / "tokenizer", tokenizer)
        document = {"format": FORMAT, "metadata": dict(metadata)}
        (partial / MARKER).write_text(json.dumps(document, indent=1), "utf-8")
        partial.rename(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}; check the disk's free space and "
            "the permissions"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def restore(path: Path, abstract: Any) -> Any:
    """Reads parameters straight into their shardings.

    Args:
        path: what ``save`` wrote.
        abstract: nested dicts of ``jax.ShapeDtypeStruct`` with shardings; arrays are cast to its
            dtypes.

    Raises:
        CheckpointError: not such a directory, damaged, or of another tree or other shapes.
    """
    path = path.absolute()
    read_metadata(path)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path / "params").item_metadata
            if stored is None:
                raise CheckpointError(
                    f"{path} is damaged (its parameters are not found); save it again from the "
                    "original checkpoint"
                )
            _check_tree(path, getattr(stored, "tree", stored), abstract)
            return checkpointer.restore(path / "params", abstract)
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
