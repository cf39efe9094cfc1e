"""What commands do before a model is built: say where they run, fetch the default model, load only
its tokenizer.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from jaxserve.assets import ASSETS, AssetError, asset_path, fetch
from jaxserve.config import ServeConfig
from jaxserve.progress import Progress
from jaxserve.weights.hub import ALIASES

DUMMY = "dummy:"
PACKAGES = ("jax", "jaxlib", "flax", "grpcio", "tokenizers", "numpy")


def package_versions() -> dict[str, str]:
    """Returns the versions of what jaxserve runs on, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def report_environment(progress: Progress) -> None:
    """Says where this runs."""
    versions = package_versions()
    cores = os.cpu_count()
    progress(
        "environment", 1, 1, f"python {versions['python']}, jax {versions['jax']}, {cores} cores"
    )


def ensure_asset(config: ServeConfig, progress: Progress) -> None:
    """Fetches a model that is a pinned asset and not there yet, unless offline.

    Raises:
        AssetError: it is missing and cannot be fetched.
    """
    if config.model not in ALIASES or config.model not in ASSETS:
        return
    try:
        asset_path(config.model, config.assets_dir)
    except AssetError:
        if config.offline:
            raise
        fetch(config.model, config.assets_dir, lambda line: progress("assets", 0, 1, line))
        progress("assets", 1, 1, config.model)
