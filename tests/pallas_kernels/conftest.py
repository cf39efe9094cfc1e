"""What tests of several kernel families share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from pallas_kernels import native

PROVE_SEED = "JAXSERVE_PROVE_SEED"
"""The variable that repeats the draws of a run of proofs."""


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels are tested with many rows of bfloat16, too, which AMX would take from them."""
    monkeypatch.setattr(native, "has_amx", lambda: False)


@pytest.fixture(scope="session")
def seed_of_proofs() -> int:
    """Another one in each run, unless ``PROVE_SEED`` names it."""
    given = os.environ.get(PROVE_SEED, "")
    if given and not given.isdecimal():
        raise pytest.UsageError(f"{PROVE_SEED} is {given!r}; give a whole number, as was printed")
    return int(given) if given else random.SystemRandom().randrange(2**31)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What a case is drawn with: the same in every `make test`, and printed in a proof.

    A change is not to fail for an unlucky draw of something else, and a proof that draws the same
    numbers for ever proves no more than one run.
    """
    if request.node.get_closest_marker("prove") is None:
        return 0
    found: int = request.getfixturevalue("seed_of_proofs")
    print(f"repeat with {PROVE_SEED}={found}")
    return found


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
