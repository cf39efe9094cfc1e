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


@pytest.mark.parametrize(("machine", "levels"), [("x86_64", 3), ("aarch64", 1)])
def test_kernels_are_compiled_for_each_level_and_the_rest_once(
    machine: str, levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "run", lambda *command: None)
    for has_xla in (True, False):
        objects = build.compile_objects(tmp_path, "c++", (), has_xla=has_xla)
        assert len(objects) == len(set(objects))
        counts = Counter(path.stem.rpartition("-")[0] for path in objects)
        for family in ("paged_attention", "quantized_matmul"):
            assert counts.pop(f"{family}-kernel") == levels
            assert (f"{family}-native" in counts) == has_xla
        assert set(counts.values()) == {1}
