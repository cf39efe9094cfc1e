"""Serve a model over gRPC until Ctrl-C or SIGTERM.

The first line on stdout says `ready address=... model=...`; everything before it is on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NoReturn

from jaxserve.cli import flags, http_flags, launchers, supervisor
from jaxserve.cli.environment import Environment
from jaxserve.cli.models import ensure_asset, report_environment
from jaxserve.cli.plan_table import describe_beside
from jaxserve.cli.words import say, tell
from jaxserve.config import GroupConfig, ServeConfig
from jaxserve.errors import ConfigError, GroupError, JaxserveError, LaunchError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.http.config import Doors, HttpConfig
from jaxserve.progress import Progress, show_progress

if TYPE_CHECKING:
    from jaxserve.launch import Service
    from jaxserve.runner.runner import Runner
    from pallas_kernels.quantized_matmul import Format

SUMMARY = "serve a model over gRPC and HTTP"
USAGE = "[MODEL] [FLAGS]"
EXAMPLES = """\
  jaxserve launch                                the default model on 127.0.0.1: gRPC on 50051,
                                                 OpenAI's routes over HTTP on 8000
  jaxserve launch smollm2 --port 7000 --http-port 7001 --max-rows 128
  jaxserve launch ./Llama-3.2-1B --dtype bfloat16 --mesh 1x4
  jaxserve launch owner/name --context-tokens 8192 --kv-memory 8GiB
  jaxserve launch dummy:llama-3.1-8b             random weights, to try sizes
  jaxserve launch --host 0.0.0.0 --insecure      for other machines, unencrypted
  jaxserve launch MODEL --mesh 2x4 --device cpu:8          eight simulated devices
  jaxserve launch MODEL --mesh 2x4 --hosts 2 --host-id 0 --coordinator 10.0.0.1:8476
                                                 and the same with --host-id 1 on the other host
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
        help="allow a --host that other machines reach, without TLS or a password, and a "
        "--coordinator that they reach, without a group secret",
    )
    http_flags.add_flags(parser)
    launchers.add_flags(parser)
    parser.add_argument(
        "--restart",
        type=_restarts,
        default=0,
        metavar="N",
        help="start again up to N times in a row when it fails (default: 0)",
    )
    flags.add_fields(parser, "places", ServeConfig, (*flags.PLACE_FLAGS, "executables"), defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Serves; returns 0 after a signal and 1 when the engine failed."""
    try:
        return _run(options, environment)
    except BrokenPipeError as error:
        # Other commands have told all that was wanted; a server has not served.
        say(f"error: the reader of the output has left: {error}")
        _exit_now(1)


def _run(options: argparse.Namespace, environment: Environment) -> int:
    config, server_config, http_config = read_configs(options)
    check_exposure(server_config, insecure=options.insecure)
    hosts = launchers.read_group(options, environment.variables, insecure=options.insecure)
    if options.restart:
        command = [sys.executable, "-m", "jaxserve", *_without_restart(sys.argv[1:])]
        return supervisor.supervise(command, restarts=options.restart)
    if hosts.hosts > 1:
        sys.stderr = Tagged(sys.stderr, f"[host {hosts.host_id}] ")
    # After that: the log keeps the stream that it finds.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It says when all programs are there.
    logging.getLogger("jaxserve.late").setLevel(logging.INFO)
    if hosts.hosts > 1:
        # What exchanges data between CPU hosts talks on standard output, which is for scripts.
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        _exit_now(_run_host(config, server_config, http_config, hosts, environment))
    with show_progress() as progress:
        report_environment(progress)
        ensure_asset(config, progress)
        # After what can be refused at once: this imports jax.
        from jaxserve.serve import serve

        ended = serve(
            config,
            server_config,
            http_config=http_config,
            report=progress,
            before_ready=_leave_early(progress),
            on_ready=lambda service, doors: _announce(service, doors, server_config, progress),
        )
    say("stopped" if ended.failure is None else f"error: {ended.failure}")
    status = 0 if ended.failure is None else 1
    if ended.compiling:
        say("a program was being compiled, which cannot be interrupted; leaving without it")
        _exit_now(status)
    if not ended.clean:
        say("error: a thread does not end; leaving without it")
        _exit_now(status or 1)
    return status


def _run_host(
    config: ServeConfig,
    server_config: ServerConfig,
    http_config: HttpConfig | None,
    hosts: GroupConfig,
    environment: Environment,
) -> int:
    """One host's part; the process has to be left at once, because JAX waits for lost hosts."""
    progress = show_progress()
    report_environment(progress)

    def lost(error: GroupError) -> NoReturn:
        say(f"error: {error}")
        _exit_now(1)

    try:
        ensure_asset(config, progress)
        from jaxserve import serve

        if hosts.host_id:
            ended = serve.serve_follower(
                config,
                hosts,
                report=progress,
                before_ready=_leave_early(progress),
                on_lost=lost,
                on_ready=lambda seconds: tell(
                    f"ready host_id={hosts.host_id} ready_seconds={seconds:.1f}"
                ),
            )
        else:
            ended = serve.serve(
                config,
                server_config,
                http_config=http_config,
                hosts=hosts,
                report=progress,
                before_ready=_leave_early(progress),
                on_lost=lost,
                on_ready=lambda service, doors: _announce(service, doors, server_config, progress),
            )
    except JaxserveError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, LaunchError) else 1
    except Exception:
        say(traceback.format_exc().rstrip("\n"))
        return 1
    say("stopped" if ended.failure is None else f"error: {ended.failure}")
    return 0 if ended.failure is None else 1


class Tagged:
    """A text stream that begins every line with a tag."""

    def __init__(self, file: Any, tag: str) -> None:
        """Writes to ``file``."""
        self._file = file
        self._tag = tag
        self._at_start = True
        self._lock = threading.RLock()  # A signal's handler may print while a line is printed.

    def write(self, text: str) -> int:
        """Writes a piece of text, which may end within a line."""
        with self._lock:
            for line in text.splitlines(keepends=True):
                self._file.write(self._tag + line if self._at_start else line)
                self._at_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._file.flush()

    def isatty(self) -> bool:
        """Never: bars that redraw themselves and tags do not go together."""
        return False

    def fileno(self) -> int:
        """The stream's own."""
        return int(self._file.fileno())


def _restarts(text: str) -> int:
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"a number of restarts, 0 or more, not {text!r}")


def _without_restart(arguments: list[str]) -> list[str]:
    """The same command for the process that is supervised."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--restart" and not argument.startswith("--restart="):
            kept.append(argument)
        skip = argument == "--restart"
    return kept


def config_defaults(environment: Environment) -> dict[str, Any]:
    """Returns the defaults of fields that the environment decides."""
    return {
        "assets_dir": environment.assets_dir,
        "cache_dir": environment.cache_dir,
        "offline": environment.offline,
    }


def read_configs(
    options: argparse.Namespace,
) -> tuple[ServeConfig, ServerConfig, HttpConfig | None]:
    """Makes the configs of the engine and of both doors.

    Raises:
        ConfigError: every problem of the first two, or what is wrong with the last.
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
    return config, server, http_flags.read_config(options, server)


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
    service: Service, doors: Doors, server_config: ServerConfig, progress: Progress
) -> None:
    progress.close()
    say(describe_plan(service, server_config))
    tell(ready_line(service, doors))
    tell(how_to_talk(doors, server_config))


def ready_line(service: Service, doors: Doors) -> str:
    """Returns the line that scripts wait for."""
    info = service.info
    return (
        f"ready address={doors.grpc} http={doors.http or 'none'} model={info.name} "
        f"mesh={info.mesh} pages={info.pages_total} "
        f"page_tokens={info.page_tokens} context={info.context_tokens} "
        f"quantization={info.quantization or 'none'} "
        f"ready_seconds={service.ready_seconds:.1f}"
    )


def how_to_talk(doors: Doors, config: ServerConfig) -> str:
    """Returns commands that reach the server from this machine."""
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host.strip("[]"))

    def from_here(address: str) -> str:
        return f"{here}:{address.rpartition(':')[2]}" if here else address

    address = from_here(doors.grpc)
    code = f"from jaxserve import Client; c = Client({address!r}); print(c.chat('Hello').text)"
    curl = f"""
  buf curl --protocol grpc --http2-prior-knowledge -d '{{"text": "The sky is", "max_tokens": 8}}' \\
      http://{address}/jaxserve.v1.GenerationService/Generate"""
    http = ""
    if doors.http is not None:
        http = f"""
  curl http://{from_here(doors.http)}/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'"""
    return f"""\
  jaxserve chat --server {address}
  python -c "{code}"{curl if config.is_local else ""}{http}
Ctrl-C stops it: running requests may finish, a second Ctrl-C gives them up."""


def _quantized(formats: dict[str, Format]) -> list[str]:
    """A line that names the quantized weights, if there are any."""
    names = {
        format: ", ".join(name for name, its in sorted(formats.items()) if its == format)
        for format in sorted(set(formats.values()))
    }
    parts = [f"{format} {weights}" for format, weights in names.items()]
    return [f"quantized weights: {'; '.join(parts)}"] if parts else []


def _widened(service: Service) -> list[str]:
    """A line for each weight that takes more memory than in the checkpoint, and why."""
    plan = service.plan
    if service.config.quantization == "none":
        return []
    reasons = service.source.why_widened(plan.formats)
    return [f"{name} widened to {plan.dtype.name}: {why}" for name, why in sorted(reasons.items())]


def _programs(runner: Runner) -> str:
    total, missing = len(runner.program_keys()), len(runner.missing_keys())
    if not missing:
        return f"{total} programs compiled"
    return f"{total - missing} of {total} programs compiled, the others follow"


def describe_plan(service: Service, server_config: ServerConfig) -> str:
    """Returns what runs: the model, the pool, and each setting that is not its default."""
    plan, info = service.plan, service.info
    resolved = {
        "served_name": info.name,
        "mesh": info.mesh,
        "device": info.platform,
        "dtype": info.dtype,
        "quantization": info.quantization or "none",
        "kv_dtype": info.kv_dtype,
        "context_tokens": info.context_tokens,
        "kv_memory_bytes": plan.kv_bytes,
    }
    lines = [
        f"{info.name}: {info.architecture}, {info.parameters / 1e6:,.1f}M parameters, "
        f"digest {info.model_digest[:12]}",
        f"{_programs(service.runner)}; {info.pages_total} pages of {info.page_tokens} tokens",
        *_quantized(plan.formats),
        *_widened(service),
        f"kernels: {_kernels(service.runner.kernels())}",
        "settings other than the defaults, which stand in brackets:",
    ]
    for config in (service.config, server_config):
        for field in fields(config):
            value = resolved.get(field.name, getattr(config, field.name))
            if value != field.default:
                default = "" if field.default is MISSING else f"  [{field.default}]"
                lines.append(f"  {field.name:22} {value}{default}")
    if service.beside is not None:
        lines += ["what `jaxserve plan` predicts, and what this launch takes:"]
        lines += [describe_beside(service.beside)]
    else:
        lines += [f"no plan: no facts are known of {plan.mesh.devices.flat[0].device_kind}"]
    return "\n".join(lines)


def _kernels(made_of: Mapping[str, Sequence[str]]) -> str:
    """What each op is computed by, such as ``paged_attention native``."""
    if not made_of:
        return "unknown, programs were loaded without notes of them"
    return ", ".join(f"{family} {' and '.join(names)}" for family, names in made_of.items())


def _leave_early(progress: Progress) -> Callable[[int], NoReturn]:
    def leave(number: int) -> NoReturn:
        # Compilation cannot be interrupted, and there is nothing to drain yet.
        progress.close()
        say(f"stopped by {signal.Signals(number).name} before ready")
        _exit_now(128 + number)

    return leave


def _exit_now(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
