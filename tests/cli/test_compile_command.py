"""`jaxserve compile`: a directory of programs that `launch` serves from, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve import Client

pytestmark = pytest.mark.slow


@pytest.fixture
def programs(shell: Any, tmp_path: Path) -> Path:
    """What the command writes with the flags that all tests share."""
    out = tmp_path / "my programs"
    result = shell("compile", shell.model, *shell.flags, "--out", out)
    assert result.status == 0, result.err
    wrote, launch = result.out.splitlines()
    assert wrote.startswith(f"wrote {out}: 5 programs for ")
    assert " bytes, in " in wrote
    assert launch == f"  jaxserve launch {shell.model} --executables '{out}', with the same flags"
    assert "[compile] 0/5" in result.err
    assert "[weights]" not in result.err
    return out


def test_the_directory_is_not_written_over(shell: Any, programs: Path) -> None:
    assert {path.suffix for path in programs.iterdir()} == {".json", ".xla"}
    result = shell("compile", shell.model, *shell.flags, "--out", programs)
    assert (result.status, result.out) == (2, "")
    assert f"error: --out {programs} exists; give a directory that does not" in result.err
    assert "[compile]" not in result.err


def test_a_launch_serves_from_it(
    launch: Callable[..., Any], shell: Any, programs: Path, server: Any
) -> None:
    ahead = launch("--executables", str(programs))
    assert ahead.facts["pages"] == server.facts["pages"]

    def answer(address: str) -> str:
        with Client(address) as client:
            return client.generate("The sky is", max_tokens=8, temperature=0.0).text

    assert answer(ahead.address) == answer(server.address)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--page-tokens", "16"), "cache.page_tokens is 32 there and 16 here"),
        (("--kv-dtype", "bfloat16"), "cache.dtype is float32 there and bfloat16 here"),
        (("--mesh", "1x2"), "mesh is data=1, tensor=1 there and data=1, tensor=2 here"),
        (("--max-rows", "8"), "step.max_rows is 4 there and 8 here"),
    ],
)
def test_a_launch_with_other_flags_refuses_it_before_weights_are_loaded(
    shell: Any, programs: Path, flags: tuple[str, str], part: str
) -> None:
    launch = ("launch", shell.model, "--port", "0", *shell.flags, "--executables", programs)
    result = shell(*launch, *flags)
    assert (result.status, result.out) == (2, "")
    assert f"error: --executables {programs} was compiled for something else: " in result.err
    assert part in result.err
    assert "compile again with `jaxserve compile` and the flags of this launch" in result.err
    assert "[weights]" not in result.err


def test_a_directory_without_programs_and_several_hosts_are_refused(
    shell: Any, tmp_path: Path
) -> None:
    launch = ("launch", shell.model, "--port", "0", *shell.flags, "--executables", tmp_path)
    result = shell(*launch)
    assert result.status == 2
    assert f"error: --executables {tmp_path} is no directory of programs" in result.err
