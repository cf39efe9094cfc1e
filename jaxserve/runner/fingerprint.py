"""What compiled programs depend on, part by part: the key of ``executables.py``.

A part too many costs a compilation; a part too few would run the wrong program. So whole configs go
in, field by field, every setting of JAX that is not known to be harmless, and all source code that
programs can be traced from: what ``runner`` may import, which ``make layers`` checks.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]
from jax.sharding import Mesh

import pallas_kernels
import sharding
from jaxserve.runner.compiling import cores
from jaxserve.runner.runner import Runner
from pallas_kernels import native

TRACED = ("config.py", "errors.py", "engine", "models", "runner")
"""Of the package ``jaxserve``; of the others everything."""
HARMLESS_SETTINGS = (
    "jax_check_proxy_envs",
    "jax_compilation_cache",
    "jax_debug_log_modules",
    "jax_enable_compilation_cache",
    "jax_enable_preemption_service",
    "jax_explain_cache_misses",
    "jax_log",
    "jax_num_cpu_devices",
    "jax_persistent_cache",
    "jax_platform",
    "jax_pprint",
    "jax_raise_persistent_cache_errors",
    "jax_traceback_filtering",
    "jax_tracer_error",
)
"""Beginnings of the names of JAX's settings that change no program, or that other parts hold."""


def fingerprint(runner: Runner) -> dict[str, str]:
    """Names everything that the programs of a runner depend on, weights' values excepted.

    Raises:
        AssertionError: the runner's mesh is abstract.
    """
    mesh = runner.mesh
    assert isinstance(mesh, Mesh), "an abstract mesh has no devices"
    devices = list(mesh.devices.flat)
    parts = {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "platform": f"{devices[0].platform} ({devices[0].client.platform_version})",
        "device kind": ", ".join(sorted({device.device_kind for device in devices})),
        "devices": ", ".join(str(device.id) for device in devices),
        "mesh": ", ".join(f"{name}={size}" for name, size in mesh.shape.items()),
        # Holds what XLA_FLAGS says.
        "XLA flags": _digest(xla_client.CompileOptions().SerializeAsString()),
        "compiler options": str(runner.compiler_options),
        "native kernels": native.why_not() or native.build_name(),
        "kernels": str(sorted(runner.config.kernels.items())),
        "source code": source_digest(),
        "weights' formats": str(sorted(runner.model.formats.items())),
        "weights' shapes": _digest(_shapes(runner.abstract_params).encode()),
    }
    if devices[0].platform == "cpu":
        # XLA divides loops among as many threads as there are cores when it compiles.
        parts |= {"CPU": cpu_facts(), "CPU cores": str(cores())}
    settings = {
        name: str(value)
        for name, value in jax.config.values.items()
        if not name.startswith(HARMLESS_SETTINGS)
    }
    return (
        parts
        | settings
        | flat(asdict(runner.config))
        | flat({"model": asdict(runner.model.config)})
    )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Names every leaf of nested dicts.

    >>> flat({"step": {"max_rows": 64}, "dtype": "float32"})
    {'step.max_rows': '64', 'dtype': 'float32'}
    """
    out: dict[str, str] = {}
    for name, value in tree.items():
        out |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: str(value)}
        )
    return out


@cache
def source_digest() -> str:
    """Of all code that programs can be traced from."""
    hashed = hashlib.sha256()
    for path in traced_files():
        hashed.update(f"{path.parent.name}/{path.name}\n".encode())
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def traced_files() -> list[Path]:
    """Every source file that a program can be traced from, in an order that does not change."""
    ours = Path(__file__).parent.parent
    roots = [ours / name for name in TRACED]
    roots += [Path(str(package.__file__)).parent for package in (pallas_kernels, sharding)]
    files = [sorted(root.rglob("*.py")) if root.is_dir() else [root] for root in roots]
    return [file for part in files for file in part]


@cache
def cpu_facts() -> str:
    """This machine's CPU: its name, and a digest of all that it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return "unknown"
    told = dict[str, str](
        (name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)
    )
    named = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part", "flags", "Features")
    facts = [told.get(name, "") for name in named]
    return f"{told.get('model name', 'unnamed')} {_digest(repr(facts).encode())}"


def _shapes(tree: Any) -> str:
    leaves, structure = jax.tree.flatten(tree)
    return f"{structure} {[(leaf.shape, str(leaf.dtype)) for leaf in leaves]}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
