"""`jaxserve launch`: the ready line, a clean end, and one clear line for every way not to start."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve import Client
from jaxserve.cli.launch import check_exposure, how_to_talk
from jaxserve.engine.request import FinishReason
from jaxserve.errors import ConfigError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.http.config import Doors
from jaxserve.serve import Ended

TINY = Path(__file__).parents[1] / "golden" / "tiny"
READY = (
    r"ready address=127\.0\.0\.1:\d+ http=127\.0\.0\.1:\d+ "
    r"model=dummy:tiny-llama mesh=data=1,tensor=1 pages=\d+ "
    r"page_tokens=32 context=256 quantization=none ready_seconds=\d+\.\d"
)


@pytest.mark.slow
def test_the_first_line_on_stdout_says_ready_with_all_facts(server: Any) -> None:
    assert re.fullmatch(READY, server.ready_line)


@pytest.mark.slow
def test_the_facts_of_the_ready_line_are_those_of_the_server(server: Any) -> None:
    with Client(server.address) as client:
        info, stats = client.model(), client.stats()
    facts = server.facts
    assert facts["model"] == info.name
    assert facts["mesh"] == info.mesh
    assert int(facts["pages"]) == info.pages_total == stats.pages_total
    assert int(facts["context"]) == info.context_tokens
    assert (facts["quantization"], info.quantization) == ("none", "")


@pytest.mark.slow
def test_stderr_tells_of_every_stage_and_of_settings_beside_their_defaults(server: Any) -> None:
    text = "".join(server.errors)
    for stage in ("[environment] python", "[compile] 0/5", "[weights] ", "[ready]"):
        assert stage in text
    assert re.search(r"max_rows +4  \[64\]", text)
    assert re.search(r"dtype +float32  \[auto\]", text)
    assert re.search(r"quantization +none  \[auto\]", text)
    assert re.search(r"kv_memory_bytes +4194304  \[None\]", text)
    assert "page_tokens  " not in text, "a default is not worth a line"


@pytest.mark.slow
def test_sigterm_lets_open_streams_finish_and_exits_with_0(launch: Callable[..., Any]) -> None:
    server = launch()
    with Client(server.address) as client:
        streams = [
            client.stream(f"{number} bottles", max_tokens=200, ignore_eos=True)
            for number in range(4)
        ]
        for stream in streams:
            next(stream)
        status, rest, errors = server.stop(signal.SIGTERM)
        finishes = [chunk.finish for stream in streams for chunk in stream if chunk.finish]
    assert [finish.reason for finish in finishes] == [FinishReason.LENGTH] * 4
    assert [finish.usage.output_tokens for finish in finishes] == [200] * 4
    assert status == 0
    assert "jaxserve chat --server " in rest
    assert errors.endswith("stopped\n")


# -- refusals, each in this process ----------------------------------------------------------------


@pytest.mark.slow
def test_a_port_in_use_is_noticed_before_anything_is_compiled(shell: Any, server: Any) -> None:
    port = server.address.rpartition(":")[2]
    result = shell("launch", shell.model, "--port", port, *shell.flags)
    assert result.status == 2
    assert result.err.endswith(
        f"error: cannot listen on 127.0.0.1:{port} (Address already in use); stop the process that "
        "uses the port, or choose another with --port (0 takes any free one) or another --host\n"
    )
    assert "[compile]" not in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/path", "model 'no/such/path' is no file or directory here, no hub id"),
        ("./gone.gguf", "model './gone.gguf' is no file or directory here"),
        ("dummy:gpt-5", "there is no built-in model 'gpt-5'; the names are smollm2-135m, "),
    ],
)
def test_an_unknown_model_is_one_line_and_exit_2(shell: Any, model: str, message: str) -> None:
    result = shell("launch", model, "--port", "0", *shell.flags)
    assert result.status == 2
    assert f"error: {message}" in result.err
    assert "Traceback" not in result.err


def test_the_default_model_without_its_file_says_how_to_fetch_it(
    shell: Any, tmp_path: Path
) -> None:
    """HF_HUB_OFFLINE is set in the tests, so nothing is fetched."""
    result = shell("launch", "--assets-dir", tmp_path, "--port", "0")
    assert result.status == 2
    assert "asset 'smollm2' is missing" in result.err
    assert "python -m jaxserve.assets smollm2" in result.err


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("1x64", r"--mesh 1x64: mesh data=1,tensor=64 needs 64 devices, 8 are visible"),
        ("8x8", r"--mesh 8x8: "),
        ("8", r"--mesh 8: a mesh is written DATAxTENSOR"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shell: Any, mesh: str, message: str) -> None:
    result = shell("launch", shell.model, "--mesh", mesh, "--port", "0", *shell.flags)
    assert result.status == 2
    assert f"error: {message}" in result.err


def test_a_checkpoint_without_a_tokenizer_is_refused(shell: Any) -> None:
    result = shell("launch", TINY / "llama", "--port", "0", *shell.flags)
    assert result.status == 2
    assert "has no tokenizer.json" in result.err


def test_a_truncated_checkpoint_is_refused(shell: Any, tmp_path: Path) -> None:
    shutil.copytree(TINY / "llama", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = shell("launch", tmp_path / "cut", "--port", "0", *shell.flags)
    assert result.status == 2
    assert "model.safetensors" in result.err
    assert "Traceback" not in result.err


def test_a_corrupt_gguf_is_refused(shell: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    result = shell("launch", path, "--port", "0", *shell.flags)
    assert result.status == 2
    assert f"error: {path}" in result.err


def test_every_problem_of_both_configs_is_reported_together(shell: Any) -> None:
    result = shell("launch", "--max-rows", "0", "--page-tokens", "7", "--port", "70000")
    assert result.status == 2
    for part in ("max_rows is 0;", "page_tokens is 7;", "port must be 0 to 65535, got 70000"):
        assert part in result.err


def test_debug_shows_where_an_error_was_raised(shell: Any) -> None:
    with pytest.raises(ConfigError, match="max_rows is 0"):
        shell("launch", "--max-rows", "0", "--debug")


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_addresses_need_no_permission(host: str) -> None:
    check_exposure(ServerConfig(host=host), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.7", "example.org"])
def test_other_addresses_need_insecure(host: str) -> None:
    with pytest.raises(ConfigError, match=r"opens the server to other machines.*add --insecure"):
        check_exposure(ServerConfig(host=host), insecure=False)
    check_exposure(ServerConfig(host=host), insecure=True)


def test_launch_refuses_an_open_host(shell: Any) -> None:
    result = shell("launch", "--host", "0.0.0.0")
    assert result.status == 2
    assert result.err.startswith("error: --host 0.0.0.0 opens the server")


def test_commands_shown_for_an_open_host_name_an_address_that_can_be_reached() -> None:
    for host, here in (("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("[::]", "[::1]")):
        config = ServerConfig(host=host)
        text = how_to_talk(Doors(config.address, f"{host}:8000"), config)
        assert config.address not in text
        assert f"jaxserve chat --server {here}:50051" in text
        assert f"curl http://{here}:8000/v1/chat/completions" in text
        assert "buf curl" not in text, "there is no reflection for it"


def test_the_data_in_the_shown_buf_command_is_json() -> None:
    text = how_to_talk(Doors("127.0.0.1:1"), ServerConfig())
    match = re.search(r"-d '([^']*)'", text)
    assert match is not None
    assert json.loads(match[1]) == {"text": "The sky is", "max_tokens": 8}


@pytest.mark.parametrize(
    ("ended", "status", "last_line"),
    [
        (Ended(None, clean=True), 0, "stopped"),
        (Ended("the engine has ended: oops", clean=True), 1, "error: the engine has ended: oops"),
    ],
)
def test_the_exit_status_says_whether_the_engine_failed(
    shell: Any,
    monkeypatch: pytest.MonkeyPatch,
    ended: Ended,
    status: int,
    last_line: str,
) -> None:
    monkeypatch.setattr("jaxserve.serve.serve", lambda *_, **__: ended)
    result = shell("launch", shell.model)
    assert result.status == status
    assert result.err.splitlines()[-1] == last_line


def test_a_thread_that_hangs_does_not_keep_the_process(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.serve.serve", lambda *_, **__: Ended(None, clean=False))
    monkeypatch.setattr("os._exit", lambda status: pytest.fail(f"left with {status}", False))
    with pytest.raises(pytest.fail.Exception, match="left with 1"):
        shell("launch", shell.model)


def test_a_program_that_is_being_compiled_does_not_keep_it_and_is_no_failure(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Ended(None, clean=False, compiling=True)
    monkeypatch.setattr("jaxserve.serve.serve", lambda *_, **__: ended)
    monkeypatch.setattr("os._exit", lambda status: pytest.fail(f"left with {status}", False))
    with pytest.raises(pytest.fail.Exception, match="left with 0"):
        shell("launch", shell.model)


# -- a reader that has left ------------------------------------------------------------------------

SERVE = """
import sys, threading, time, types
import jaxserve
from jaxserve import cli, errors
from jaxserve.cli import launch, words

def serve(*_, on_lost=None, **__):
    print("there", flush=True)
    sys.stdin.readline()
    {end}

def ended(failure, clean=True, compiling=False):
    return types.SimpleNamespace(failure=failure, clean=clean, compiling=compiling)

jaxserve.serve = sys.modules["jaxserve.serve"] = types.SimpleNamespace(serve=serve)
launch.report_environment = launch.ensure_asset = lambda *_: None
sys.exit(cli.main(["launch", "dummy:tiny-llama", *sys.argv[1:]]))
"""
HOSTS = ("--hosts", "2", "--host-id", "0", "--coordinator", "127.0.0.1:1")


def left_alone(end: str, *flags: str) -> int:
    """The exit status of a launch that ends so when nobody reads its output any more."""
    code = SERVE.format(end=end)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        lines = []
        while not lines or b"there" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        process.stdout.close()
    return process.wait(20)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("return ended('the engine has ended: oops')", 1),
        ("return ended(None)", 0),
        ("return ended(None, clean=False, compiling=True)", 0),
        ("raise errors.GroupError('host 1 was lost')", 1),
        ("raise errors.LaunchError('the port is taken')", 2),
        ("words.tell('ready'); words.tell('how to talk'); return ended(None)", 0),
        ("print('more', flush=True)", 1),
    ],
    ids=[
        "failed",
        "stopped",
        "compiling",
        "an error",
        "a flag has to change",
        "ready",
        "something else",
    ],
)
@pytest.mark.parametrize("flags", [(), HOSTS], ids=["one host", "hosts"])
def test_the_exit_status_is_the_same_when_nobody_reads(
    end: str, status: int, flags: tuple[str, ...]
) -> None:
    assert left_alone(end, *flags) == status


def test_a_lost_host_ends_this_one_when_nobody_reads() -> None:
    lost = "on_lost(errors.GroupError('host 1 was lost'))"
    end = f"threading.Thread(target=lambda: {lost}).start(); time.sleep(15)"
    assert left_alone(end, *HOSTS) == 1
