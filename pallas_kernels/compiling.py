"""What is compiled to see that the GPU kernels still compile well, without a GPU.

A family says so in its ``compile_cases.py``: a tuple ``CASES`` of ``CompileCase``. The compiler is
``bench/compiled.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

TENSOR_CORES = ("HGMMA", "QGMMA", "IGMMA")
"""Instructions of products of 16 bits, 8-bit floats and 8-bit integers."""
BULK_COPIES = ("UTMALDG", "UTMASTG", "UBLKCP")
"""Instructions that have hardware copy a tile in, a tile out, or a line either way."""


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One program with Mosaic kernels in it, and what its machine code must have."""

    name: str
    """Unique in its family, such as ``"decode bf16, page 64, head 128"``."""
    function: Callable[..., Any]
    """Traced with ``arguments``; only the named implementation will do, so that none is swapped
    for another unseen."""
    arguments: tuple[Any, ...]
    """``jax.ShapeDtypeStruct`` or trees of them, without shardings."""
    instructions: tuple[str, ...]
    """Of ``TENSOR_CORES`` and ``BULK_COPIES``: those that the kernels, taken together, must use."""
    most_spill_bytes: int = 0
    """Of registers, in each kernel, outside of the loop of its products, where none may be."""
    donated: tuple[int, ...] = ()
    """Which arguments are written in place, all their bytes: a copy of one fails the check."""
    most_launches: int | None = None
    """Of kernels, copies and fills, XLA's own included; None for any number."""


def all_cases() -> dict[str, tuple[CompileCase, ...]]:
    """Returns the cases of every family that declares some, by its name."""
    found = sorted(Path(__file__).parent.glob("*/compile_cases.py"))
    families = [path.parent.name for path in found]
    return {name: import_module(f"{__package__}.{name}.compile_cases").CASES for name in families}
