"""One quantized matrix of a checkpoint, whatever tool wrote it: values, scales and zero points.

    AWQ    qweight int32 [in, out / 8], in the order 0 2 4 6 1 3 5 7; qzeros [groups, out / 8]
           likewise; scales [groups, out]
    GPTQ   qweight int32 [in x bits / 32, out]; qzeros [groups, out x bits / 32];
           scales [groups, out]; g_idx int32 [in], each column's group
    compressed-tensors
           weight_packed int32 [out, in x bits / 32], or weight [out, in] one by one;
           weight_scale [out, groups], or one; weight_zero_point int32 [out x bits / 32, groups]

A number is ``scale * (value - zero)``. Everything is returned as ``[out, in]`` or
``[out, groups]``; of the files only what is asked for is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.weights.safetensors import SafetensorsCheckpoint
from jaxserve.weights.schemes import Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each four bits of an int32 belong to, from the lowest."""
SUFFIXES = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        # What activations are rounded to elsewhere: here they are not.
        *("input_scale", "input_zero_point"),
    ),
}
"""The tensors that a quantized matrix may have."""


@dataclass(frozen=True)
class Linear:
    """One matrix ``[out, in]``."""

    files: SafetensorsCheckpoint
    module: str
    """The name of its tensors up to the last dot."""
    scheme: Scheme
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Works out the shape, and checks those of all tensors."""
        object.__setattr__(self, "shape", self._shape())
        for name, (shape, dtypes) in self._expected().items():
            if not self.files.has(self._name(name)):
                raise CheckpointError(
                    f"{self.files.source} has no {self._name(name)!r}: a matrix of "
                    f"{self.scheme.method} has {', '.join(self._expected())}; fetch the checkpoint "
                    "again"
                )
            found = self.files.shape(self._name(name))
            dtype = self.files.dtype_name(self._name(name))
            if found not in shape or dtype not in dtypes:
                raise CheckpointError(
                    f"{self.files.source}: {self._name(name)!r} is {dtype}{list(found)}; it must "
                    f"be {' or '.join(dtypes)} {' or '.join(str(list(one)) for one in shape)}, "
                    f"with {self.scheme.bits} bits in groups of {self.group} of a matrix "
                    f"{list(self.shape)}: fetch the checkpoint again, or correct its config.json"
                )

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.scheme.group or self.shape[1]

    @cached_property
    def order(self) -> np.ndarray | None:
        """The column that each stored one is to be, where groups are not contiguous: int32."""
        if self.scheme.method != "gptq" or not self.files.has(self._name("g_idx")):
            return None
        groups = self._read("g_idx")
        if (groups == np.arange(self.shape[1]) // self.group).all():
            return None
        count = self.shape[1] // self.group
        is_known = groups.min() >= 0 and groups.max() < count
        if not is_known or (np.bincount(groups, minlength=count) != self.group).any():
            raise CheckpointError(
                f"{self.files.source}: {self._name('g_idx')!r} does not give every group "
                f"{self.group} columns; fetch the checkpoint again"
            )
        return np.argsort(groups, kind="stable").astype(np.int32)

    @cached_property
    def is_exact(self) -> bool:
        """Whether ``scheme.kind`` has all of its numbers: bytes must be counted from the middle."""
        if self.scheme.kind != "int8" or not self.scheme.has_zeros:
            return True
        out, depth = self.shape
        return bool((self.zeros(slice(0, out), slice(0, depth // self.group)) == 128).all())

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        """Stored values: uint8 when they are packed, counted from 0; int8 or fp8 otherwise.

        Columns are in the order that groups are contiguous in.
        """
        bits, per = self.scheme.bits, 32 // self.scheme.bits
        order = self.order
        match self.scheme.method:
            case "awq":
                low, high = rows.start // per, -(-rows.stop // per)
                packed = self._read("qweight", columns, slice(low, high))
                out = _unpacked(packed, bits, AWQ_ORDER).T
                return out[rows.start - low * per : rows.stop - low * per]
            case "gptq":
                start, stop = (0, self.shape[1]) if order is not None else _bounds(columns)
                low, high = start // per, -(-stop // per)
                packed = self._read("qweight", slice(low, high), rows)
                out = _unpacked(packed.T, bits)
                if order is not None:
                    return out[:, order[columns]]
                return out[:, columns.start - low * per : columns.stop - low * per]
            case "compressed-tensors":
                if not self.scheme.is_packed:
                    return self._read("weight", rows, columns)
                low, high = columns.start // per, -(-columns.stop // per)
                out = _unpacked(self._read("weight_packed", rows, slice(low, high)), bits)
                return out[:, columns.start - low * per : columns.stop - low * per]

    def scales(self, rows: slice, groups: slice) -> np.ndarray:
        """Scales ``[out, groups]`` as they are stored.

        Raises:
            CheckpointError: one of them is not finite.
        """
        count = groups.stop - groups.start
        if self.scheme.method != "compressed-tensors":
            name, scales = "scales", self._read("scales", groups, rows).T
        else:
            name = "weight_scale"
            if math.prod(self.files.shape(self._name(name))) == 1:
                one = self.files.read_raw(self._name(name)).reshape(1, 1)
                scales = np.broadcast_to(one, (rows.stop - rows.start, count))
            else:
                scales = self._read(name, rows).reshape(rows.stop - rows.start, -1)[:, groups]
        if not (finite := np.isfinite(scales)).all():
            raise CheckpointError(
                f"{self.files.source}: {self._name(name)!r} has a scale that is "
                f"{scales[~finite][0]}; fetch the checkpoint again, or quantize it again"
            )
        return scales

    def zeros(self, rows: slice, groups: slice) -> np.ndarray:
        """Zero points ``[out, groups]``, uint8, counted as packed values are."""
        bits, per = self.scheme.bits, 32 // self.scheme.bits
        if not self.scheme.has_zeros:
            shape = (rows.stop - rows.start, groups.stop - groups.start)
            return np.full(shape, 1 << (bits - 1), np.uint8)
        low, high = rows.start // per, -(-rows.stop // per)
        if self.scheme.method == "compressed-tensors":
            out = _unpacked(self._read("weight_zero_point", slice(low, high), groups).T, bits).T
        else:
            order = AWQ_ORDER if self.scheme.method == "awq" else None
            out = _unpacked(self._read("qzeros", groups, slice(low, high)), bits, order).T
        # One less than zero was stored as the largest there is.
        out = (out + np.uint8(self.scheme.zero_shift)) & np.uint8((1 << bits) - 1)
        return out[rows.start - low * per : rows.stop - low * per]

    def _shape(self) -> tuple[int, int]:
        per = 32 // self.scheme.bits
        first = self._name(self._first)
        stored = self.files.shape(first)
        if len(stored) != 2:
            raise CheckpointError(
                f"{self.files.source}: {first!r} has {len(stored)} axes and a matrix has 2; fetch "
                "the checkpoint again"
            )
        match self.scheme.method:
            case "awq":
                return stored[1] * per, stored[0]
            case "gptq":
                return stored[1], stored[0] * per
            case "compressed-tensors":
                return stored[0], stored[1] * (per if self.scheme.is_packed else 1)

    def _expected(self) -> dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]]:
        """Shapes and dtypes that tensors may have."""
        (out, depth), per = self.shape, 32 // self.scheme.bits
        floats, whole = ("F16", "BF16", "F32"), ("I32",)
        if depth % self.group:
            raise CheckpointError(
                f"{self.files.source}: {self._name(self._first)!r} has {depth} columns, not a "
                f"multiple of the group of {self.group}; correct group_size in its config.json"
            )
        groups = depth // self.group
        match self.scheme.method:
            case "awq":
                return {
                    "qweight": (((depth, out // per),), whole),
                    "qzeros": (((groups, out // per),), whole),
                    "scales": (((groups, out),), floats),
                }
            case "gptq":
                tensors = {
                    "qweight": (((depth // per, out),), whole),
                    "qzeros": (((groups, out // per),), whole),
                    "scales": (((groups, out),), floats),
                }
                if self.scheme.has_order or self.files.has(self._name("g_idx")):
                    tensors["g_idx"] = (((depth,),), whole)
                return tensors
            case "compressed-tensors":
                scales = ((out, groups),)
                if groups == 1:
                    scales = (*scales, (out,), (1,), (), (1, 1))
                dtypes = whole if self.scheme.is_packed else _ONE_BY_ONE[self.scheme.kind]
                width = depth // per if self.scheme.is_packed else depth
                tensors = {
                    self._first: (((out, width),), dtypes),
                    "weight_scale": (scales, floats),
                }
                if self.scheme.has_zeros:
                    tensors["weight_zero_point"] = (((out // per, groups),), whole)
                return tensors

    @property
    def _first(self) -> str:
        return self.first_tensor(self.scheme)

    @staticmethod
    def first_tensor(scheme: Scheme) -> str:
        """The tensor that tells a quantized matrix from others, without its module's name."""
        if scheme.method != "compressed-tensors":
            return "qweight"
        return "weight_packed" if scheme.is_packed else "weight"

    def _name(self, tensor: str) -> str:
        return f"{self.module}.{tensor}"

    def _read(self, tensor: str, *index: slice) -> np.ndarray:
        return self.files.read_raw(self._name(tensor), index)


_ONE_BY_ONE = {"int8": ("I8",), "fp8": ("F8_E4M3",), "int4": ()}


def _bounds(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def _unpacked(packed: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Takes int32 ``[rows, n]`` apart along the last axis: uint8 ``[rows, n x 32 / bits]``.

    Args:
        packed: any memory order.
        bits: of a value, the lowest first.
        order: the place of each value among those of its int32; None: as they come.
    """
    per = 32 // bits
    raw = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)
    out = np.empty((*packed.shape, per), np.uint8)
    places = order or range(per)
    for number, place in enumerate(places):
        byte = raw[..., number * bits // 8 :: 4]
        out[..., place] = byte if bits == 8 else (byte >> (number * bits % 8)) & 15
    return out.reshape(*packed.shape[:-1], -1)
