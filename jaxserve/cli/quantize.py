"""Round a model's weights to few bits, with scales searched on text, as an orbax checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import ensure_asset, report_environment
from jaxserve.config import ServeConfig
from jaxserve.errors import ConfigError
from jaxserve.progress import show_progress

if TYPE_CHECKING:
    from jaxserve.quantize import Rounded

SUMMARY = "round a model's weights to few bits"
USAGE = "MODEL OUT [FLAGS]"
EXAMPLES = """\
  jaxserve quantize smollm2 ./smollm2-int4 --group 64 --calibration book.txt
  jaxserve quantize ./Llama-3.2-1B ./llama-1b-fp8 --format fp8
  jaxserve launch ./smollm2-int4                 serves what was written
"""
FORMATS = ("int4", "int8", "fp8")


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the model, where it is written, and how it is rounded."""
    defaults = config_defaults(environment)
    parser.add_argument("model", metavar="MODEL", help=flags.field_docs(ServeConfig)["model"])
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to make")
    group = parser.add_argument_group("rounding")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="int4",
        help="of the layers' matrices; embedding and head become int8 (default: int4)",
    )
    group.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="weights that share a scale, a multiple of 32; where a matrix has no whole groups, "
        "they are smaller (default: 32, and for fp8 a whole row)",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text on which a scale for each input channel is searched, so that the outputs err "
        "least; if not given, weights are rounded as they are",
    )
    group.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="of the text at most (default: 4096)",
    )
    flags.add_fields(parser, "model", ServeConfig, ("load_format", "seed", "offline"), defaults)
    flags.add_fields(parser, "machine", ServeConfig, ("device",))
    flags.add_fields(parser, "places", ServeConfig, flags.PLACE_FLAGS, defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Quantizes; says what each layer lost, what was written and how to serve it."""
    if options.calibration is None and options.calibration_tokens is not None:
        raise ConfigError(
            "--calibration-tokens is given and --calibration is not; give the text, or neither"
        )
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        report_environment(progress)
        ensure_asset(config, progress)
        # After what can be refused at once: this imports jax.
        from jaxserve.quantize import Calibration, quantize

        calibration = None
        if options.calibration is not None:
            tokens = options.calibration_tokens
            more = {} if tokens is None else {"tokens": tokens}
            calibration = Calibration(path=options.calibration, **more)
        done = quantize(
            *(config, options.out, options.format),
            group=options.group,
            calibration=calibration,
            report=progress,
        )
    print("\n".join(describe(done)))
    print(f"  jaxserve launch {shlex.quote(str(done.path))}")
    return 0


def describe(done: Rounded) -> list[str]:
    """Returns a line for each layer, and what was written."""
    lines = list[str]()
    if done.layers:
        lines.append(
            f"error of each output, rounded as it is -> with scales of mean|x|^a, on "
            f"{done.calibration_tokens} tokens:"
        )
    for number, (found, seconds) in enumerate(zip(done.layers, done.layer_seconds, strict=False)):
        parts = (
            f"{one.weight} {one.plain_error:.4f} -> {one.error:.4f} (a={one.exponent:.1f})"
            for one in found
        )
        lines.append(f"  layer {number}: {', '.join(parts)}, {seconds:.1f} s")
    formats = "+".join(sorted(set(done.formats.values())))
    lines.append(
        f"wrote {done.path}: {done.file_bytes:,} bytes, {done.parameters / 1e6:,.1f}M parameters, "
        f"{formats}, in {done.seconds:.1f} s"
    )
    return lines
