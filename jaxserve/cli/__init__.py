"""The command line: one file per command; this one chooses among them and turns errors into exits.

    0  done; for ``launch``, after SIGTERM or Ctrl-C
    1  something failed: the engine, a request, no server there
    2  a flag, a file or a prompt has to change
  130  interrupted

Nothing here imports jax; the commands that compute do so when they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jaxserve.cli.environment import Environment
from jaxserve.cli.parser import build_parser, parse
from jaxserve.cli.words import discard, say
from jaxserve.errors import InvalidRequestError, JaxserveError, LaunchError, ModelNotFoundError

USAGE_ERRORS = (LaunchError, InvalidRequestError, ModelNotFoundError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    environment = Environment.read(os.environ)
    options = parse(build_parser(environment), sys.argv[1:] if argv is None else argv)
    try:
        return options.run(options, environment)
    except JaxserveError as error:
        if options.debug:
            raise
        say(f"error: {error}")
        return 2 if isinstance(error, USAGE_ERRORS) else 1
    except BrokenPipeError:
        # The reader of a pipe has left, as `head` does. Nothing may be written at exit either.
        discard(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return 130
