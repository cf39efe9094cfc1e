"""Building the native kernels: what is compiled how often, and what is said when it cannot be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pallas_kernels.native import build


def test_a_missing_compiler_is_one_error_that_the_package_build_catches(tmp_path: Path):
    out = tmp_path / build.LIBRARY
    with pytest.raises(build.BuildError, match=r"no native kernels: .*no-such-compiler"):
        build.build_library(out, "no-such-compiler")
    assert not out.exists()


def test_missing_headers_are_said_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="jaxlib is not installed, whose headers"):
        build.build_library(tmp_path / build.LIBRARY, "no-such-compiler")


@pytest.mark.parametrize(("machine", "levels"), [("x86_64", 6), ("aarch64", 1)])
def test_kernels_are_compiled_for_each_level_and_the_rest_once(
    machine: str, levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "run", lambda *command: None)
    monkeypatch.setattr(build, "takes", lambda *command: True)
    for has_xla in (True, False):
        objects = build.compile_objects(tmp_path, "c++", (), has_xla=has_xla)
        assert len(objects) == len(set(objects))
        counts = Counter(path.stem.rpartition("-")[0] for path in objects)
        for family in ("paged_attention", "quantized_matmul"):
            assert counts.pop(f"{family}-kernel") == levels
            assert (f"{family}-native" in counts) == has_xla
        assert set(counts.values()) == {1}


@pytest.mark.parametrize(("status", "levels"), [(0, 6), (1, 5)])
def test_a_level_that_the_compiler_does_not_know_is_left_out(
    status: int, levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler = tmp_path / "c++"
    commands = tmp_path / "commands"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {commands}\ncase "$*" in\n  *avx512fp16*) exit {status};;\nesac\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    objects = build.compile_objects(tmp_path, str(compiler), (), has_xla=False)
    kernels = [path for path in objects if path.name.startswith("quantized_matmul-kernel")]
    assert len(kernels) == levels
    defined = commands.read_text().count("-DJAXSERVE_NO_AVX512FP16=1")
    assert defined == (0 if status == 0 else len(objects))
