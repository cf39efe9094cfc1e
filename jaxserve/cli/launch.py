"""Serve a model over gRPC until Ctrl-C or SIGTERM.

The first line on stdout says `ready address=... model=...`; everything before it is on stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NoReturn

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.models import ensure_asset, report_environment
from jaxserve.config import ServeConfig
from jaxserve.errors import ConfigError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.progress import Progress, show_progress

if TYPE_CHECKING:
    from jaxserve.launch import Service

SUMMARY = "serve a model over gRPC"
USAGE = "[MODEL] [FLAGS]"
EXAMPLES = """\
  jaxserve launch                                the default model on 127.0.0.1:50051
  jaxserve launch smollm2 --port 8000 --max-rows 128
  jaxserve launch ./Llama-3.2-1B --dtype bfloat16 --mesh 1x4
  jaxserve launch owner/name --context-tokens 8192 --kv-memory 8GiB
  jaxserve launch dummy:llama-3.1-8b             random weights, to try sizes
  jaxserve launch --host 0.0.0.0 --insecure      for other machines, unencrypted
"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the model and a flag for every field of ServeConfig and ServerConfig."""
    defaults = config_defaults(environment)
    parser.add_argument(
        "model",
        nargs="?",
        default=ServeConfig.model,
        metavar="MODEL",
        help=f"{flags.field_docs(ServeConfig)['model']} (default: {ServeConfig.model})",
    )
    flags.add_fields(parser, "model", ServeConfig, flags.MODEL_FLAGS, defaults)
    machine = flags.add_fields(parser, "machine", ServeConfig, flags.MACHINE_FLAGS)
    flags.add_tensor_alias(machine)
    flags.add_fields(parser, "steps and memory", ServeConfig, flags.MEMORY_FLAGS)
    flags.add_fields(parser, "limits", ServeConfig, flags.LIMIT_FLAGS)
    names = [field.name for field in fields(ServerConfig)]
    server = flags.add_fields(parser, "server", ServerConfig, names)
    server.add_argument(
        "--insecure",
        action="store_true",
        help="allow a --host that other machines reach; there is no TLS and no password",
    )
    flags.add_fields(parser, "places", ServeConfig, flags.PLACE_FLAGS, defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Serves; returns 0 after a signal and 1 when the engine failed."""
    config, server_config = read_configs(options)
    check_exposure(server_config, insecure=options.insecure)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with show_progress() as progress:
        report_environment(progress)
        ensure_asset(config, progress)
        # After what can be refused at once: this imports jax.
        from jaxserve.serve import serve

        ended = serve(
            config,
            server_config,
            report=progress,
            before_ready=_leave_early(progress),
            on_ready=lambda service, address: _announce(service, address, server_config, progress),
        )
    if ended.failure is not None:
        print(f"error: {ended.failure}", file=sys.stderr)
    else:
        print("stopped", file=sys.stderr)
    status = 0 if ended.failure is None else 1
    if not ended.clean:
        print("error: a thread does not end; leaving without it", file=sys.stderr)
        _exit_now(status or 1)
    return status


def config_defaults(environment: Environment) -> dict[str, Any]:
    """Returns the defaults of fields that the environment decides."""
    return {
        "assets_dir": environment.assets_dir,
        "cache_dir": environment.cache_dir,
        "offline": environment.offline,
    }


def read_configs(options: argparse.Namespace) -> tuple[ServeConfig, ServerConfig]:
    """Makes both configs.

    Raises:
        ConfigError: every problem of both.
    """
    problems: list[str] = []

    def attempt[T](make: Callable[..., T], cls: type) -> T | None:
        try:
            return make(**flags.field_values(options, cls))
        except ConfigError as error:
            problems.append(str(error))
            return None

    config = attempt(ServeConfig, ServeConfig)
    server = attempt(ServerConfig, ServerConfig)
    if config is None or server is None:
        raise ConfigError("; ".join(problems))
    return config, server


def check_exposure(config: ServerConfig, *, insecure: bool) -> None:
    """Refuses to open an unencrypted port to other machines by accident.

    Raises:
        ConfigError: the host is not this machine's loopback and --insecure is not given.
    """
    if not config.is_local and not insecure:
        raise ConfigError(
            f"--host {config.host} opens the server to other machines, without encryption or "
            "password; add --insecure if the network is trusted, or listen on 127.0.0.1 behind a "
            "proxy"
        )


def _announce(
    service: Service, address: str, server_config: ServerConfig, progress: Progress
) -> None:
    progress.close()
    print(describe_plan(service, server_config), file=sys.stderr, flush=True)
    print(ready_line(service, address), flush=True)
    print(how_to_talk(address, server_config), flush=True)


def ready_line(service: Service, address: str) -> str:
    """Returns the line that scripts wait for."""
    info = service.info
    return (
        f"ready address={address} model={info.name} mesh={info.mesh} pages={info.pages_total} "
        f"page_tokens={info.page_tokens} context={info.context_tokens} "
        f"ready_seconds={service.ready_seconds:.1f}"
    )


def how_to_talk(address: str, config: ServerConfig) -> str:
    """Returns commands that reach the server from this machine."""
    if here := {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host.strip("[]")):
        address = f"{here}:{address.rpartition(':')[2]}"
    code = f"from jaxserve import Client; c = Client({address!r}); print(c.chat('Hello').text)"
    curl = f"""
  buf curl --protocol grpc --http2-prior-knowledge -d '{{"text": "The sky is", "max_tokens": 8}}' \\
      http://{address}/jaxserve.v1.GenerationService/Generate"""
    return f"""\
  jaxserve chat --server {address}
  python -c "{code}"{curl if config.is_local else ""}
Ctrl-C stops it: running requests may finish, a second Ctrl-C gives them up."""


def describe_plan(service: Service, server_config: ServerConfig) -> str:
    """Returns what runs: the model, the pool, and each setting that is not its default."""
    plan, info = service.plan, service.info
    resolved = {
        "served_name": info.name,
        "mesh": info.mesh,
        "device": info.platform,
        "dtype": info.dtype,
        "kv_dtype": info.kv_dtype,
        "context_tokens": info.context_tokens,
        "kv_memory_bytes": plan.kv_bytes,
    }
    lines = [
        f"{info.name}: {info.architecture}, {info.parameters / 1e6:,.1f}M parameters, "
        f"digest {info.model_digest[:12]}",
        f"{len(service.runner.program_keys())} programs compiled, {info.pages_total} pages of "
        f"{info.page_tokens} tokens",
        "settings other than the defaults, which stand in brackets:",
    ]
    for config in (service.config, server_config):
        for field in fields(config):
            value = resolved.get(field.name, getattr(config, field.name))
            if value != field.default:
                default = "" if field.default is MISSING else f"  [{field.default}]"
                lines.append(f"  {field.name:22} {value}{default}")
    return "\n".join(lines)


def _leave_early(progress: Progress) -> Callable[[int], NoReturn]:
    def leave(number: int) -> NoReturn:
        # Compilation cannot be interrupted, and there is nothing to drain yet.
        progress.close()
        print(f"stopped by {signal.Signals(number).name} before ready", file=sys.stderr)
        _exit_now(128 + number)

    return leave


def _exit_now(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
