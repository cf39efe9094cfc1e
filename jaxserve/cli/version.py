"""Print the versions of jaxserve and of what it runs on."""

from __future__ import annotations

import argparse
import json

from jaxserve import __version__
from jaxserve.cli.environment import Environment
from jaxserve.cli.models import package_versions

SUMMARY = "print versions"
USAGE = "[FLAGS]"
EXAMPLES = """\
  jaxserve version
  jaxserve version --json
"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the output format."""
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Prints."""
    versions = {"jaxserve": __version__, **package_versions()}
    if options.json:
        print(json.dumps(versions))
    else:
        for name, number in versions.items():
            print(f"{name:14} {number}")
    return 0
