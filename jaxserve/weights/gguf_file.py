"""The GGUF container: header, metadata and the table of tensors, with every size checked.

    magic "GGUF" | version | tensor count | metadata count | metadata | tensor table | pad | data

Written here instead of using the ``gguf`` package's reader because that one trusts its input: a
flipped length byte costs it minutes or an IndexError. Dequantization is still that package's.
What the metadata means is left to ``gguf_config.py``.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxserve.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_SCALARS = {
    0: ("B", np.uint8),
    1: ("b", np.int8),
    2: ("H", np.uint16),
    3: ("h", np.int16),
    4: ("I", np.uint32),
    5: ("i", np.int32),
    6: ("f", np.float32),
    7: ("?", np.bool_),
    10: ("Q", np.uint64),
    11: ("q", np.int64),
    12: ("d", np.float64),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Row-major, so ``[out, in]`` for a matrix; the file stores it reversed."""
    type: GGMLQuantizationType
    offset: int
    """Byte in the file."""
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """All of a GGUF file but the tensor data."""

    path: str
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: os.PathLike[str] | str) -> GgufHeader:
    """Parses and checks everything before the tensor data, and where the data lies.

    Raises:
        CheckpointError: the file is empty, truncated, corrupt or not GGUF.
        UnsupportedModelError: a tensor has a storage type that nobody knows.
    """
    path = os.fspath(path)
    try:
        # Thousands of short strings follow; a large buffer makes each read a memory copy.
        with open(path, "rb", buffering=1 << 20) as file:
            size = os.fstat(file.fileno()).st_size
            return _Parser(path, size, file).parse()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from error


class _Parser:
    """Walks the header once, refusing any count that the rest of the file cannot hold."""

    def __init__(self, path: str, size: int, file: BinaryIO) -> None:
        self.path = path
        self.size = size
        self.file = file
        self.at = 0

    def parse(self) -> GgufHeader:
        if self.size == 0:
            raise CheckpointError(f"{self.path} is empty (0 bytes); fetch it again")
        magic = self._take(4, "the magic number")
        if magic != MAGIC:
            raise CheckpointError(
                f"{self.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}"
            )
        version = self._number("I", "the version")
        if version not in VERSIONS:
            hint = " (big-endian?)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(
                f"{self.path} has GGUF version {version}{hint}; versions "
                f"{' and '.join(map(str, VERSIONS))} (little-endian) can be read: convert it again"
            )
        tensor_count = self._number("Q", "the tensor count")
        metadata_count = self._number("Q", "the metadata count")
        # The least entry: an empty string and one byte, or an empty string and no axes.
        self._check_count("metadata entries", metadata_count, 13)
        self._check_count("tensors", tensor_count, 24)
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._corrupt(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(self._number("I", f"the type of {key}"), key)
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        return GgufHeader(
            self.path, self.size, metadata, self._place(entries, self._alignment(metadata))
        )

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind][0], key)
        if kind != _ARRAY:
            raise self._corrupt(f"metadata {key!r} has unknown type {kind}")
        kind = self._number("I", f"the element type of {key}")
        count = self._number("Q", f"the length of {key}")
        if kind == _STRING:
            return self._strings(key, count)
        if kind not in _SCALARS:
            raise self._corrupt(f"metadata {key!r} is an array of unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind][1])
        self._check_count(f"values in {key}", count, dtype.itemsize)
        raw = self._take(count * dtype.itemsize, key)
        return np.frombuffer(raw, dtype.newbyteorder("<")).tolist()

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string("a tensor name")
        axes = self._number("I", f"the axis count of {name}")
        if not 1 <= axes <= MAX_AXES:
            raise self._corrupt(f"tensor {name!r} has {axes} axes; 1 to {MAX_AXES} are possible")
        shape = tuple(self._number("Q", f"the shape of {name}") for _ in range(axes))[::-1]
        number = self._number("I", f"the type of {name}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._corrupt(f"tensor {name!r} has unknown storage type {number}") from None
        return name, shape, kind, self._number("Q", f"the offset of {name}")

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._corrupt(
                f"general.alignment is {alignment!r}; it must be a power of two of at most "
                f"{MAX_ALIGNMENT}"
            )
        return alignment

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._corrupt(f"tensor {name!r} appears twice")
            if offset % alignment:
                raise self._corrupt(
                    f"tensor {name!r} starts at {offset}, not a multiple of {alignment}"
                )
            nbytes = self._tensor_bytes(name, shape, kind)
            start, end = data_start + offset, data_start + offset + nbytes
            if end > self.size:
                raise CheckpointError(
                    f"{self.path} is truncated or corrupt: tensor {name!r} needs bytes {start} to "
                    f"{end} and the file has {self.size}; fetch it again"
                )
            tensors[name] = GgufTensor(name, shape, kind, start, nbytes)
        ordered = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
        for left, right in itertools.pairwise(ordered):
            if left.offset + left.nbytes > right.offset:
                raise self._corrupt(
                    f"tensors {left.name!r} (bytes {left.offset} to {left.offset + left.nbytes}) "
                    f"and {right.name!r} (from {right.offset}) overlap"
                )
        return tensors

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
        if kind not in GGML_QUANT_SIZES:
            raise self._corrupt(f"tensor {name!r} has storage type {kind.name} of unknown size")
        group, group_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % group:
            raise self._corrupt(
                f"tensor {name!r} has shape {list(shape)}; {kind.name} needs rows of a positive "
                f"multiple of {group} values"
            )
        return math.prod(shape) // group * group_bytes

    def _string(self, what: str) -> str:
        length = self._number("Q", f"a string's length ({what})")
        raw = self._take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"{what} is not UTF-8 ({error.reason})") from None

    def _strings(self, key: str, count: int) -> list[str]:
        """Reads a vocabulary's worth of strings: ``_string`` without its calls, for speed."""
        self._check_count(f"strings in {key}", count, 8)
        read, unpack, words = self.file.read, struct.Struct("<Q").unpack, []
        at, size = self.at, self.size
        for _ in range(count):
            head = read(8)
            length = unpack(head)[0] if len(head) == 8 else size
            at += 8 + length
            if at > size:
                raise CheckpointError(
                    f"{self.path} is truncated or corrupt: string {len(words)} of {key} ends at "
                    f"byte {at} and the file has {size}; fetch it again"
                )
            words.append(read(length))
        self.at = at
        try:
            return [word.decode("utf-8") for word in words]
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a string in {key} is not UTF-8 ({error.reason})") from None

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize(code), what))[0]

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        left = self.size - self.at
        if count * least_bytes > left:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: {count} {what} are announced at byte "
                f"{self.at} and only {left} bytes follow; fetch it again"
            )

    def _take(self, count: int, what: str) -> bytes:
        left = self.size - self.at
        if count > left:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: {what} needs {count} bytes at byte "
                f"{self.at} and {left} are left; fetch it again"
            )
        raw = self.file.read(count)
        self.at += count
        if len(raw) != count:
            raise CheckpointError(f"{self.path} became shorter while it was read; fetch it again")
        return raw

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is corrupt: {what}; fetch it again")
