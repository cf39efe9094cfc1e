"""Measure what quantized weights and caches cost on your text: perplexity and next-token KL.

Every setting is launched in turn and scores the same windows of text through the engine of service.
The first setting is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.eval_table import print_table
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import ensure_asset
from jaxserve.config import ServeConfig
from jaxserve.errors import ConfigError
from jaxserve.evaluation.settings import known_names, parse_settings, usual_settings
from jaxserve.evaluation.texts import read_texts
from jaxserve.progress import show_progress

SUMMARY = "measure what settings cost on real text"
USAGE = "MODEL --text FILE [FILE ...] [FLAGS]"
EXAMPLES = """\
  jaxserve eval smollm2 --text book.txt
  jaxserve eval smollm2 --text *.txt --settings float32,bf16,kv-int8,w4a16 --plot cost.svg
  jaxserve eval ./checkpoint --text book.txt \\
      --settings unquantized,small=kv-dtype:int8+page-tokens:16,theirs=model:./other.gguf
"""
MACHINE_FLAGS = [name for name in flags.MACHINE_FLAGS if name not in ("quantization", "kv_dtype")]
"""Of launch; the others are what settings are made of."""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the model, the texts, the settings, and where results go."""
    defaults = config_defaults(environment)
    parser.add_argument("model", metavar="MODEL", help=flags.field_docs(ServeConfig)["model"])
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        metavar="FILE",
        help="UTF-8; each is cut into windows by itself",
    )
    parser.add_argument(
        "--settings",
        default=usual_settings(),
        metavar="NAME,...",
        help=f"of {', '.join(known_names())}, or NAME=FLAG:VALUE+FLAG:VALUE; the first is what "
        "others are compared with (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens that are scored together (default: 1024, or what the model's context holds)",
    )
    parser.add_argument(
        "--max-windows", type=int, metavar="N", help="of each text (default: as many as there are)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write a picture")
    flags.add_fields(parser, "model", ServeConfig, ("load_format", "seed", "offline"), defaults)
    machine = flags.add_fields(parser, "machine", ServeConfig, MACHINE_FLAGS)
    flags.add_tensor_alias(machine)
    flags.add_fields(parser, "steps", ServeConfig, ("step_tokens", "page_tokens"))
    flags.add_fields(parser, "places", ServeConfig, flags.PLACE_FLAGS, defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Measures, prints the table, and writes what was asked for."""
    # What can be refused at once is, before anything is loaded.
    settings = parse_settings(options.settings)
    if options.max_windows is not None and options.max_windows < 1:
        raise ConfigError(f"--max-windows is {options.max_windows}; give 1 or more")
    _check_files(options.json, options.plot)
    texts = read_texts(options.text)
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        ensure_asset(config, progress)
        # After what can be refused: this imports jax.
        from jaxserve.evaluation.measure import evaluate

        evaluation = evaluate(
            config,
            settings,
            texts,
            window=options.window,
            most_windows=options.max_windows,
            report=progress,
        )
    from jaxserve.evaluation.plot import svg

    print_table(evaluation)
    if options.json is not None:
        options.json.write_text(json.dumps(evaluation.as_json(), indent=2) + "\n")
    if options.plot is not None:
        options.plot.write_text(svg(evaluation))
    return 0


def _check_files(json_file: Path | None, plot: Path | None) -> None:
    """An hour of measuring should not end with a file that cannot be written."""
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"--plot {plot} does not end with .svg; the picture is an SVG")
    for flag, path in (("--json", json_file), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{flag} {path} cannot be written; name a file in a directory")
