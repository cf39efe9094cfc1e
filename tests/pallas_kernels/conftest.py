"""What tests of several kernel families share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pallas_kernels import native


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels are tested with many rows of bfloat16, too, which AMX would take from them."""
    monkeypatch.setattr(native, "has_amx", lambda: False)


@pytest.fixture(params=native.Isa, ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Iterator[native.Isa]:
    """Each instruction set that this machine has, one after the other."""
    if reason := native.why_not():
        pytest.skip(reason)
    native.limit_isa(request.param)
    try:
        if native.isa() is not request.param:
            pytest.skip(f"this machine has no {request.param.name}")
        yield request.param
    finally:
        native.limit_isa(max(native.Isa))
