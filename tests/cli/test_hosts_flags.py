"""Flags and variables that say which hosts share a mesh, and what starts a failed host again."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import launchers, main, supervisor
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import Tagged, _without_restart
from jaxserve.cli.parser import build_parser, parse
from jaxserve.config import GroupConfig
from jaxserve.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-009]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
LWS = {"LWS_LEADER_ADDRESS": "leader.svc", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3"}


def read(
    *words: str, environ: Mapping[str, str] | None = None, insecure: bool = False
) -> GroupConfig:
    environment = Environment.read(environ or {})
    options = parse(build_parser(environment), ["launch", *words])
    return launchers.read_group(options, environment.variables, insecure=insecure)


def test_without_flags_a_mesh_is_on_one_host() -> None:
    assert read() == GroupConfig()


def test_flags_name_the_hosts() -> None:
    flags = ["--hosts", "2", "--host-id", "1", "--coordinator", "127.0.0.1:8476"]
    config = read(*flags, "--join-timeout-s", "7", "--host-timeout-s", "3")

    assert (config.hosts, config.host_id) == (2, 1)
    assert config.coordinator_address == ("127.0.0.1", 8476)
    assert (config.join_timeout_s, config.host_timeout_s) == (7.0, 3.0)
    assert config.is_local
    assert not GroupConfig(coordinator="10.0.0.1:1").is_local
    assert GroupConfig(coordinator="[::1]:80").coordinator_address == ("::1", 80)
    assert GroupConfig(coordinator="localhost:80").is_local


def test_the_number_of_hosts_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--hosts", "two")
    assert "a number of hosts or auto, not 'two'" in capsys.readouterr().err


def test_slurm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    config = read("--hosts", "auto", insecure=True)

    assert (config.hosts, config.host_id) == (3, 2)
    assert config.coordinator.startswith("node007:")


def test_open_mpi_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    config = read("--hosts", "auto", insecure=True)

    assert (config.hosts, config.host_id) == (2, 1)
    assert config.coordinator.startswith("10.96.0.1:")


def test_leader_worker_sets_are_known_by_their_variables() -> None:
    config = read("--hosts", "auto", environ=LWS, insecure=True)

    assert (config.hosts, config.host_id, config.coordinator) == (4, 3, "leader.svc:8476")


def test_variables_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="variables are no numbers"):
        read("--hosts", "auto", environ={**LWS, "LWS_GROUP_SIZE": "many"})


def test_a_launcher_whose_variables_are_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS", "some")
    with pytest.raises(ConfigError, match="--hosts auto: SlurmCluster: invalid literal"):
        read("--hosts", "auto")


def test_without_a_launcher_auto_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"no launcher is recognised .* --hosts N --host-id I"):
        read("--hosts", "auto")


PLACES = [
    (["--host-id", "0"], "--host-id: "),
    (["--coordinator", "127.0.0.1:1"], "--coordinator: "),
    (["--host-id", "1", "--coordinator", "127.0.0.1:1"], "--host-id, --coordinator: "),
]


@pytest.mark.parametrize(("given", "named"), PLACES)
def test_a_place_among_hosts_that_nobody_would_read_is_refused(
    given: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{named}one host alone needs none; .* give --hosts"):
        read(*given)
    with pytest.raises(ConfigError, match=f"^{named}--hosts auto asks the launcher for that; "):
        read("--hosts", "auto", *given, environ=LWS, insecure=True)


def test_a_refused_place_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--host-id", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --host-id: one host alone needs none")


def test_a_script_may_name_the_only_host() -> None:
    config = read("--hosts", "1", "--host-id", "0", "--coordinator", "127.0.0.1:1")
    assert (config.hosts, config.host_id) == (1, 0)


OPEN = ("--hosts", "2", "--coordinator", "10.0.0.1:8476")


def test_an_open_coordinator_needs_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could pose as a host; give every host the same"):
        read(*OPEN)
    assert read(*OPEN, insecure=True).secret == b""
    assert read(*OPEN, environ={"JAXSERVE_GROUP_SECRET": "one"}).secret == b"one"
    (tmp_path / "secret").write_text("two\n")
    config = read(*OPEN, "--group-secret-file", str(tmp_path / "secret"))
    assert config.secret == b"two"
    assert "two" not in repr(config)


def test_a_secret_file_that_does_not_serve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="is empty; put a long random text into it"):
        read(*OPEN, "--group-secret-file", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        read(*OPEN, "--group-secret-file", str(tmp_path / "none"))


def test_every_line_of_a_host_is_tagged() -> None:
    out = io.StringIO()
    tagged = Tagged(out, "[host 1] ")
    print("one\ntwo", file=tagged)
    print("th", end="", file=tagged)
    print("ree", file=tagged, flush=True)

    assert out.getvalue() == "[host 1] one\n[host 1] two\n[host 1] three\n"
    assert not tagged.isatty()
    assert Tagged(sys.__stderr__, "").fileno() == 2


def test_every_line_of_a_hosts_log_is_tagged() -> None:
    code = """
import logging, sys
from jaxserve.cli import launch, main

def run_host(*_):
    logging.getLogger("some").warning("careful")
    return 0

launch._run_host = run_host
sys.exit(main(sys.argv[1:]))
"""
    flags = ["launch", "--hosts", "2", "--host-id", "1", "--coordinator", "127.0.0.1:1"]
    command = [sys.executable, "-c", code, *flags]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0
    assert re.fullmatch(r"\[host 1\] .* WARNING some: careful\n", result.stderr)


def test_help_says_all_that_insecure_allows() -> None:
    parser = parse(build_parser(Environment.read({})), ["launch"]).parser
    text = " ".join(parser.format_help().split())
    assert "allow a --host that other machines reach, without TLS or a password, and a" in text
    assert "and a --coordinator that they reach, without a group secret" in text


# -- restarts --------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)


def script(tmp_path: Path, *statuses: int) -> list[str]:
    """A command that ends with these statuses, one after the other."""
    counter = tmp_path / "runs"
    counter.write_text("")
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(counter)!r}); "
        f"n = len(p.read_text()); p.write_text('x' * (n + 1)); sys.exit({list(statuses)}[n])"
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("statuses", "restarts", "runs", "last"),
    [((1, 1, 0), 5, 3, 0), ((1, 2, 0), 5, 2, 2), ((1, 1, 1, 1), 2, 3, 1), ((0, 1), 5, 1, 0)],
    ids=["until it ends well", "until flags have to change", "as often as allowed", "not after 0"],
)
def test_a_failed_command_is_started_again(
    tmp_path: Path, quick: None, statuses: tuple[int, ...], restarts: int, runs: int, last: int
) -> None:
    assert supervisor.supervise(script(tmp_path, *statuses), restarts=restarts) == last
    assert len((tmp_path / "runs").read_text()) == runs


def test_a_command_that_ran_long_enough_may_fail_as_often_again(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STEADY_S", 0.0)
    assert supervisor.supervise(script(tmp_path, 1, 1, 1, 1, 0), restarts=1) == 0


def test_a_killed_command_ends_with_the_number_of_the_signal(quick: None) -> None:
    kill = "import os; os.kill(os.getpid(), 9)"
    assert supervisor.supervise([sys.executable, "-c", kill], restarts=0) == 137


LONG = "import time; print(1, flush=True); time.sleep(60)"


def supervising(child: str, *, before: str = "") -> subprocess.Popen[bytes]:
    """A process that supervises a Python child; its pipes end with the last of both."""
    code = (
        "import resource, signal, sys; from jaxserve.cli import supervisor; "
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
        # As in a terminal: whoever started the tests may ignore them.
        "[signal.signal(each, signal.SIG_DFL) for each in (signal.SIGHUP, signal.SIGQUIT)]; "
        f"{before}\n"
        f"sys.exit(supervisor.supervise([sys.executable, '-c', {child!r}], restarts=5))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def stop(process: subprocess.Popen[bytes], *numbers: int) -> tuple[int, float]:
    """Signals the supervisor; returns its status and the seconds until both processes are gone."""
    start = time.monotonic()
    for number in numbers:
        process.send_signal(number)
    process.communicate(timeout=90)
    return process.returncode, time.monotonic() - start


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_is_handed_on_and_nothing_is_started_again(name: str) -> None:
    number = signal.Signals[name]
    child = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); {LONG}"
    with supervising(child) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        status, took_s = stop(process, number)
    assert status == 128 + number
    assert took_s < 20


def test_a_signal_that_nohup_ignores_is_ignored() -> None:
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with supervising(LONG, before=ignore) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        assert stop(process, signal.SIGTERM)[0] == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_command_does_not_outlive_its_supervisor() -> None:
    with supervising(LONG) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        status, took_s = stop(process, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert took_s < 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_command_whose_supervisor_is_gone_already_is_not_started() -> None:
    path = Path(supervisor.__file__).with_name("supervised.py")
    command = [sys.executable, str(path), "0", sys.executable, "-c", "print('started')"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert (result.returncode, result.stdout) == (128 + signal.SIGTERM, b"")


def test_a_signal_while_the_command_is_being_started_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_process = subprocess.Popen

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return start_process(*args, **kwargs)

    monkeypatch.setattr("jaxserve.cli.supervisor.subprocess.Popen", signalled)
    start = time.monotonic()
    status = supervisor.supervise([sys.executable, "-c", "import time; time.sleep(30)"], restarts=5)
    assert status == 128 + signal.SIGTERM
    assert time.monotonic() - start < 20


def test_a_signal_ends_the_pause_between_restarts() -> None:
    with supervising("raise SystemExit(1)", before="supervisor.FIRST_PAUSE_S = 30") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"restart: ended with 1; starting again in 30")
        status, took_s = stop(process, signal.SIGTERM)
    assert status == 1
    assert took_s < 20


def test_a_command_is_started_again_when_nobody_reads() -> None:
    with supervising("print(1, flush=True); raise SystemExit(1)") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        assert [process.stdout.readline() for _ in range(2)] == [b"1\n"] * 2
        process.stderr = None
        stop(process, signal.SIGTERM)


@pytest.mark.parametrize("text", ["-1", "often", "1.5"])
def test_the_number_of_restarts_has_a_bound(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(f"--restart={text}")
    assert f"a number of restarts, 0 or more, not '{text}'" in capsys.readouterr().err


def test_the_supervised_command_is_the_same_without_restart() -> None:
    assert _without_restart(["launch", "--restart", "3", "m", "--port", "1"]) == [
        "launch",
        "m",
        "--port",
        "1",
    ]
    assert _without_restart(["launch", "--restart=3", "m"]) == ["launch", "m"]
