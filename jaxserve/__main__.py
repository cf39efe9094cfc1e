"""Lets ``python -m jaxserve`` behave like the command."""

import sys

from jaxserve.cli import main

sys.exit(main())
