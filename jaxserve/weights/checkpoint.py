"""One view of a checkpoint on disk, whatever its format, and how to open it.

Formats are recognised by content. Names, shapes and the config follow Hugging Face's conventions,
so that a model is loaded one way. Fetching from a hub is left to ``hub.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights.gguf import GgufCheckpoint
from jaxserve.weights.gguf_file import MAGIC
from jaxserve.weights.reading import Index
from jaxserve.weights.safetensors import INDEX_FILE, SafetensorsCheckpoint
from jaxserve.weights.schemes import scheme_of

if TYPE_CHECKING:  # Reading a tokenizer needs no JAX.
    from pallas_kernels.quantized_matmul import Format

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@runtime_checkable
class Checkpoint(Protocol):
    """A model's config, tensors and tokenizer, read on demand."""

    source: str
    """The path, for people."""
    config: dict[str, Any]
    """In the conventions of Hugging Face's ``config.json``."""

    def names(self) -> list[str]:
        """Returns the tensor names, such as ``model.layers.0.self_attn.q_proj.weight``."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, ``[out, in]`` for a matrix."""
        ...

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the dtype that ``read`` gives: float32, float16 or bfloat16."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads one tensor or a box of it, dequantized; keeps nothing in memory.

        Args:
            name: one of ``names()``.
            index: slices with step 1, one per leading axis; missing axes are whole.

        Raises:
            CheckpointError: no such tensor, or the file ended early.
        """
        ...

    def stored_format(self, name: str) -> Format | None:
        """Returns the format that a tensor is stored in; None for any that is no ``Format``.

        One with an order has its columns in that of ``read_order``.
        """
        ...

    def stored_as(self, name: str) -> str | None:
        """Returns what people call the numbers of few bits that a tensor is stored as.

        None for plain numbers.
        """
        ...

    def says_nothing(self, name: str) -> bool:
        """Whether a tensor that the model has no place for changes no answer."""
        ...

    def read_order(self, name: str) -> np.ndarray | None:
        """Returns, for a stored format with an order, the column of each stored one: int32."""
        ...

    def read_stored(self, name: str, array: str, index: Index) -> np.ndarray:
        """Reads a box of one array of a tensor that has a ``stored_format``; see ``Quantized``.

        Args:
            name: one of ``names()``.
            array: ``values``, ``scale`` or ``minimum``.
            index: slices with step 1, one per axis; the last counts this array's entries, and
                values begin and end at multiples of 32 columns.

        Raises:
            CheckpointError: the file ended early, or a scale is not finite.
        """
        ...

    def tokenizer_files(self) -> TokenizerSource:
        """Returns what the tokenizer is built from."""
        ...

    def digest(self) -> str:
        """Returns the SHA-256 (hex) of config, tokenizer and weights; reads every byte."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file or a directory of safetensors.

    Raises:
        CheckpointError: nothing there, an unsafe format, or a damaged file.
        UnsupportedModelError: a format or architecture that is not implemented.
    """
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a .gguf file, a directory with config.json and "
            "*.safetensors, or a hub id"
        )
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic == MAGIC or path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one safetensors file; give its directory, where config.json lies too"
        )
    raise UnsupportedModelError(
        f"{path} is neither a GGUF file nor a directory; supported are .gguf files and directories "
        "with config.json and *.safetensors"
    )


def _open_directory(path: Path) -> Checkpoint:
    if not any(path.glob("*.safetensors")) and not (path / INDEX_FILE).exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GgufCheckpoint(files[0])
        if files:
            raise CheckpointError(
                f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files[:4])}); "
                "give the path of one"
            )
        pickles = sorted(f for f in path.iterdir() if f.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise _pickle_error(pickles[0])
        raise CheckpointError(
            f"{path} holds no *.safetensors and no *.gguf; give a directory with a checkpoint"
        )
    files = SafetensorsCheckpoint(path)
    try:
        scheme = scheme_of(files.source, files.config)
        if scheme is None:
            return files
        # Reading a tokenizer beside plain numbers needs no JAX.
        from jaxserve.weights.quantized import QuantizedCheckpoint

        return QuantizedCheckpoint(files, scheme)
    except (CheckpointError, UnsupportedModelError):
        files.close()
        raise


def _pickle_error(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is a pickle-based checkpoint, which can run code when it is loaded and is never "
        "opened here; convert it to safetensors"
    )
