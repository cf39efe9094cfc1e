"""Show the tokens of a text, as a server or a model here would read it.

Without --server only the model's tokenizer is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import DUMMY, ensure_asset
from jaxserve.config import ServeConfig
from jaxserve.progress import show_progress

if TYPE_CHECKING:
    from jaxserve.frontend.tokenizer import Tokenizer

SUMMARY = "show the tokens of a text"
USAGE = "TEXT [FLAGS]"
EXAMPLES = """\
  jaxserve tokenize "Hello, world!"
  jaxserve tokenize --server 127.0.0.1:50051 --json "Hello, world!"
  cat prompt.txt | jaxserve tokenize - --model ./checkpoint
"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the text and whose tokenizer reads it."""
    parser.add_argument("text", metavar="TEXT", help="- reads stdin")
    parser.add_argument("--json", action="store_true", help="JSON: token_ids, token_texts")
    parser.add_argument(
        "--no-special-tokens",
        action="store_true",
        help="leave out the tokens that the model starts with",
    )
    parser.add_argument(
        "--server",
        metavar="ADDRESS",
        help=f"server to ask (default: {environment.server or 'none, load the tokenizer here'})",
    )
    flags.add_model_flags(parser, config_defaults(environment))


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Prints the tokens."""
    text = sys.stdin.read() if options.text == "-" else options.text
    special = not options.no_special_tokens
    server = flags.server_for(options, environment.server, config_defaults(environment))
    if server is not None:
        from jaxserve.frontend.client import Client

        with Client(server, timeout_s=30.0) as client:
            tokens = client.tokens_of(text, add_special_tokens=special)
        ids, texts = [token for token, _ in tokens], [piece for _, piece in tokens]
    else:
        tokenizer = load_tokenizer_only(options)
        ids = tokenizer.encode(text, add_special_tokens=special)
        texts = [tokenizer.token_text(token) for token in ids]
    if options.json:
        print(json.dumps({"token_ids": ids, "token_texts": texts}))
        return 0
    for token, piece in zip(ids, texts, strict=True):
        print(f"{token:8} {piece!r}")
    print(f"{len(ids)} tokens", file=sys.stderr)
    return 0


def load_tokenizer_only(options: argparse.Namespace) -> Tokenizer:
    """Loads the tokenizer of a model, and nothing else of it.

    Raises:
        LaunchError: there is no such model, or it has no usable tokenizer.
    """
    from jaxserve.frontend.byte_tokenizer import byte_tokenizer
    from jaxserve.frontend.tokenizer import load_tokenizer
    from jaxserve.models.presets import preset
    from jaxserve.weights.checkpoint import open_checkpoint
    from jaxserve.weights.hub import resolve_model

    config = ServeConfig(**flags.field_values(options, ServeConfig))
    if config.model.startswith(DUMMY):
        preset(config.model.removeprefix(DUMMY))  # A name that does not exist has no tokenizer.
        return byte_tokenizer()
    with show_progress() as progress:
        ensure_asset(config, progress)
    path = resolve_model(config.model, assets_dir=config.assets_dir, offline=config.offline)
    checkpoint: Any = open_checkpoint(path)
    try:
        return load_tokenizer(checkpoint.tokenizer_files())
    finally:
        checkpoint.close()
