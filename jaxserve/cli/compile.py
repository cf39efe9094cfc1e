"""Compile the programs of a launch ahead of it, into a directory that `launch` loads them from.

The programs are for this machine's devices, this version of jaxserve and of JAX, and these flags; a
launch in which any of that differs refuses them and says what differs. No weights are read.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import ensure_asset, report_environment
from jaxserve.config import ServeConfig
from jaxserve.progress import show_progress

SUMMARY = "compile the programs of a launch ahead of it"
USAGE = "MODEL --out DIR [FLAGS]"
EXAMPLES = """\
  jaxserve compile smollm2 --out ./programs
  jaxserve launch smollm2 --executables ./programs
  jaxserve compile ./Llama-3.2-1B --mesh 1x4 --kv-memory 8GiB --out ./programs
"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the model, where programs are written, and what launch takes that they depend on."""
    defaults = config_defaults(environment)
    parser.add_argument("model", metavar="MODEL", help=flags.field_docs(ServeConfig)["model"])
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=Path, help="the directory to make"
    )
    flags.add_fields(parser, "model", ServeConfig, ("load_format", "offline"), defaults)
    machine = flags.add_fields(parser, "machine", ServeConfig, flags.MACHINE_FLAGS)
    flags.add_tensor_alias(machine)
    flags.add_fields(parser, "steps and memory", ServeConfig, flags.MEMORY_FLAGS)
    flags.add_fields(parser, "places", ServeConfig, flags.PLACE_FLAGS, defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Compiles; says what was written and how to launch with it."""
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        report_environment(progress)
        ensure_asset(config, progress)
        # After what can be refused at once: this imports jax.
        from jaxserve.ahead import compile_ahead

        done = compile_ahead(config, options.out, progress)
    print(
        f"wrote {done.path}: {done.programs} programs for {done.pages} pages, "
        f"{done.file_bytes:,} bytes, in {done.seconds:.1f} s"
    )
    model, path = (shlex.quote(str(part)) for part in (config.model, done.path))
    print(f"  jaxserve launch {model} --executables {path}, with the same flags")
    return 0
