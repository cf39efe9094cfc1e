"""The child's side of a part: runs one function and writes what it yields, line by line.

python -m bench.gpu.child MODULE:NAME RESULTS SETTING
python -m bench.gpu.child --probe
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.part import Measure, Setting
from bench.machine import cpu_info


def main(words: Sequence[str]) -> int:
    """Runs what the words name; returns the exit code."""
    if words[0] == "--probe":
        print(json.dumps(look()))
        return 0
    function, results, told = words
    with Path(results).open("a") as file:

        def write(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        try:
            for number in _measure(function)(_setting(json.loads(told))):
                write(number.as_json())
        except Exception as error:
            traceback.print_exc()
            write({"error": f"{type(error).__name__}: {error}"})
            return 1
    return 0


def look() -> dict[str, Any]:
    """Returns what this process sees: the device, and the machine around it."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
        "runtime": device.client.platform_version,
        "cpu": cpu_info("model name"),
        "cores": os.cpu_count(),
    }


def _measure(function: str) -> Measure:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _setting(told: dict[str, Any]) -> Setting:
    traces = told["traces"]
    return Setting(
        dry=told["dry"],
        device_kind=told["device_kind"],
        cache_dir=Path(told["cache_dir"]),
        traces=None if traces is None else Path(traces),
        ends_s=told["ends_s"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
