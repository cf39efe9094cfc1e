"""Whoever only talks to a server does not load an accelerator runtime, nor wait for one."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("jax", "jaxlib", "flax", "orbax", "transformers", "torch")

CLIENT = """
import jaxserve
from jaxserve import AsyncClient, Client, FinishReason, JaxserveError, SamplingParams, ServeConfig
Client("127.0.0.1:1").close()
"""
COMMANDS = """
import contextlib, io
from jaxserve.cli import main
for arguments in (
    ["--help"],
    ["launch", "--help"],
    ["launch", "--max-rows", "0"],
    ["version"],
    ["chat", "--server", "127.0.0.1:1"],
    ["stats", "--server", "127.0.0.1:1"],
    ["tokenize", "x", "--server", "127.0.0.1:1"],
    ["tokenize", "x", "--model", "dummy:tiny-llama"],
    ["tokenize", "x", "--model", "./nothing"],
    ["generate", "x", "--server", "127.0.0.1:1"],
    ["plan", "--help"],
    ["plan", "x", "--device", "nothing"],
    ["eval", "x", "--text", "./nothing"],
    ["eval", "x", "--text", "pyproject.toml", "--settings", "nothing"],
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments)
"""


@pytest.mark.parametrize("program", [CLIENT, COMMANDS], ids=["client", "commands"])
def test_no_accelerator_runtime_is_imported(program: str) -> None:
    report = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == ""


def test_help_imports_no_grpc_either() -> None:
    program = (
        "import sys\nfrom jaxserve.cli import main\n"
        "try: main(['launch', '--help'])\nexcept SystemExit: pass\n"
        "print('grpc' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False False"
