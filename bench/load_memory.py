"""Measures the memory that a process needs while it loads weights, beside what the weights take.

    python -m bench.load_memory [--mebibytes 1024] [--meshes 1x1 1x3 1x4] [--limit 1.3]

Makes a checkpoint with random bfloat16 weights, converts it, and loads both in fresh processes on
simulated CPU devices, where the devices' memory is the host's. Levels are those above JAX's start:

    held    the most anonymous memory at a time (RssAnon): arrays, buffers, heaps
    files   the most of mapped files (RssFile): code, and pages that the kernel may drop at any
            time, which do not count as held; checkpoints are read and not mapped
    peak    VmHWM, which is both

With --limit each process may add only so many times the weights (RLIMIT_DATA, and an allowance that
is the same for all models), so a load that held them twice would fail. One JSON line a load; the
table is on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import common

SAMPLE_S = 0.002
"""Between two looks at the memory. VmHWM, which the kernel keeps, misses nothing between them."""
SHARD_BYTES = 512 * 2**20
PIECE_VALUES = 16 * 2**20
LIMIT_ALLOWANCE_BYTES = 192 * 2**20
"""What loading takes that does not grow with the model: code, thread stacks, pieces being read."""


def make_checkpoint(folder: Path, mebibytes: int) -> Path:
    """Writes a llama of about this size as safetensors: Llama 3.2 1B, as deep as needed."""
    from jaxserve.models.presets import PRESETS
    from jaxserve.models.registry import model_config, weight_sources

    config = {**PRESETS["llama-3.2-1b"], "vocab_size": 32768}
    layers = 1
    while True:
        config["num_hidden_layers"] = layers
        if 2 * model_config(config).params >= mebibytes * 2**20:
            break
        layers += 1
    sources = weight_sources(model_config(config))
    shapes = {
        part.name.format(layer=layer): part.stored_shape
        for source in (*sources.ends.values(), *sources.layer.values())
        for part in source.parts
        for layer in range(layers)
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(one)) for one in files[-1].values()) >= SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    for number, tensors in enumerate(files):
        _write_safetensors(folder / f"model-{number:05d}.safetensors", tensors, rng)
    return folder


def _write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for left in range(end // 2, 0, -PIECE_VALUES):
            bits = rng.integers(0, 2**16, min(left, PIECE_VALUES), np.uint16)
            # Without the exponent's highest bit: finite numbers below 2.
            (bits & 0xBFFF).tofile(file)


# -- in the process that loads ---------------------------------------------------------------------


class Watch:
    """Samples this process's memory on a thread while its block runs."""

    def __init__(self) -> None:
        """Takes the level now as the start."""
        self.start = status_bytes()
        self.most = dict(self.start)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def above_start(self) -> dict[str, int]:
        """Returns the most of each level, less where it started."""
        return {name: self.most[name] - self.start[name] for name in self.start}

    def __enter__(self) -> Watch:
        """Starts sampling, and the kernel's own peak anew."""
        Path("/proc/self/clear_refs").write_text("5")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops, with a last look."""
        self._stop.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        now = status_bytes()
        self.most = {name: max(self.most[name], now[name]) for name in now}


def status_bytes() -> dict[str, int]:
    """Returns what the kernel says of this process: sizes by name."""
    text = Path("/proc/self/status").read_text()
    names = ("VmHWM", "RssAnon", "RssFile", "VmData")
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(found[name]) * 1024 for name in names}


def load(path: str, mesh: str, dtype: str, limit: float | None, out: str | None) -> dict[str, Any]:
    """Loads a model in this process and says what that took; with ``out`` converts it instead."""
    import jax
    import jax.numpy as jnp

    from jaxserve.config import ServeConfig
    from jaxserve.convert import convert, open_model
    from jaxserve.resolve import configure_jax
    from sharding.mesh import parse_mesh
    from sharding.placement import bytes_per_device

    devices = parse_mesh(mesh).devices
    config = ServeConfig(
        model=path,
        mesh=mesh,
        dtype=dtype,
        device=f"cpu:{devices}",
        offline=True,
        assets_dir=Path(path),
        cache_dir=Path(path).parent / "compiled",
    )
    configure_jax(config)
    for device in jax.devices():
        jax.device_put(jnp.ones(1024), device).block_until_ready()
    with open_model(config) as opened:
        weights = devices * bytes_per_device(opened.abstract, opened.shardings)
        watch = Watch()
        limit_bytes = None
        if limit is not None:
            limit_bytes = int(limit * weights) + LIMIT_ALLOWANCE_BYTES
            total = watch.start["VmData"] + limit_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (total, total))
        start_s = time.perf_counter()
        with watch:
            if out is None:
                params = opened.load()
                jax.block_until_ready(params)
            else:
                convert(config, Path(out))
        seconds = time.perf_counter() - start_s
    most = watch.above_start()
    return {
        "weight_bytes": weights,
        "held_bytes": most["RssAnon"],
        "file_bytes": most["RssFile"],
        "peak_bytes": most["VmHWM"],
        "held_ratio": round(most["RssAnon"] / weights, 3),
        "peak_ratio": round(most["VmHWM"] / weights, 3),
        "start_bytes": watch.start["RssAnon"],
        "limit_bytes": limit_bytes,
        "seconds": round(seconds, 2),
    }


# -- in the process that asks ----------------------------------------------------------------------


def measured(
    path: Path,
    mesh: str,
    *,
    dtype: str = "bfloat16",
    limit: float | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Loads in a fresh process; with ``out`` converts instead.

    Raises:
        RuntimeError: it failed, as it does when it wants more memory than it may have.
    """
    asked = json.dumps([str(path), mesh, dtype, limit, None if out is None else str(out)])
    done = subprocess.run(
        [sys.executable, "-m", "bench.load_memory", "--measure", asked],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"loading {path} on {mesh} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the checkpoints, loads them, prints lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--mebibytes", type=int, default=1024, help="of weights (default 1024)")
    parser.add_argument("--meshes", nargs="+", default=["1x1", "1x3", "1x4"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--limit", type=float, metavar="F", help="of each: F times the weights, and 192 MiB"
    )
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: temporary)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(load(*json.loads(options.measure))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _measure_all(options, Path(folder))


def _measure_all(options: argparse.Namespace, folder: Path) -> None:
    stored = make_checkpoint(folder / "safetensors", options.mebibytes)
    converted = folder / "orbax"
    columns = "weights     held    files     peak  held/weights  seconds"
    common.say(f"{'':16} mesh  {columns}")

    def measure(what: str, path: Path, mesh: str, out: Path | None = None) -> None:
        facts = measured(path, mesh, dtype=options.dtype, limit=options.limit, out=out)
        line = {
            "what": what,
            "mesh": mesh,
            "checkpoint_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
            **facts,
            "commit": common.commit(),
            "versions": common.versions(),
        }
        common.write(line, options.out)
        names = ("weight_bytes", "held_bytes", "file_bytes", "peak_bytes")
        sizes = "  ".join(f"{facts[name] / 2**20:6.0f}M" for name in names)
        ratio, seconds = facts["held_ratio"], facts["seconds"]
        common.say(f"{what:16} {mesh:5} {sizes} {ratio:13.2f} {seconds:8.1f}")

    for mesh in options.meshes:
        measure("load safetensors", stored, mesh)
    measure("convert", stored, "1x1", converted)
    for mesh in options.meshes:
        measure("load orbax", converted, mesh)


if __name__ == "__main__":
    main()
