"""Compiles the native kernels into one shared library; standard library only.

``setup.py`` runs it inside the package build, ``make native`` by itself, and the sanitizers link
the same objects into a test program. Each kernel family is a directory beside this one:

    kernel.cc    compiled once per instruction set, in a namespace of that name
    native.cc    the handlers that XLA calls; left out of the test program, which knows no XLA
    *.cc         anything else, compiled once for any machine
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FAMILIES = Path(__file__).resolve().parent.parent
LIBRARY = "_native.so"

AVX2 = ("-mavx2", "-mfma", "-mf16c", "-DISA_AVX2=1")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
AVX512 += ("-DISA_AVX512=1",)
VNNI = (*AVX512, "-mavx512vnni", "-DISA_AVX512VNNI=1")
BF16 = (*VNNI, "-mavx512bf16", "-DISA_AVX512BF16=1")
LEVELS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vnni": VNNI,
    "avx512bf16": BF16,
    "avx512fp16": (*BF16, "-mavx512fp16", "-DISA_AVX512FP16=1"),
}
"""Compiler flags of each level of isa.h; elsewhere than on x86-64, of the first alone."""
NEWEST = "avx512fp16"
"""Left out where the compiler is too old for it: GCC has it since version 12, Clang since 14."""

# No contraction: a product and a sum are fused where the source says so and nowhere else, so that
# an answer does not depend on which of several equal loops the compiler unrolled.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")
FLAGS += ("-Wno-maybe-uninitialized",)  # GCC 12 warns of what its own intrinsics leave undefined.
HIDDEN = ("-fvisibility=hidden", "-fvisibility-inlines-hidden")
# A wheel may meet a machine with an older libstdc++ than the one it was linked with.
LINK_FLAGS = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s")


class BuildError(Exception):
    """The library cannot be built here; the text says what is missing."""


def build_library(out: Path, compiler: str) -> None:
    """Compiles and links the library.

    Args:
        out: The file to write.
        compiler: A C++17 compiler that takes GCC's flags, with arguments of its own if need be.

    Raises:
        BuildError: There is no such compiler, jaxlib's headers are missing, or it failed.
    """
    flags = (*FLAGS, *HIDDEN, "-isystem", str(xla_headers()))
    with tempfile.TemporaryDirectory() as scratch:
        objects = compile_objects(Path(scratch), compiler, flags, has_xla=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside its place and moved there: a process may have the old one mapped.
        unfinished = out.with_suffix(".new")
        run(compiler, "-shared", "-pthread", *LINK_FLAGS, *objects, "-o", unfinished)
        unfinished.replace(out)


def build_program(source: Path, out: Path, compiler: str, flags: Sequence[str]) -> None:
    """Compiles a test program with the kernels and without XLA; ``flags`` may name sanitizers."""
    with tempfile.TemporaryDirectory() as scratch:
        objects = compile_objects(Path(scratch), compiler, (*FLAGS, *flags), has_xla=False)
        run(compiler, *FLAGS, *flags, "-pthread", f"-I{FAMILIES}", source, *objects, "-o", out)


def compile_objects(
    scratch: Path, compiler: str, flags: Sequence[str], *, has_xla: bool
) -> list[Path]:
    """Compiles every source of every family into ``scratch``."""
    newest = takes(compiler, "-mavx512fp16")
    if not newest:
        flags = (*flags, "-DJAXSERVE_NO_AVX512FP16=1")
    wanted = [
        (source, level, level_flags)
        for source in sorted(FAMILIES.glob("*/*.cc"), key=lambda path: path.name != "kernel.cc")
        if has_xla or source.name != "native.cc"
        for level, level_flags in levels(source)
        if newest or level != NEWEST
    ]

    def compile_one(source: Path, level: str, level_flags: Sequence[str]) -> Path:
        out = scratch / f"{source.parent.name}-{source.stem}-{level}.o"
        run(compiler, *flags, *level_flags, f"-I{FAMILIES}", "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(compile_one, *zip(*wanted, strict=True)))


def takes(compiler: str, flag: str) -> bool:
    """Whether the compiler knows a flag, which no other than an x86-64 machine asks."""
    command = [*shlex.split(compiler), flag, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return True  # There is none; compiling says so.


def levels(source: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The levels to compile a source for, each with its flags."""
    if source.name != "kernel.cc":
        yield "any", ()
        return
    for level, flags in LEVELS.items():
        if level == "portable" or platform.machine() in ("x86_64", "AMD64"):
            yield level, (*flags, f"-DISA_NAMESPACE={level}")


def xla_headers() -> Path:
    """The folder of the headers that jaxlib ships; finding it does not import jaxlib."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        raise BuildError("jaxlib is not installed, whose headers the native kernels include")
    include = Path(found.origin).parent / "include"
    if not (include / "xla" / "ffi" / "api" / "ffi.h").is_file():
        raise BuildError(f"jaxlib has no XLA FFI headers in {include}")
    return include


def run(compiler: str, *arguments: object) -> None:
    """Runs the compiler; its warnings go where they went, its failure becomes a BuildError."""
    try:
        subprocess.run([*shlex.split(compiler), *map(str, arguments)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no native kernels: {error}") from error


def main() -> None:
    """Builds the library in place, or a test program."""
    parser = argparse.ArgumentParser(description="Builds the native kernels.")
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name(LIBRARY))
    parser.add_argument("--program", type=Path, help="build this test program instead")
    parser.add_argument("--flags", default="", help="further flags of the test program")
    arguments = parser.parse_args()
    try:
        if arguments.program:
            flags = shlex.split(arguments.flags)
            build_program(arguments.program, arguments.out, arguments.compiler, flags)
        else:
            build_library(arguments.out, arguments.compiler)
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
