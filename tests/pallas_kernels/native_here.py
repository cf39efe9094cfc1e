"""Marks what needs the native kernels: skipped where they are not built, with the reason."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pallas_kernels import native

REASON = native.why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def usable(names: Iterable[str]) -> list[object]:
    """The implementations to run a test with on a CPU.

    The native one is skipped where it is not built. Mosaic's need a GPU or the interpreter: they
    have tests of their own.
    """
    return [
        pytest.param(name, marks=needs_native) if name == "native" else name
        for name in names
        if name != "mosaic"
    ]
