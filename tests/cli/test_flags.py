"""Flags are the fields of the two configs: names, types, defaults and help."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.generate import ONE_REQUEST
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.parser import build_parser, parse
from jaxserve.config import ServeConfig
from jaxserve.errors import ConfigError
from jaxserve.frontend.grpc.config import ServerConfig

ENVIRONMENT = Environment.read({"XDG_CACHE_HOME": "/cache"})


def parsed(*arguments: str) -> argparse.Namespace:
    return parse(build_parser(ENVIRONMENT), arguments)


@pytest.mark.parametrize("cls", [ServeConfig, ServerConfig])
def test_every_field_is_a_flag_of_launch_with_the_fields_default(cls: Any) -> None:
    values = flags.field_values(parsed("launch"), cls)
    assert values.keys() == {field.name for field in fields(cls)}
    for field in fields(cls):
        if field.default is not MISSING:
            assert values[field.name] == field.default, field.name


@pytest.mark.parametrize("cls", [ServeConfig, ServerConfig])
def test_flags_are_the_field_names_with_dashes(cls: Any) -> None:
    known = parsed("launch").parser._option_string_actions
    for field in fields(cls):
        if field.name not in ("model", *flags.NAMES):
            assert f"--{field.name.replace('_', '-')}" in known


def test_values_become_what_the_field_holds() -> None:
    options = parsed(
        *("launch", "some/model", "--max-rows", "8", "--kv-memory", "2GiB", "--watchdog-s", "1.5"),
        *("--no-prefix-cache", "--no-prompt-logprobs", "--chat-template", "a.jinja", "--port", "0"),
    )
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    assert config.model == "some/model"
    assert (config.max_rows, config.kv_memory_bytes, config.watchdog_s) == (8, 2**31, 1.5)
    assert (config.prefix_cache, config.prompt_logprobs) == (False, False)
    assert config.chat_template == Path("a.jinja")
    assert ServerConfig(**flags.field_values(options, ServerConfig)).port == 0


def test_tp_is_a_mesh_of_one_row() -> None:
    assert parsed("launch", "--tp", "4").mesh == "1x4"
    assert parsed("launch").mesh == "1x1"
    assert parsed("generate", "x", "--tp", "2").mesh == "1x2"


def test_names_that_people_know_from_elsewhere_mean_the_same() -> None:
    known = parsed("launch", "--cache-max-entry-count", "0.5", "--kv-dtype", "bf16")
    assert (known.kv_memory_fraction, known.kv_dtype) == (0.5, "bfloat16")
    assert parsed("generate", "x", "--kv-dtype", "fp8").kv_dtype == "fp8"


@pytest.mark.parametrize("command", [["launch"], ["generate", "x"], ["plan", "m"]])
@pytest.mark.parametrize("given", [["--mesh", "2x4", "--tp", "4"], ["--tp=4", "--mesh=2x4"]])
def test_mesh_and_tp_that_differ_are_refused(
    command: list[str], given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parsed(*command, *given)
    assert leaving.value.code == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert (
        error
        == "error: --mesh 2x4 and --tp 4 are both given, and --tp 4 is --mesh 1x4; give one of them"
    )


def test_mesh_and_tp_may_say_the_same_and_each_may_be_repeated() -> None:
    assert parsed("launch", "--mesh", "1x4", "--tp", "4").mesh == "1x4"
    assert parsed("launch", "--mesh", "2x4", "--mesh", "1x4").mesh == "1x4"
    assert parsed("launch", "--tp", "2", "--tp", "4").mesh == "1x4"


@pytest.mark.parametrize("text", ["0", "two", "-1"])
def test_tp_takes_a_number_of_devices(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("launch", f"--tp={text}")
    assert "is no number of devices; write for example 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000", 1000),
        ("2GiB", 2**31),
        ("512 MiB", 2**29),
        ("512mb", 2**29),
        ("1.5k", 1536),
        ("1T", 2**40),
        ("7b", 7),
    ],
)
def test_bytes_may_have_a_unit(text: str, value: int) -> None:
    assert flags.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 GiBs", "1e9"])
def test_other_bytes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write for example 2GiB, 512MiB"):
        flags.parse_bytes(text)


def test_help_is_the_docstring_of_the_field() -> None:
    text = " ".join(parsed("launch").parser.format_help().split())
    assert "Sequences computed together. Small wastes bandwidth" in text
    assert "(default: 64)" in text
    assert "if not given, the model's own window" in text
    assert "None" not in text


@dataclass
class Sample:
    one: int = 1
    """First ``line``
    and second."""
    two: int = 2
    three: int = 3
    """Third."""


def test_docs_belong_to_the_field_above_them() -> None:
    assert flags.field_docs(Sample) == {"one": "First line and second.", "three": "Third."}


# -- environment -----------------------------------------------------------------------------------


def test_the_environment_decides_defaults_and_flags_win() -> None:
    environment = Environment.read(
        {
            "JAXSERVE_SERVER": "far:1",
            "JAXSERVE_ASSETS": "/a",
            "JAXSERVE_CACHE": "/c",
            "HF_HUB_OFFLINE": "1",
        }
    )
    parser = build_parser(environment)
    options = parse(parser, ["generate", "x"])
    assert (server_of(options, environment), options.offline) == ("far:1", True)
    assert (options.assets_dir, options.cache_dir) == (Path("/a"), Path("/c"))
    assert parse(parser, ["chat"]).server == "far:1"
    options = parse(parser, ["generate", "x", "--server", "near:2", "--no-offline"])
    assert (options.server, options.offline) == ("near:2", False)
    options = parse(parser, ["generate", "x", "--server", "near:2"])
    assert server_of(options, environment) == "near:2"


def server_of(options: argparse.Namespace, environment: Environment) -> str | None:
    defaults = config_defaults(environment) | ONE_REQUEST
    return flags.server_for(options, environment.server, defaults)


def test_a_flag_for_this_process_wins_over_the_environments_server() -> None:
    environment = Environment.read({"JAXSERVE_SERVER": "far:1"})
    parser = build_parser(environment)
    for given in (["--model", "./checkpoint"], ["--mesh", "1x2"], ["--kv-memory", "1GiB"]):
        assert server_of(parse(parser, ["generate", "x", *given]), environment) is None


def test_a_named_server_and_flags_that_it_would_not_hear_of_are_refused_together() -> None:
    def server_with(*given: str) -> str | None:
        return server_of(parse(build_parser(ENVIRONMENT), ["generate", "x", *given]), ENVIRONMENT)

    with pytest.raises(ConfigError, match=r"--model, --mesh: a server decides that for itself"):
        server_with("--server", "near:2", "--model", "foo", "--mesh", "9x9")
    with pytest.raises(ConfigError, match=r"--server is empty; write HOST:PORT"):
        server_with("--server", "")


def test_without_environment_variables_there_are_defaults() -> None:
    assert ENVIRONMENT.cache_dir == Path("/cache/jaxserve")
    assert ENVIRONMENT.assets_dir == Path("/cache/jaxserve/assets")
    assert ENVIRONMENT.server is None
    assert ENVIRONMENT.default_server == "127.0.0.1:50051"
    empty = Environment.read({"JAXSERVE_SERVER": "", "JAXSERVE_CACHE": "", "XDG_CACHE_HOME": ""})
    assert empty.server is None
    assert empty.cache_dir == Path.home() / ".cache" / "jaxserve"
    assert not Environment.read({"HF_HUB_OFFLINE": "0"}).offline
