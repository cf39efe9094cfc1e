"""Write a model as an orbax checkpoint, which starts faster and restores straight onto any mesh."""

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

SUMMARY = "write a model as an orbax checkpoint"
USAGE = "MODEL OUT [FLAGS]"
EXAMPLES = """\
  jaxserve convert smollm2 ./smollm2-bf16 --dtype bfloat16
  jaxserve convert ./Llama-3.2-1B ./llama-1b --device cpu:4 --mesh 1x4
  jaxserve convert dummy:tiny-llama ./tiny       random weights, to try it
"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the model, where it is written, and what decides how it is loaded."""
    defaults = config_defaults(environment)
    parser.add_argument("model", metavar="MODEL", help=flags.field_docs(ServeConfig)["model"])
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to make")
    flags.add_fields(parser, "model", ServeConfig, ("load_format", "seed", "offline"), defaults)
    machine = flags.add_fields(parser, "machine", ServeConfig, ("mesh", "device", "dtype"))
    flags.add_tensor_alias(machine)
    flags.add_fields(parser, "places", ServeConfig, flags.PLACE_FLAGS, defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Converts; says what was written and how to serve it."""
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        report_environment(progress)
        ensure_asset(config, progress)
        # After what can be refused at once: this imports jax.
        from jaxserve.convert import convert

        done = convert(config, options.out, progress)
    print(
        f"wrote {done.path}: {done.file_bytes:,} bytes, {done.parameters / 1e6:,.1f}M parameters, "
        f"{done.dtype}, in {done.seconds:.1f} s"
    )
    print(f"  jaxserve launch {shlex.quote(str(done.path))} --dtype {done.dtype}")
    return 0
