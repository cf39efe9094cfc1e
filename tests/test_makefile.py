"""The project's plumbing: Makefile verbs, the lock, and the scripts in .ci that they call."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / ".ci" / "requirements.lock").read_text()
CLIENTS = (ROOT / ".ci" / "clients.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def load(script: str) -> ModuleType:
    """Imports a script from .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(f"ci_{script}", ROOT / ".ci" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = load("environment")


def make(*arguments: str) -> str:
    """Returns what make would run, with an environment that counts as built."""
    command = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/.stamp", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_alone_lists_the_targets() -> None:
    command = ["make", "--no-print-directory"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in (
        "serve", "demo", "assets", "test", "quick", "test-gpu", "lint", "fmt", "types", "layers",
        "proto", "proto-lint", "bench", "lock", "wheel", "clean", "native", "native-sanitize",
        "bench-gpu", "bench-gpu-dry", "clients", "clients-lock",
    ):  # fmt: skip
        assert re.search(rf"^  {verb} +\S", listed, flags=re.MULTILINE), verb


def test_make_serve_fetches_the_default_model_and_launches_it() -> None:
    first, second = make("serve").splitlines()
    assert first.endswith("-m jaxserve.assets smollm2")
    assert second.split()[-6:] == ["launch", "smollm2", "--host", "127.0.0.1", "--port", "50051"]


def test_make_serve_passes_on_its_variables() -> None:
    lines = make("serve", "MODEL=dummy:qwen3-8b", "HOST=::1", "PORT=7", "ARGS=--mesh 1x1")
    (launch,) = [line for line in lines.splitlines() if line.strip(": ")]
    assert launch.endswith("jaxserve launch dummy:qwen3-8b --host ::1 --port 7 --mesh 1x1")


def test_make_bench_gpu_writes_where_it_is_told_and_a_dry_run_nowhere() -> None:
    assert make("bench-gpu", "OUT=x.json").strip() == ".venv/bin/python -m bench.gpu --out x.json"
    dry = make("bench-gpu-dry", "ARGS=--parts start").strip()
    assert dry.endswith("-m bench.gpu --dry-run --parts start")


def test_make_test_runs_every_check_before_pytest() -> None:
    commands = make("test")
    order = [
        "jaxserve.assets", "ruff check", "ruff format --check", "pyright", "lint-imports",
        "protos.py --check", "buf lint", "buf breaking",
        '-m pytest -m "not gpu and not prove and not wide"',
    ]  # fmt: skip
    positions = [commands.index(command) for command in order]
    assert positions == sorted(positions)


@pytest.mark.parametrize("lock", [LOCK, CLIENTS], ids=["requirements", "clients"])
def test_the_lock_names_no_index_and_no_path_of_a_machine(lock: str) -> None:
    assert not re.search(r"https?:|file:|--index|--find-links|--extra-index|@ ", lock)
    assert not re.search(r"(^|\s)/\w", lock)


@pytest.mark.parametrize(("lock", "least"), [(LOCK, 100), (CLIENTS, 20)], ids=["all", "clients"])
def test_every_locked_package_has_a_version_and_a_hash(lock: str, least: int) -> None:
    blocks = re.findall(r"^[a-zA-Z].*(?:\n[ \t].*)*", lock, flags=re.MULTILINE)
    assert len(blocks) > least
    for block in blocks:
        assert re.match(r"[\w.-]+==\S+", block), block
        assert "--hash=sha256:" in block, block


def test_the_clients_that_are_named_are_locked() -> None:
    wanted = re.findall(r"^[\w-]+", (ROOT / ".ci" / "clients.in").read_text(), flags=re.MULTILINE)
    assert set(wanted) <= set(re.findall(r"^([\w.-]+)==", CLIENTS, flags=re.MULTILINE))


def test_make_clients_builds_them_once_from_their_lock() -> None:
    stale = make("clients", "--always-make", "--old-file=.venv/.stamp").splitlines()
    assert stale[-1].strip().endswith(".venv/bin/python .ci/clients.py")


def test_the_lock_holds_the_jax_that_the_device_is_measured_on() -> None:
    assert re.search(r"^jax==0\.11\.2 ", LOCK, flags=re.MULTILINE)
    assert re.search(r"^jaxlib==0\.11\.2 ", LOCK, flags=re.MULTILINE)


def test_the_lock_covers_what_the_project_declares() -> None:
    locked = set(re.findall(r"^([\w.-]+)==", LOCK, flags=re.MULTILINE))
    project = PROJECT["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[^\w.-]", entry)[0].lower().replace("_", "-") for entry in declared}
    assert names <= locked


def test_nothing_unpinned_builds_the_package() -> None:
    """The build backend is in the lock, because the install runs without build isolation."""
    for requirement in PROJECT["build-system"]["requires"]:
        name = re.split(r"\W", requirement)[0]
        assert environment.locked(LOCK, name).startswith(f"{name}==")


def test_one_package_is_cut_out_of_the_lock_with_its_hashes() -> None:
    lock = (
        "pip==26 \\\n    --hash=sha256:aa\n    # via jaxserve\npipx==1 \\\n    --hash=sha256:bb\n"
    )
    part = "pip==26 \\\n    --hash=sha256:aa\n    # via jaxserve\n"
    assert environment.locked(lock, "pip", "uv") == part


def test_uv_is_given_the_indexes_that_pip_has() -> None:
    config = (
        "global.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='file:///a/simple file:///b/simple'\n"
        "global.timeout='60'\n"
        ":env:.find-links='/w1 /w2'\n"
        ":env:.index-url='https://nearer.example/simple'\n"
    )
    environ = environment.uv_environment(config, {"HOME": "/h"})
    assert environ == {
        "HOME": "/h",
        "UV_DEFAULT_INDEX": "https://nearer.example/simple",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_FIND_LINKS": "/w1,/w2",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
    }


def test_uv_settings_of_the_user_win_over_those_of_pip() -> None:
    config = "global.index-url='https://mirror.example/simple'\n"
    mine = {"UV_DEFAULT_INDEX": "https://mine.example/simple"}
    environ = environment.uv_environment(config, mine)
    assert environ["UV_DEFAULT_INDEX"] == "https://mine.example/simple"


def test_an_environment_with_the_same_stamp_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / ".stamp").write_text(environment.fingerprint())
    monkeypatch.setattr(environment, "run", lambda *command, **_: pytest.fail(f"ran {command}"))
    environment.build(folder)


def test_a_build_that_fails_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*command: object, **_: object) -> None:
        raise subprocess.CalledProcessError(1, [str(part) for part in command])

    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / ".stamp").write_text("of an older lock")
    monkeypatch.setattr(environment, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        environment.build(folder)
    assert not (folder / ".stamp").exists()


def test_without_ensurepip_and_pip_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_venv(*command: object, **_: object) -> None:
        if "pip" in command:
            raise subprocess.CalledProcessError(1, [str(part) for part in command])

    monkeypatch.setattr(environment, "run", only_venv)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"neither ensurepip nor a working pip(.|\n)*-venv"):
        environment.make_venv(tmp_path)


def test_bytecode_is_kept_also_where_python_is_told_to_keep_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Imports take a launch 1.3 s of processor time with it and 3.5 without."""
    asked: list[tuple[tuple[object, ...], dict[str, str]]] = []
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(
        environment, "run", lambda *command, environ: asked.append((command, environ))
    )
    environment.keep_bytecode(Path("bin/python"))
    ((command, environ),) = asked
    assert command == (Path("bin/python"), "-c", f"import {environment.IMPORTED}")
    assert "jaxserve.serve" in environment.IMPORTED
    assert environ.keys() == os.environ.keys() - {"PYTHONDONTWRITEBYTECODE"}


def test_uv_that_fails_is_followed_by_pip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[str] = []

    def no_uv(*command: object, **_: object) -> None:
        commands.append(" ".join(str(part) for part in command))
        if "first.lock" in commands[-1]:
            raise subprocess.CalledProcessError(1, commands[-1])

    monkeypatch.setattr(environment, "run", no_uv)
    environment.install_locked(Path("bin/python"))
    assert "installing with pip, which takes longer" in capsys.readouterr().out
    assert commands[1].endswith(f" install --require-hashes --requirement {environment.LOCK}")
    assert "--no-deps --no-build-isolation --editable" in commands[2]


def test_stale_missing_and_left_over_generated_files_are_told(tmp_path: Path) -> None:
    protos = load("protos")
    fresh, committed = tmp_path / "fresh", tmp_path / "committed"
    for folder, files in (
        (fresh, {"same_pb2.py": "1", "stale_pb2.py": "new", "missing_pb2_grpc.py": "1"}),
        (committed, {"same_pb2.py": "1", "stale_pb2.py": "old", "left_pb2.pyi": "1"}),
    ):
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    (committed / "__init__.py").touch()
    expected = ["left_pb2.pyi", "missing_pb2_grpc.py", "stale_pb2.py"]
    assert protos.differences(fresh, committed) == expected
