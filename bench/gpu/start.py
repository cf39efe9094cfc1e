"""How long a launch takes until the first request can come: without a cache, and with one.

    python -m bench.gpu.start CACHE_DIR DRY

Its part never touches the device: each launch is a process of its own that needs all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu.part import Number, Setting

MODEL = "llama-3.2-1b"
CONTEXT_TOKENS = 8192


def start(setting: Setting) -> Iterator[Number]:
    """Launches twice over one cache directory that is empty at first."""
    # Within what the parent removes: this process may be killed.
    with tempfile.TemporaryDirectory(dir=setting.cache_dir) as folder:
        for name in ("cold", "warm"):
            begin_s = time.perf_counter()
            # Its errors go where this process's do.
            done = subprocess.run(
                [sys.executable, "-m", "bench.gpu.start", folder, str(int(setting.dry))],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            wall_s = time.perf_counter() - begin_s
            found = json.loads(done.stdout.splitlines()[-1])
            yield Number(f"{name}: process to end", wall_s, "s")
            yield Number(f"{name}: launch", found["ready_s"], "s")
            yield Number(f"{name}: launch and imports", found["all_s"], "s")


def main(words: Sequence[str]) -> None:
    """Launches once with default sizes but for the context, and prints how long it took."""
    begin_s = time.perf_counter()
    from bench.gpu.model import serve_config
    from jaxserve.launch import build

    cache_dir, dry = words
    setting = Setting(
        dry=dry == "1", device_kind="", cache_dir=Path(cache_dir), traces=None, ends_s=0.0
    )
    with build(serve_config(setting, MODEL, context_tokens=CONTEXT_TOKENS)) as service:
        all_s = time.perf_counter() - begin_s
        print(json.dumps({"ready_s": service.ready_seconds, "all_s": all_s}))


if __name__ == "__main__":
    main(sys.argv[1:])
