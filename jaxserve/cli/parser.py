"""The argument parser: what all commands share, and errors that say what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from jaxserve import __version__
from jaxserve.cli import (
    chat,
    compile,
    convert,
    demo,
    eval,
    generate,
    launch,
    plan,
    quantize,
    stats,
    tokenize,
    version,
)
from jaxserve.cli import environment as env
from jaxserve.cli.environment import Environment

COMMANDS = (
    *(launch, chat, generate, plan, eval, compile, convert, quantize),
    *(stats, tokenize, demo, version),
)

EPILOG = f"""\
examples:
  jaxserve launch smollm2                       serve the default model on 127.0.0.1:50051
  jaxserve chat                                 talk to it
  jaxserve generate "The sky is" --max-tokens 16
  jaxserve COMMAND --help                       every flag, with examples

{env.HELP}"""


class Parser(argparse.ArgumentParser):
    """Errors are one line and a hint; the whole usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        print(f"error: {message}\nTry '{self.prog} --help'.", file=sys.stderr)
        sys.exit(2)


def build_parser(environment: Environment) -> Parser:
    """Makes the parser of the whole command line."""
    parser = Parser(
        prog="jaxserve",
        description="Serves language models from JAX over gRPC.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=Parser, required=True
    )
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        sub = commands.add_parser(
            name,
            usage=f"%(prog)s {command.USAGE}",
            help=command.SUMMARY,
            description=command.__doc__,
            epilog=f"examples:\n{command.EXAMPLES}\n{env.HELP}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_flags(sub, environment)
        sub.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        sub.set_defaults(run=command.run, parser=sub)
    return parser


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses, or exits with 2 and a suggestion."""
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    if not argv:
        parser.print_help()
        sys.exit(2)
    if not argv[0].startswith("-") and argv[0] not in names:
        parser.error(f"there is no command {argv[0]!r}{suggestion(argv[0], names)}")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        sub: Parser = options.parser
        first = unknown[0].partition("=")[0]
        if first.startswith("-"):
            flags = sub._option_string_actions
            sub.error(f"unknown flag {first}{suggestion(first, flags)}")
        sub.error(f"unexpected argument {first!r}; quote arguments that contain spaces")
    return options


def suggestion(given: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean X?``, or nothing when nothing is close."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
