"""A Hugging Face directory seen as a checkpoint: ``config.json`` and safetensors, whole or sharded.

    8 bytes: header length | JSON header: name -> dtype, shape, data_offsets | data

The header is parsed here, because slices must read only their own bytes and every offset must be
checked first. Nothing is ever unpickled and ``auto_map`` (code from the checkpoint) is ignored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.tokenizer_source import TOKENIZER_FILES, TokenizerSource
from jaxserve.weights.reading import ByteFile, Index, read_spans, resolve_index

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own implementation."""
MAX_JSON_BYTES = 256 << 20

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_RAW = {
    **DTYPES,
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What parts of quantized matrices are stored as."""
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1}
_SIZES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: ByteFile
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint:
    """A directory with ``config.json`` and ``*.safetensors``."""

    def __init__(self, path: Path) -> None:
        """Reads the config and the header of every file, and checks them against the index."""
        self.source = str(path)
        self._path = path
        config_path = path / "config.json"
        if not config_path.exists():
            raise CheckpointError(f"{path} has no config.json; fetch the whole checkpoint again")
        self.config: dict[str, Any] = read_json_object(config_path)
        self._files: list[ByteFile] = []
        self._tensors: dict[str, StoredTensor] = {}
        try:
            self._open_files()
        except CheckpointError:
            self.close()
            raise

    def names(self) -> list[str]:
        """Returns the tensor names as stored."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns a tensor's dtype."""
        tensor = self._tensor(name)
        if tensor.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{tensor.file.path} stores {name!r} as {tensor.dtype}; supported are "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[tensor.dtype]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads one tensor, or only the bytes of a box of it."""
        tensor = self._tensor(name)
        spans = resolve_index(name, tensor.shape, index)
        return read_spans(tensor.file, tensor.offset, tensor.shape, self.dtype(name), spans)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def dtype_name(self, name: str) -> str:
        """Returns a tensor's dtype as the file names it."""
        return self._tensor(name).dtype

    def read_raw(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a box of a tensor that may be part of a quantized matrix."""
        tensor = self._tensor(name)
        spans = resolve_index(name, tensor.shape, index)
        return read_spans(tensor.file, tensor.offset, tensor.shape, _RAW[tensor.dtype], spans)

    def stored_format(self, name: str) -> None:
        """Returns None: tensors are plain numbers."""

    def stored_as(self, name: str) -> None:
        """Returns None, likewise."""

    def says_nothing(self, name: str) -> bool:
        """Returns False: no tool adds tensors."""
        return False

    def read_order(self, name: str) -> None:
        """Returns None, likewise."""

    def read_stored(self, name: str, array: str, index: Index) -> np.ndarray:
        """Is never asked for: see ``stored_format``."""
        raise NotImplementedError(f"{name} is stored as plain numbers, without {array}")

    def tokenizer_files(self) -> TokenizerSource:
        """Reads the tokenizer's files, as far as they exist."""
        return read_tokenizer_files(self._path)

    def digest(self) -> str:
        """Hashes config, tokenizer files and every weight file: SHA-256, hex."""
        total = hashlib.sha256()
        paths = [self._path / name for name in TOKENIZER_FILES]
        paths += [Path(file.path) for file in self._files]
        for path in sorted(path for path in paths if path.is_file()):
            with path.open("rb") as file:
                total.update(f"{path.name}\0".encode())
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()

    def _tensor(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}; the checkpoint is incomplete or its "
                "config.json belongs to another one"
            ) from None

    def _open_files(self) -> None:
        index_path = self._path / INDEX_FILE
        weight_map: dict[str, Any] | None = None
        if index_path.exists():
            weight_map = read_json_object(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) for shard in weight_map.values()
            ):
                raise CheckpointError(f"{index_path} has no usable weight_map; fetch it again")
            shards = sorted(set(weight_map.values()))
        elif (self._path / SINGLE_FILE).exists():
            shards = [SINGLE_FILE]
        else:
            shards = sorted(path.name for path in self._path.glob("*.safetensors"))
        for shard in shards:
            self._open_shard(shard)
        if weight_map is not None:
            self._check_index(index_path, weight_map)

    def _open_shard(self, shard: str) -> None:
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{self._path / INDEX_FILE} names the file {shard!r}; only plain file names beside "
                "it are followed"
            )
        if not (self._path / shard).exists():
            raise CheckpointError(
                f"{self._path / INDEX_FILE} names {shard}, which is missing; fetch it"
            )
        file = ByteFile(self._path / shard)
        self._files.append(file)
        for name, tensor in read_table(file).items():
            if name in self._tensors:
                raise CheckpointError(
                    f"{file.path} and {self._tensors[name].file.path} both hold {name!r}; "
                    f"remove the one that {INDEX_FILE} does not name"
                )
            self._tensors[name] = tensor

    def _check_index(self, index_path: Path, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            tensor = self._tensors.get(name)
            if tensor is None or Path(tensor.file.path).name != shard:
                raise CheckpointError(
                    f"{index_path} says that {shard} holds {name!r} and it does not; "
                    "fetch the checkpoint again"
                )


def read_table(file: ByteFile) -> dict[str, StoredTensor]:
    """Parses and checks the header of one safetensors file.

    Raises:
        CheckpointError: the file is empty, truncated or corrupt.
    """
    if file.size < 8:
        raise CheckpointError(
            f"{file.path} has {file.size} bytes and a safetensors file has at least 8; "
            "fetch it again"
        )
    (header_bytes,) = struct.unpack("<Q", file.read(0, 8))
    data_bytes = file.size - 8 - header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_bytes < 0:
        raise CheckpointError(
            f"{file.path} is truncated or corrupt: its header claims {header_bytes} bytes; the "
            f"file has {file.size} and the limit is {MAX_HEADER_BYTES}; fetch it again"
        )
    header = parse_json_object(file.path, file.read(8, header_bytes))
    tensors = {}
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, start, end = _check_entry(file, name, entry, data_bytes)
        tensors[name] = StoredTensor(file, dtype, shape, 8 + header_bytes + start)
        ranges.append((start, end, name))
    ranges.sort()
    for (_, end, left), (start, _, right) in itertools.pairwise(ranges):
        if start < end:
            raise CheckpointError(
                f"{file.path} is corrupt: tensors {left!r} and {right!r} overlap at byte {start}; "
                "fetch it again"
            )
    return tensors


def _check_entry(
    file: ByteFile, name: str, entry: Any, data_bytes: int
) -> tuple[str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, start, end)
        ):
            pass
        case _:
            raise CheckpointError(
                f"{file.path} is corrupt: the entry of {name!r} must have dtype, shape and "
                f"data_offsets, got {str(entry)[:80]}; fetch it again"
            )
    if dtype not in _SIZES:
        raise UnsupportedModelError(
            f"{file.path} stores {name!r} as {dtype[:40]}; supported are {', '.join(DTYPES)}"
        )
    nbytes = math.prod(shape) * _SIZES[dtype]
    if end - start != nbytes:
        raise CheckpointError(
            f"{file.path} is corrupt: {name!r} of shape {shape} and type {dtype} needs {nbytes} "
            f"bytes and has {end - start}; fetch it again"
        )
    if end > data_bytes:
        raise CheckpointError(
            f"{file.path} is truncated: {name!r} ends at data byte {end} and the file has "
            f"{data_bytes}; fetch it again"
        )
    return dtype, tuple(shape), start, end


def read_tokenizer_files(path: Path) -> TokenizerSource:
    """Reads those files of a directory that a tokenizer is built from, as far as they exist."""
    files = {name: path / name for name in TOKENIZER_FILES}
    present = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    return TokenizerSource(source=str(path), files=present)


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes and the limit is {MAX_JSON_BYTES}; "
                "fetch it again"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from error
    return parse_json_object(str(path), raw)


def parse_json_object(path: str, raw: bytes) -> dict[str, Any]:
    """Parses JSON whose top level is an object."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is corrupt: {len(raw)} bytes that are not JSON ({str(error)[:80]}); "
            "fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is corrupt: a JSON object is expected; fetch it again")
    return value
