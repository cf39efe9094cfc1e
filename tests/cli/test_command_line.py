"""What all commands share: help, errors with suggestions, exit statuses."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any

import pytest

from jaxserve import __version__
from jaxserve.cli import version
from jaxserve.cli.parser import COMMANDS, suggestion
from jaxserve.errors import (
    CheckpointError,
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
)

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def test_help_lists_the_commands_with_examples_and_environment_variables(shell: Any) -> None:
    result = shell("--help")
    assert result.status == 0
    for name in NAMES:
        assert f"\n    {name} " in result.out
    assert "jaxserve launch smollm2" in result.out
    assert "JAXSERVE_SERVER" in result.out


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_examples(shell: Any, name: str) -> None:
    result = shell(name, "--help")
    assert result.status == 0
    assert result.out.startswith(f"usage: jaxserve {name} ")
    assert f"examples:\n  jaxserve {name}" in result.out
    assert "HF_HUB_OFFLINE" in result.out
    assert "--debug" in result.out


def test_no_command_prints_help_and_is_an_error(shell: Any) -> None:
    result = shell()
    assert result.status == 2
    assert "usage: jaxserve" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch", "--max-row", "8"], "unknown flag --max-row; did you mean --max-rows?"),
        (["launch", "--no-prefx-cache"], "unknown flag --no-prefx-cache; did you mean --no-prefix"),
        (["generate", "x", "--max-token=3"], "unknown flag --max-token; did you mean --max-tokens"),
        (["chat", "--zzz"], "unknown flag --zzz\n"),
        (["generate", "two", "words"], "unexpected argument 'words'; quote arguments that contain"),
        (["lunch"], "there is no command 'lunch'; did you mean launch?"),
        (["xyzzy"], "there is no command 'xyzzy'\n"),
        (["--zzz"], "the following arguments are required: COMMAND"),
        (["launch", "--max-rows", "many"], "argument --max-rows: invalid int value: 'many'"),
        (["launch", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["launch", "--kv-memory", "lots"], "argument --kv-memory: 'lots' is no number of bytes"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["convert", "smollm2"], "the following arguments are required: OUT"),
        (["quantize", "smollm2"], "the following arguments are required: OUT"),
        (["quantize", "a", "b", "--format", "int3"], "argument --format: invalid choice: 'int3'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    shell: Any, arguments: list[str], message: str
) -> None:
    result = shell(*arguments)
    assert result.status == 2
    assert result.err.startswith(f"error: {message}")
    assert result.err.rstrip().endswith("--help'.")
    assert result.err.count("\n") == 2


def test_suggestions_are_close_or_absent() -> None:
    assert suggestion("--sed", ["--seed", "--stop"]) == "; did you mean --seed?"
    assert suggestion("--sed", ["--page-tokens"]) == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckpointError("no file"), 2),
        (InvalidRequestError("too hot", field="temperature"), 2),
        (ModelNotFoundError("a", "b"), 2),
        (DrainingError(), 1),
        (EngineDeadError("fire"), 1),
    ],
)
def test_errors_are_one_line_and_their_class_decides_the_exit_status(
    shell: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(options: argparse.Namespace, environment: object) -> int:
        raise error

    monkeypatch.setattr(version, "run", fail)
    result = shell("version")
    assert result.status == status
    assert result.err == f"error: {error}\n"
    with pytest.raises(type(error)):
        shell("version", "--debug")


def test_an_interrupted_command_exits_with_130(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: argparse.Namespace, environment: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(version, "run", interrupt)
    assert shell("version").status == 130


def test_a_reader_that_leaves_is_no_error(
    shell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def write(options: argparse.Namespace, environment: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(version, "run", write)
    with (tmp_path / "pipe").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        result = shell("version")
    assert (result.status, result.err) == (0, "")


def test_version_names_everything_that_matters(shell: Any) -> None:
    result = shell("version")
    lines = dict(line.split() for line in result.out.splitlines())
    assert lines["jaxserve"] == __version__
    assert {"python", "jax", "jaxlib", "flax", "grpcio"} <= lines.keys()
    assert shell("--version").out == f"jaxserve {__version__}\n"
    assert '"jaxserve": ' in shell("version", "--json").out


def test_a_package_that_is_missing_is_called_so(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.cli.models.PACKAGES", ("no-such-package",))
    assert "no-such-package missing" in shell("version").out


# -- against a server, and in this process ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [["--temperature", "0"], ["--temperature", "0.9", "--top-p", "0.95", "--seed", "11"]],
    ids=["greedy", "seeded"],
)
def test_generate_gives_the_same_tokens_on_a_server_and_in_process(
    shell: Any, server: Any, sampling: list[str]
) -> None:
    import json

    arguments = ["generate", "The sky is", "--json", "--max-tokens", "24", *sampling]
    here = shell(*arguments, "--model", shell.model, *shell.flags)
    there = shell(*arguments, "--server", server.address)
    assert (here.status, there.status) == (0, 0)
    ours, theirs = json.loads(here.out), json.loads(there.out)
    keys = ["text", "token_ids", "finish_reason", "prompt_tokens", "output_tokens"]
    assert [ours[key] for key in keys] == [theirs[key] for key in keys]
    assert list(ours) == [*keys, "cached_tokens", "ttft_ms", "tokens_per_s"]
    assert ours["prompt_tokens"] == 10
    assert ours["output_tokens"] == len(ours["token_ids"])
    assert ours["ttft_ms"] > 0
    assert ours["tokens_per_s"] > 0


@pytest.mark.slow
def test_generate_streams_text_from_a_prompt_on_stdin(
    shell: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    arguments = ["--server", server.address, "--max-tokens", "8", "--temperature", "0"]
    expected = json.loads(shell("generate", "Hello", "--json", *arguments).out)["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert shell("generate", "-", *arguments).out == expected + "\n"


@pytest.mark.slow
def test_generate_can_ask_as_a_chat_and_stop_at_a_text(shell: Any, server: Any) -> None:
    import json

    arguments = ["generate", "Hi", "--chat", "--json", "--server", server.address, "--seed", "1"]
    answer = json.loads(shell(*arguments, "--max-tokens", "60").out)
    assert answer["prompt_tokens"] == len("user\nHi\nassistant\n") + 3
    stop = answer["text"][3]
    stopped = json.loads(shell(*arguments, "--max-tokens", "60", "--stop", stop).out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == answer["text"][: answer["text"].index(stop)]


@pytest.mark.slow
def test_a_bad_value_is_the_servers_sentence_and_exit_2(shell: Any, server: Any) -> None:
    result = shell("generate", "x", "--temperature", "-1", "--server", server.address)
    assert result.status == 2
    assert result.err == "error: temperature must be a finite number, 0 to 100, got -1\n"


def test_a_deadline_needs_a_server(shell: Any) -> None:
    result = shell("generate", "x", "--timeout-s", "2", *shell.flags)
    assert result.status == 2
    assert "--timeout-s needs --server" in result.err


@pytest.mark.parametrize("command", [["generate"], ["tokenize"]])
def test_input_that_is_not_utf_8_is_refused(shell: Any, command: list[str]) -> None:
    """Python reads a byte that is not UTF-8 as half a character."""
    result = shell(*command, "caf\udce9", "--server", "127.0.0.1:1")
    assert result.status == 2
    assert result.err.startswith("error: prompt cannot be sent: ")
    result = shell("tokenize", "caf\udce9", "--model", "dummy:tiny-llama")
    assert result.status == 2
    assert result.err.startswith("error: prompt is not Unicode at character 3; send text that is")


def test_a_model_that_does_not_exist_has_no_tokenizer(shell: Any) -> None:
    result = shell("tokenize", "x", "--model", "dummy:nope")
    assert result.status == 2
    assert "no built-in" in result.err


def test_generate_without_its_server_says_so(shell: Any) -> None:
    result = shell("generate", "x", "--server", "127.0.0.1:1", "--timeout-s", "2")
    assert result.status == 1
    assert "no answer from the server at 127.0.0.1:1" in result.err


@pytest.mark.slow
def test_stats_are_a_table_or_json(shell: Any, server: Any) -> None:
    import json

    table = shell("stats", "--server", server.address).out
    assert "rows_max                   4\n" in table
    assert "phase_seconds_total        " in table
    stats = json.loads(shell("stats", "--json", "--server", server.address).out)
    assert stats["pages_total"] == (
        stats["pages_free"] + stats["pages_used"] + stats["pages_cached"]
    )
    assert stats["healthy"] is True


@pytest.mark.slow
def test_each_data_shard_has_a_line_of_its_own_in_the_table() -> None:
    from jaxserve.cli import stats
    from jaxserve.engine.stats import EngineStats, ShardStats

    shards = (ShardStats(3, 4, 9, 2, 6, 1, 100, 25), ShardStats(0, 4, 9, 9, 0, 0, 0, 0))

    assert stats.table(EngineStats(data_shards=shards)).splitlines()[-2:] == [
        "data_shard 0               rows 3/4  pages 6 used, 1 cached, 2 free  prefix hits 25%",
        "data_shard 1               rows 0/4  pages 0 used, 0 cached, 9 free  prefix hits 0%",
    ]
    assert "data_shard" not in stats.table(EngineStats(data_shards=shards[:1]))


def test_watched_stats_are_one_line_each_until_ctrl_c(
    shell: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from jaxserve.cli import stats

    lines: list[str] = []
    line = stats.line

    def count(snapshot: Any) -> str:
        lines.append(line(snapshot))
        if len(lines) == 3:
            raise KeyboardInterrupt
        return lines[-1]

    monkeypatch.setattr(stats, "line", count)
    flags = ["stats", "--watch", "--interval-s", "0.1", "--server", server.address]
    result = shell(*flags)
    assert result.status == 130
    assert result.out.splitlines() == lines[:2]
    assert lines[0].startswith("rows 0/4  waiting 0 (0.0 s)  pages 0 used, ")
    assert lines[0].endswith("healthy")

    def stop(value: Any) -> str:
        monkeypatch.setattr(json, "dumps", interrupt)
        return "{}"

    def interrupt(value: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", stop)
    assert shell(*flags, "--json").out == "{}\n"


@pytest.mark.slow
def test_tokens_are_the_same_from_a_server_and_from_the_tokenizer_alone(
    shell: Any, server: Any
) -> None:
    there = shell("tokenize", "héllo", "--server", server.address)
    here = shell("tokenize", "héllo", "--model", shell.model)
    assert there.out == here.out
    assert there.out.splitlines()[0] == "      74 'h'"
    assert here.err == "6 tokens\n"


def test_tokenize_reads_stdin_and_writes_json(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setattr(sys, "stdin", io.StringIO("<|im_start|>hi"))
    result = shell("tokenize", "-", "--json", "--model", shell.model)
    assert json.loads(result.out) == {
        "token_ids": [1, 74, 75],
        "token_texts": ["<|im_start|>", "h", "i"],
    }


def test_tokenize_refuses_a_model_without_a_tokenizer(shell: Any, tmp_path: Any) -> None:
    result = shell("tokenize", "x", "--model", tmp_path)
    assert result.status == 2
    assert str(tmp_path) in result.err


def test_tokenize_loads_the_default_model_from_its_asset(shell: Any, assets: Any) -> None:
    assets("smollm2")
    result = shell("tokenize", "Hello 123")
    assert result.status == 0
    assert result.out.split()[1] == "'Hello'"
    assert "'1'" in result.out, "digits are split"


@pytest.mark.slow
def test_demo_asks_a_real_server_and_prints_its_timing(shell: Any) -> None:
    flags = ["--model", shell.model, *shell.flags, "--max-tokens", "6"]
    result = shell("demo", "Hello?", *flags)
    assert result.status == 0
    ready, question, *answer = result.out.splitlines()
    assert ready.startswith("ready address=127.0.0.1:")
    assert question == "> Hello?"
    assert "6 output tokens, time to first token " in answer[-1]
    assert answer[-1].endswith(" tokens/s]")
