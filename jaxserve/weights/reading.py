"""Reads rectangular pieces of tensors from files, touching only the bytes that are needed.

Positioned reads instead of a memory map: what is read is counted once, in the caller's array, and
a file that is cut short while it is read becomes an error instead of a signal. File formats, names
and quantization are left to the callers.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError

Index = tuple[slice, ...]


def resolve_index(
    name: str, shape: tuple[int, ...], index: Index | None
) -> tuple[tuple[int, int], ...]:
    """Turns slices into one ``(start, stop)`` per axis; axes not mentioned are whole.

    Raises:
        ValueError: for a stepped slice or too many axes; that is the caller's mistake.
    """
    index = index or ()
    if len(index) > len(shape):
        raise ValueError(f"{name} has {len(shape)} axes and the index has {len(index)}")
    spans = []
    for length, part in itertools.zip_longest(shape, index, fillvalue=slice(None)):
        assert isinstance(length, int)
        assert isinstance(part, slice)
        start, stop, step = part.indices(length)
        if step != 1:
            raise ValueError(f"slices of {name} must have step 1, got {step}")
        spans.append((start, max(start, stop)))
    return tuple(spans)


def read_spans(
    file: ByteFile,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    spans: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """Reads the box ``spans`` of a row-major tensor that starts at ``offset``."""
    out = np.empty([stop - start for start, stop in spans], dtype)
    if out.size == 0:
        return out
    # The axes after the last partly read one are whole, so a run covers them in one piece.
    partial = [axis for axis, span in enumerate(spans) if span != (0, shape[axis])]
    run_axis = partial[-1] if partial else 0
    strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    run_bytes = math.prod(out.shape[run_axis:]) * dtype.itemsize
    buffer = memoryview(out.reshape(-1).view(np.uint8))
    starts = sum(start * stride for (start, _), stride in zip(spans, strides, strict=True))
    for number, outer in enumerate(np.ndindex(*out.shape[:run_axis])):
        jump = sum(i * stride for i, stride in zip(outer, strides, strict=False))
        run = buffer[number * run_bytes : (number + 1) * run_bytes]
        file.read_into(run, offset + starts + jump)
    return out


class ByteFile:
    """An open file that is read at positions; safe to share between threads."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        """Opens the file; its size is fixed from here on."""
        self.path = os.fspath(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror}; check the path and its permissions"
            ) from error
        self.size = os.fstat(self._fd).st_size

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills ``target`` with the bytes that start at ``offset``."""
        done = 0
        while done < len(target):
            try:
                # The kernel moves at most about 2 GiB a call, hence the loop.
                count = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} failed at byte {offset + done}: {error.strerror}; "
                    "check the disk, or fetch the file again"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done} but byte "
                    f"{offset + len(target)} is needed; the file is truncated: fetch it again"
                )
            done += count

    def read(self, offset: int, count: int) -> bytes:
        """Returns ``count`` bytes that start at ``offset``."""
        target = bytearray(count)
        self.read_into(memoryview(target), offset)
        return bytes(target)

    def close(self) -> None:
        """Closes the file; doing so twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
