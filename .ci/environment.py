"""Builds .venv from the lock: `python .ci/environment.py`, started by the Makefile.

Standard library only, since it runs before anything is installed. Every package comes out of
requirements.lock by hash. uv installs them in seconds where pip takes more than a minute, so uv is
fetched first, by pip and from the same lock, and is given the index settings that pip has; where
that does not work out, pip does all of it. Finding a Python is left to find-python.

Two makes started together are safe: the second waits for the first and finds its work done.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / ".ci" / "requirements.lock"

# pip's setting, uv's variable for it, and what separates several values there.
UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "proxy": ("ALL_PROXY", " "),
}


# Whatever a launch and its processes import; the rest is compiled when it is first imported.
IMPORTED = "jaxserve.serve, jaxserve.llm, jaxserve.cli.launch, jinja2.sandbox, rich.progress"


def step(number: int, text: str) -> None:
    """Prints one line of progress."""
    print(f"[{number}/4] {text}", flush=True)


def fingerprint() -> str:
    """Returns a digest of everything the environment is made from."""
    digest = hashlib.sha256(sys.version.encode())
    sources = sorted((ROOT / "pallas_kernels").glob("*/*.cc"))
    headers = sorted((ROOT / "pallas_kernels").glob("*/*.h"))
    build = (ROOT / "setup.py", ROOT / "pallas_kernels" / "native" / "build.py")
    for path in (LOCK, ROOT / "pyproject.toml", *build, *sources, *headers):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def locked(lock: str, *names: str) -> str:
    """Returns the part of the lock that pins `names`, with their hashes."""
    blocks = re.findall(r"^\S+==.*(?:\n[ \t].*)*", lock, flags=re.MULTILINE)
    return "\n".join(block for block in blocks if block.partition("==")[0] in names) + "\n"


def uv_environment(pip_config: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that make uv use the indexes that pip would use.

    Args:
        pip_config: What `pip config list` prints; later lines win, as they do in pip.
        environ: The environment to extend. A variable that is set there is kept.
    """
    settings = {}
    for line in pip_config.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:") and name in UV_VARIABLES:
            settings[name] = ast.literal_eval(value)
    chosen = {
        # pip looks at all its indexes and takes the best match; every file is pinned by hash.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
    }
    for name, value in settings.items():
        variable, separator = UV_VARIABLES[name]
        chosen[variable] = separator.join(str(value).split())
    return {**chosen, **environ}


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds the file lock at `path`; says so when it has to wait for another process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another make is building .venv; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command: object, environ: Mapping[str, str] | None = None) -> None:
    """Runs a command and raises CalledProcessError when it fails."""
    subprocess.run([str(part) for part in command], check=True, env=environ, cwd=ROOT)


def is_usable(folder: Path) -> bool:
    """Says whether `folder` holds an environment of this very Python, with a pip that runs."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(
            [folder / "bin" / "python", "-c", "import pip, sys; print(sys.version)"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        return said.strip() == sys.version.strip()
    return False


def make_venv(folder: Path) -> None:
    """Creates the environment with a pip inside, also where Debian left ensurepip out."""
    if importlib.util.find_spec("ensurepip"):
        run(sys.executable, "-m", "venv", "--clear", folder)
        return
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", folder)
    python = folder / "bin" / "python"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wanted = Path(scratch, "pip.lock")
            wanted.write_text(locked(LOCK.read_text(), "pip"))
            run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
                "--require-hashes", "--requirement", wanted)  # fmt: skip
    except subprocess.CalledProcessError:
        raise SystemExit(
            f"{sys.executable} has neither ensurepip nor a working pip to install with;\n"
            "    apt-get install "
            f"python3.{sys.version_info.minor}-venv    # on Debian and Ubuntu\n"
            "brings it; then run the same make command again"
        ) from None


def install_locked(python: Path) -> None:
    """Installs every locked package and jaxserve itself, with uv if it is to be had, or pip."""
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    itself = ["--no-deps", "--no-build-isolation", "--editable", ROOT]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            first = Path(scratch, "first.lock")
            first.write_text(locked(LOCK.read_text(), "pip", "uv"))
            run(*pip, "install", "--quiet", "--require-hashes", "--requirement", first)
        config = subprocess.run(
            [*pip, "config", "list"], check=True, capture_output=True, text=True
        ).stdout
        environ = uv_environment(config, os.environ)
        uv = [python.with_name("uv"), "pip", "install", "--python", python]
        # On a terminal uv draws its progress; elsewhere it would only list every package.
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        run(*uv, *quiet, "--require-hashes", "--requirement", LOCK, environ=environ)
        step(4, "jaxserve itself, editable")
        run(*uv, "--quiet", *itself, environ=environ)
    except subprocess.CalledProcessError as error:
        print(f"uv did not manage ({error}); installing with pip, which takes longer", flush=True)
        run(*pip, "install", "--require-hashes", "--requirement", LOCK)
        step(4, "jaxserve itself, editable")
        run(*pip, "install", "--quiet", *itself)


def keep_bytecode(python: Path) -> None:
    """Imports what a launch imports, once, and keeps what Python has compiled it to.

    uv leaves that to the first import, which may not keep it: containers like to say
    PYTHONDONTWRITEBYTECODE, and every launch then compiles JAX from its source for seconds.
    """
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run(python, "-c", f"import {IMPORTED}", environ=environ)


def build(folder: Path) -> None:
    """Builds the environment in `folder` unless it is there already, from the same lock."""
    stamp = folder / ".stamp"
    wanted = fingerprint()
    with only_one(folder.with_name(folder.name + ".lock")):
        if stamp.exists() and stamp.read_text() == wanted:
            stamp.touch()
            return
        started = time.monotonic()
        stamp.unlink(missing_ok=True)
        step(1, f"Python {sys.version.split()[0]} at {sys.executable}")
        step(2, f"environment {folder.name}/")
        if not is_usable(folder):  # An older one is brought up to date instead, in two seconds.
            make_venv(folder)
        step(3, f"{LOCK.read_text().count('==')} pinned packages from {LOCK.relative_to(ROOT)}")
        install_locked(folder / "bin" / "python")
        keep_bytecode(folder / "bin" / "python")
        # Written last and moved into place: a build that was interrupted is done again.
        unfinished = stamp.with_suffix(".new")
        unfinished.write_text(wanted)
        os.replace(unfinished, stamp)
        print(f"environment ready in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Builds .venv, or the folder that is named instead."""
    build(ROOT / (sys.argv[1] if len(sys.argv) > 1 else ".venv"))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"the environment could not be built: {error}")
    except OSError as error:
        free_gib = shutil.disk_usage(ROOT).free / 2**30
        sys.exit(f"the environment could not be built: {error} ({free_gib:.1f} GiB free on disk)")
