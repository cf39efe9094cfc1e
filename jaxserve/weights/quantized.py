"""A directory of safetensors whose matrices a tool has quantized, seen as a checkpoint.

Each quantized matrix goes by the name that its plain one would have. Which tools' files are read,
and what their config says, is in ``schemes.py``; how their tensors are taken apart, in
``linears.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights.linears import SUFFIXES, Linear
from jaxserve.weights.reading import Index, resolve_index
from jaxserve.weights.safetensors import SafetensorsCheckpoint
from jaxserve.weights.schemes import Method, Scheme
from pallas_kernels.quantized_matmul import Spec, packed_int4

if TYPE_CHECKING:
    from pallas_kernels.quantized_matmul import Format


class QuantizedCheckpoint:
    """A directory with ``config.json``, which has a ``quantization_config``, and safetensors."""

    def __init__(self, files: SafetensorsCheckpoint, scheme: Scheme) -> None:
        """Finds the quantized matrices; ``files`` is closed with it."""
        self.source = files.source
        self.config: dict[str, Any] = files.config
        self.method: Method = scheme.method
        self.group_of_rows = scheme.held_group
        self._files, self._scheme = files, scheme
        first = Linear.first_tensor(scheme)
        ending = ".weight_scale" if first == "weight" else f".{first}"
        modules = [name.removesuffix(ending) for name in files.names() if name.endswith(ending)]
        if not modules:
            raise CheckpointError(
                f"{files.source} is {scheme.method} by its config.json and has no tensor that ends "
                f"in {ending}; fetch it again"
            )
        self._linears = {f"{name}.weight": Linear(files, name, scheme) for name in modules}
        self._parts = {
            f"{module}.{suffix}" for module in modules for suffix in SUFFIXES[scheme.method]
        }

    def names(self) -> list[str]:
        """Returns the tensor names; a quantized matrix has one."""
        plain = (name for name in self._files.names() if name not in self._parts)
        return [*(name for name in plain if name not in self._linears), *self._linears]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, ``[out, in]`` for a matrix."""
        linear = self._linears.get(name)
        return self._files.shape(name) if linear is None else linear.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the dtype that ``read`` gives; float32 for quantized matrices."""
        return np.dtype(np.float32) if name in self._linears else self._files.dtype(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads one tensor or a box of it; what is quantized in float32, columns in order."""
        linear = self._linears.get(name)
        if linear is None:
            return self._files.read(name, index)
        rows, columns = (slice(*span) for span in resolve_index(name, linear.shape, index))
        if linear.order is None:
            return _numbers(linear, rows, columns)
        stored = _numbers(linear, rows, slice(0, linear.shape[1]))
        out = np.empty_like(stored)
        out[:, linear.order] = stored
        return out[:, columns]

    def stored_format(self, name: str) -> Format | None:
        """Returns the format of a quantized matrix; None for another, or bytes off the middle."""
        linear = self._linears.get(name)
        if linear is None or not linear.is_exact:
            return None
        scheme = self._scheme
        return Spec(scheme.kind, scheme.group, linear.order is not None).name

    def stored_as(self, name: str) -> str | None:
        """Returns what people call what a matrix is stored as; None for plain numbers."""
        if name not in self._linears:
            return None
        return f"{self._scheme.method} of {self._scheme.bits} bits"

    def says_nothing(self, name: str) -> bool:
        """Whether it is a bias of zeros, which some versions give every matrix that they pack."""
        matrix, _, end = name.rpartition(".")
        has_matrix = end == "bias" and f"{matrix}.weight" in self._linears
        return has_matrix and not self._files.read(name).any()

    def read_order(self, name: str) -> np.ndarray | None:
        """Returns which column of the activations each stored column is for."""
        linear = self._linears.get(name)
        return None if linear is None else linear.order

    def read_stored(self, name: str, array: str, index: Index) -> np.ndarray:
        """Reads a box of one array of a quantized matrix; see ``Checkpoint``."""
        linear = self._linears[name]
        rows, last = index
        if array == "values":
            per = 2 if self._scheme.kind == "int4" else 1
            values = linear.values(rows, slice(last.start * per, last.stop * per))
            if self._scheme.kind == "int4":
                return packed_int4(np.ascontiguousarray(values))
            if values.dtype == np.uint8:
                return (values ^ np.uint8(128)).view(np.int8)
            return values
        scales = linear.scales(rows, last)
        if self._scheme.kind == "fp8":
            return scales.astype(np.float32)
        if array == "minimum":
            scales = -scales.astype(np.float32) * linear.zeros(rows, last)
        return _as_float16(self.source, name, scales)

    def tokenizer_files(self) -> TokenizerSource:
        """Reads the tokenizer's files, as far as they exist."""
        return self._files.tokenizer_files()

    def digest(self) -> str:
        """Hashes config, tokenizer files and every weight file: SHA-256, hex."""
        return self._files.digest()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()


def _numbers(linear: Linear, rows: slice, columns: slice) -> np.ndarray:
    """The numbers of a box, by the tools' own definition, in float32; columns as stored."""
    group = linear.group
    groups = slice(columns.start // group, -(-columns.stop // group))
    within = columns.start - groups.start * group

    def spread(array: np.ndarray) -> np.ndarray:
        wide = array.repeat(group, axis=1)
        return wide[:, within : within + columns.stop - columns.start]

    values = linear.values(rows, columns)
    out = values.astype(np.float32)
    if values.dtype == np.uint8:
        out -= spread(linear.zeros(rows, groups))
    return out * spread(linear.scales(rows, groups).astype(np.float32))


def _as_float16(source: str, name: str, numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float16)
    if not (finite := np.isfinite(rounded)).all():
        raise CheckpointError(
            f"{source}: a scale or minimum of {name!r} is {numbers[~finite][0]:g}, and float16 "
            f"ends at {np.finfo(np.float16).max:g}; give --quantization none"
        )
    return rounded
