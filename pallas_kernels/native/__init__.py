"""Loads the native CPU kernels and makes them known to XLA.

The library is built with the package (``build.py``) and may be missing; then, or where JAX does not
run on a CPU, ``why_not`` says so and implementations decline with that reason. What a kernel
computes is its family's business; the headers beside this file are what families share:

    threads.h    a parallel loop over XLA's threads
    isa.h        the instruction set, chosen when a kernel is called
    simd.h       vectors of that instruction set
    xla.h        what handlers share
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.target import target

LIBRARY = Path(__file__).with_name("_native.so")


class Isa(enum.IntEnum):
    """Instruction sets that kernels are compiled for, as isa.h numbers them."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512VNNI = 3
    AVX512BF16 = 4
    AVX512FP16 = 5


def why_not() -> str | None:
    """Why native kernels cannot run where this is traced for; None when they can."""
    if (platform := target().platform) != "cpu":
        return f"native kernels run on a CPU, and this program is for {platform}"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def is_built() -> bool:
    """Whether the library is there and can be loaded. Asks JAX for nothing."""
    return not isinstance(_load(), str)


def build_name() -> str:
    """The build of the library and the instruction set it uses here; ``"none"`` without one.

    Two processes with one name compute the same bits. Asks JAX for nothing.
    """
    loaded = _load()
    return "none" if isinstance(loaded, str) else f"{loaded[1]} {isa().name.lower()}"


def isa() -> Isa:
    """The instruction set that kernels use now."""
    return Isa(_library()[0].jaxserve_isa())


@cache
def has_amx() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def limit_isa(most: Isa) -> None:
    """Keeps kernels from using more than this from the next call on, in the whole process."""
    _library()[0].jaxserve_set_isa_limit(int(most))


def call(
    symbol: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> Sequence[jax.Array]:
    """Calls a handler of the library; use while tracing.

    Args:
        symbol: The handler's name in the library.
        results: Shapes and dtypes of what it returns.
        *operands: Arrays. Inside ``shard_map`` they count as varying over every mesh axis that one
            of them varies over, and so do the results.
        aliases: Which operand each result is written into, from operand to result.
        **attributes: Numpy scalars and strings, fixed in the program.

    Raises:
        NotImplementedError: There are no native kernels here; the text is ``why_not``'s.
    """
    if reason := why_not():
        raise NotImplementedError(reason)
    operands = tuple(map(jax.numpy.asarray, operands))
    axes = frozenset[str]().union(*(_varying(x) for x in operands))
    if axes:
        operands = tuple(
            jax.lax.pcast(x, tuple(axes - _varying(x)), to="varying") if axes - _varying(x) else x
            for x in operands
        )
        here = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        kind = jax.typeof(operands[0]).manual_axis_type
        results = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here, manual_axis_type=kind)
            for x in results
        ]
    return jax.ffi.ffi_call(_target(symbol), results, input_output_aliases=aliases)(
        *operands, **attributes
    )


def _varying(x: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


@cache
def _load() -> tuple[ctypes.CDLL, str] | str:
    """The library and a digest of it, or why there is none."""
    try:
        content = LIBRARY.read_bytes()
        library = ctypes.CDLL(str(LIBRARY))
    except FileNotFoundError:
        return "the native kernels are not built: `make native`, or install with a C++ compiler"
    except OSError as error:
        return f"the native kernels cannot be loaded: {error}"
    return library, hashlib.sha256(content).hexdigest()[:12]


def _library() -> tuple[ctypes.CDLL, str]:
    loaded = _load()
    if isinstance(loaded, str):
        raise NotImplementedError(loaded)
    return loaded


@cache
def _target(symbol: str) -> str:
    """Registers a handler with XLA, once, under a name that says which library it is of.

    The name is part of a compiled program and of its key in the compilation cache, so a program
    that was compiled for another build of the library is never run with this one.
    """
    library, digest = _library()
    name = f"{symbol}.{digest}"
    handler = jax.ffi.pycapsule(getattr(library, symbol))
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return name
