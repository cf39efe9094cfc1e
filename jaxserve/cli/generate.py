"""Continue a prompt, on a server or in this process, and print the text as it comes.

With --server the request goes there, and with JAXSERVE_SERVER when no flag names a model or a
machine; otherwise the model is loaded here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxserve.cli import flags
from jaxserve.cli.answering import (
    Answer,
    add_sampling_flags,
    read_answer,
    sampling_options,
    write_now,
)
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import ensure_asset
from jaxserve.config import ServeConfig
from jaxserve.errors import ConfigError
from jaxserve.progress import show_progress

SUMMARY = "continue a prompt, on a server or in this process"
USAGE = "PROMPT [FLAGS]"
EXAMPLES = """\
  jaxserve generate "The sky is" --max-tokens 16 --temperature 0
  jaxserve generate "The sky is" --server 127.0.0.1:50051 --json
  jaxserve generate --chat "Why is the sky blue?" --seed 7
  cat prompt.txt | jaxserve generate - --model ./checkpoint --mesh 1x2
"""
ONE_REQUEST = {"max_rows": 16, "prompt_logprobs": False}
"""Defaults for a single request: fewer programs to compile than a server needs. Of rows, 16 are as
fast as one (``launch.BF16_CPU_ROWS``). With nothing kept it answers when the first programs are
there, and ends when the one that is being compiled then is."""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the prompt, where it goes and how tokens are chosen."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text; - reads stdin")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a message to a chat model")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument(
        "--server",
        metavar="ADDRESS",
        help=f"server to ask (default: {environment.server or 'none, compute here'})",
    )
    parser.add_argument(
        "--timeout-s", type=float, metavar="SECONDS", help="with --server: deadline of the request"
    )
    add_sampling_flags(parser, max_tokens=256, temperature=1.0)
    flags.add_engine_flags(parser, _defaults(environment))


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Generates and prints."""
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt: dict[str, Any] = {"prompt": text}
    if options.chat:
        prompt = {"messages": [{"role": "user", "content": text}]}
    sampling = sampling_options(options)
    server = flags.server_for(options, environment.server, _defaults(environment))
    if server is None and options.timeout_s is not None:
        raise ConfigError("--timeout-s needs --server: nothing limits a request of this process")
    if server is not None:
        from jaxserve.frontend.client import Client

        with Client(server, timeout_s=options.timeout_s) as client:
            answer = _answer(partial(client.stream, **prompt, **sampling), quiet=options.json)
    else:
        with _load(options) as llm:
            answer = _answer(partial(llm.stream, **prompt, **sampling), quiet=options.json)
    if options.json:
        print(json.dumps(answer.to_json()), flush=True)
    return 0


def _defaults(environment: Environment) -> dict[str, Any]:
    return config_defaults(environment) | ONE_REQUEST


def _load(options: argparse.Namespace) -> Any:
    """Makes an LLM that compiles what one request needs."""
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        ensure_asset(config, progress)
    from jaxserve.llm import LLM

    return LLM(progress=True, **vars(config))


def _answer(open_stream: Callable[[], Any], *, quiet: bool) -> Answer:
    if quiet:
        return read_answer(open_stream, lambda text: None)
    try:
        return read_answer(open_stream, write_now)
    finally:
        print(flush=True)  # The prompt of the shell, or an error, on a line of its own.
