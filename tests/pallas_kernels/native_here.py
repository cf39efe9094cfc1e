"""Marks what needs the native kernels: skipped where they are not built, with the reason."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pallas_kernels import native

REASON = native.why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def usable(names: Iterable[str]) -> list[object]:
    """The implementations to run a test with; the native one is skipped where it is not built."""
    return [pytest.param(name, marks=needs_native) if name == "native" else name for name in names]
