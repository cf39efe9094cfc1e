"""What every test runs under: eight simulated CPU devices, and JAX at its strictest.

JAX reads its settings from the environment when it is first imported, so they are set here before
anything of jaxserve is: the run-time type checks (`--jaxtyping-packages`) import JAX together with
the first module they check. Processes that tests start inherit the settings.
`make test-gpu` sets JAX_PLATFORMS itself and the proofs on real weights JAX_NUM_CPU_DEVICES; both
are kept.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from hypothesis import settings

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could set it up")


class Shapeless(MetaPathFinder):
    """Finds modules that annotate no array's shape, before jaxtyping does.

    Every call's types are checked. jaxtyping binds a call's arguments to compare the shapes among
    them; where there are none, beartype, which it asks, does without in a fifth of the time.
    """

    PACKAGES = ("jaxserve.engine", "jaxserve.testing")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Looks where Python does, with the loaders of beartype."""
        is_here = any(f"{fullname}.".startswith(f"{package}.") for package in self.PACKAGES)
        return PathFinder.find_spec(fullname, path, target) if is_here else None


sys.meta_path.insert(0, Shapeless())
beartype_packages(Shapeless.PACKAGES, conf=BeartypeConf(claw_is_pep526=False))

# One compilation cache for the whole session and for the processes it starts, gone afterwards:
# tests share programs, and no test depends on what an earlier session left behind. A worker of
# pytest-xdist takes that of the process that started it.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
COMPILATION_CACHE = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if IS_WORKER
    else tempfile.mkdtemp(prefix="jaxserve-compiled-")
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.update(
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_COMPILATION_CACHE_DIR=COMPILATION_CACHE,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
    HF_HUB_OFFLINE="1",
)

# The same examples every time, and no deadline: the machine may be shared.
settings.register_profile("jaxserve", derandomize=True, deadline=None)
settings.load_profile("jaxserve")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, so that no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure() -> None:
    """Removes the compilation cache of this session."""
    if not IS_WORKER:
        shutil.rmtree(COMPILATION_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def assets() -> Callable[[str], Path]:
    """Finds an asset by name, or skips the test and says what to run."""

    from jaxserve.assets import AssetError, asset_path, default_directory

    def find(name: str) -> Path:
        try:
            return asset_path(name, default_directory(os.environ))
        except AssetError as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where services that tests build keep compiled programs: shared, so that equal ones compile
    once a session."""
    return Path(COMPILATION_CACHE) / "jaxserve"
