"""Names of the formats that matrices are stored in, and what the names say.

    int8          groups of 32, as int4 has them where nothing else is said
    int4/128      groups of 128
    int8/row      one scale for each row
    fp8           float8_e4m3fn, one scale for each row
    int4/128/ordered   the groups are of columns in another order

A name is a plain string, so that it can be sorted, joined, printed and saved.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

type Format = str
"""See the top of the file; ``spec`` reads it."""
type Kind = Literal["int8", "int4", "fp8"]

KINDS: tuple[Kind, ...] = ("int8", "int4", "fp8")
GROUP = 32
"""Values along the last axis that share a scale, as in GGUF's blocks, where nothing else is said;
the only groups that the CPU's kernels read. Larger ones are multiples of it."""
SCALE_DTYPE = np.dtype(np.float16)
"""Of whole numbers' scales and minima."""
FP8 = np.dtype(jnp.float8_e4m3fn)
FP8_SCALE_DTYPE = np.dtype(np.float32)
"""A float16 would lose digits of a small row's scale, and one a row costs nothing."""
MAX_INT8, MAX_INT4, MAX_FP8 = 127, 15, 448
_ORDERED = "ordered"
_ROW = "row"


class Spec(NamedTuple):
    """What the name of a format says."""

    kind: Kind
    group: int | None = GROUP
    """Values that share a scale; None: all of a row."""
    ordered: bool = False
    """Groups are of columns in another order, which the matrix says."""

    @property
    def name(self) -> Format:
        """The name, such that ``spec`` reads it back; what need not be said is left out."""
        parts: list[str] = [self.kind]
        if self.group != _usual(self.kind):
            parts.append(_ROW if self.group is None else str(self.group))
        return "/".join([*parts, *([_ORDERED] if self.ordered else [])])

    @property
    def per_byte(self) -> int:
        """Values in one byte."""
        return 2 if self.kind == "int4" else 1

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """Of what values are stored in."""
        return {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8), "fp8": FP8}[self.kind]

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        """Of scales and minima."""
        return FP8_SCALE_DTYPE if self.kind == "fp8" else SCALE_DTYPE


def spec(format: Format) -> Spec:
    """Reads the name of a format.

    >>> spec("int4/128/ordered")
    Spec(kind='int4', group=128, ordered=True)

    Raises:
        ValueError: It is no such name, or groups of int4 are not multiples of 32.
    """
    kind, *rest = format.split("/")
    ordered = rest[-1:] == [_ORDERED]
    groups = rest[:-1] if ordered else rest
    if kind in KINDS and len(groups) <= 1:
        kind = cast("Kind", kind)
        text = groups[0] if groups else None
        if text is None:
            return Spec(kind, _usual(kind), ordered)
        if text == _ROW and kind != "int4":
            return Spec(kind, None, ordered)
        multiple = GROUP if kind == "int4" else 1
        if text.isdecimal() and int(text) > 0 and int(text) % multiple == 0:
            return Spec(kind, int(text), ordered)
    raise ValueError(
        f"{format!r} is no format; write {', '.join(KINDS)}, and where need be /GROUP, a multiple "
        f"of {GROUP} for int4, or /{_ROW} for int8, such as int4/128"
    )


def _usual(kind: Kind) -> int | None:
    return None if kind == "fp8" else GROUP


def bytes_per_weight(format: Format) -> float:
    """Of one value, with its share of the group's scale and minimum; a row's share is nothing."""
    its = spec(format)
    shared = 0.0 if its.group is None else its.scale_dtype.itemsize / its.group
    return 1 / its.per_byte + shared * (2 if its.kind == "int4" else 1)
