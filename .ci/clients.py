"""Builds .clients, the stock clients in an environment of their own: `python .ci/clients.py`.

They pin an older protobuf than the server has, so they cannot share .venv, whose Python and uv
build theirs. Every package comes out of clients.lock by hash, from the indexes that pip is set to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environment import ROOT, run, uv_environment

FOLDER = ROOT / ".clients"
LOCK = ROOT / ".ci" / "clients.lock"


def main() -> None:
    """Builds it anew unless it was built from this very lock."""
    stamp = FOLDER / ".stamp"
    if not stamp.exists() or stamp.read_bytes() != LOCK.read_bytes():
        stamp.unlink(missing_ok=True)
        uv = Path(sys.executable).with_name("uv")
        pip_config = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        environ = uv_environment(pip_config, os.environ)
        run(uv, "venv", "--quiet", "--allow-existing", "--no-project", "--python", sys.executable,
            FOLDER, environ=environ)  # fmt: skip
        run(uv, "pip", "sync", "--quiet", "--python", FOLDER / "bin" / "python",
            "--require-hashes", LOCK, environ=environ)  # fmt: skip
        stamp.write_bytes(LOCK.read_bytes())
    stamp.touch()
    print(f"what {LOCK.relative_to(ROOT)} pins is in {FOLDER.name}/")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"the stock clients could not be installed: {error}")
