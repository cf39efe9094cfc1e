"""`.ci/find-python` among fake Pythons, on a PATH that holds nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FIND_PYTHON = Path(__file__).resolve().parents[1] / ".ci" / "find-python"
TOOLS = ("sh", "sed", "dirname", "mktemp", "rm", "cat")


class Machine:
    """A HOME and a PATH in which only what a test puts there can be found."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.path = [root / "first", root / "second"]
        for folder in (self.home, *self.path):
            folder.mkdir()
        tools = root / "tools"
        tools.mkdir()
        for tool in TOOLS:
            (tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool} here"))
        self.environ = {
            "HOME": str(self.home),
            "PATH": ":".join(str(folder) for folder in (*self.path, tools)),
        }

    def put(self, path: Path, script: str) -> Path:
        """Writes an executable shell script."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def put_python(self, path: Path, version: str) -> Path:
        """Writes a Python that answers with its version and can do nothing else."""
        answer = version.replace(".", " ")
        return self.put(path, f'[ "$1" = -c ] && echo "{answer}" && echo "$0"')

    def find(self) -> subprocess.CompletedProcess[str]:
        """Runs find-python."""
        command = ["sh", str(FIND_PYTHON)]
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=False
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_tested_python_on_path_is_found(machine: Machine) -> None:
    python = machine.put_python(machine.path[0] / "python3", "3.12")
    assert machine.find().stdout == f"{python}\n"


def test_a_shim_that_fails_does_not_hide_a_python_further_on(machine: Machine) -> None:
    machine.put(machine.path[0] / "python3.12", "echo pyenv: version not active >&2; exit 127")
    python = machine.put_python(machine.path[1] / "python3.12", "3.12")
    assert machine.find().stdout == f"{python}\n"


def test_an_inactive_pyenv_version_is_found(machine: Machine) -> None:
    machine.put(machine.path[0] / "python3.12", "exit 127")
    machine.put_python(machine.path[0] / "python3", "3.11")
    machine.put_python(machine.home / ".pyenv/versions/3.9.18/bin/python3", "3.9")
    python = machine.put_python(machine.home / ".pyenv/versions/3.13.0/bin/python3", "3.13")
    assert machine.find().stdout == f"{python}\n"


def test_pyenv_root_is_honoured(machine: Machine, tmp_path: Path) -> None:
    machine.environ["PYENV_ROOT"] = str(tmp_path / "elsewhere")
    python = machine.put_python(tmp_path / "elsewhere/versions/3.12.4/bin/python3", "3.12")
    assert machine.find().stdout == f"{python}\n"


def test_a_tested_version_is_preferred_to_a_newer_one(machine: Machine) -> None:
    machine.put_python(machine.path[0] / "python3", "3.15")
    python = machine.put_python(machine.home / ".pyenv/versions/3.12.1/bin/python3", "3.12")
    assert machine.find().stdout == f"{python}\n"


def test_a_newer_version_is_better_than_none_and_is_named(machine: Machine) -> None:
    python = machine.put_python(machine.path[0] / "python3", "3.15")
    found = machine.find()
    assert found.stdout == f"{python}\n"
    assert "newer than the tested 3.12 and 3.13" in found.stderr


def test_uv_is_asked_when_nothing_else_is_there(machine: Machine) -> None:
    python = machine.put_python(machine.home / "managed/python3.12", "3.12")
    machine.put(machine.path[0] / "uv", f'[ "$2" = find ] && echo {python}; exit 0')
    assert machine.find().stdout == f"{python}\n"


def test_with_none_the_commands_that_install_one_are_printed(machine: Machine) -> None:
    """The only Python is old, and can make no environment to fetch uv into."""
    old = machine.put(
        machine.path[0] / "python3", '[ "$1" = -c ] || exit 1; echo "3 11"; echo "$0"'
    )
    found = machine.find()
    assert found.returncode == 1
    assert found.stdout == ""
    assert f"newest seen: {old}" in found.stderr
    for command in ("apt-get install python3.12", "pyenv install 3.12", "PYTHON=/path/to"):
        assert command in found.stderr
