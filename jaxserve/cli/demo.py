"""Start a server, stream one chat answer through the real client, print its timing, stop."""

from __future__ import annotations

import argparse
from functools import partial

from jaxserve.cli import flags
from jaxserve.cli.answering import add_sampling_flags, read_answer, sampling_options, write_now
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults, ready_line
from jaxserve.cli.models import ensure_asset, report_environment
from jaxserve.config import ServeConfig
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.http.config import Doors
from jaxserve.progress import show_progress

SUMMARY = "start a server, stream one answer, print its timing, stop"
USAGE = "[QUESTION] [FLAGS]"
EXAMPLES = """\
  jaxserve demo
  jaxserve demo "Tell me a joke." --max-tokens 64 --model dummy:smollm2-135m
"""
QUESTION = "What is the capital of France, and what is it known for?"


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the question and the model."""
    parser.add_argument(
        "question", nargs="?", default=QUESTION, metavar="QUESTION", help="(default: %(default)s)"
    )
    add_sampling_flags(parser, max_tokens=128, temperature=0.0)
    # The timing that it prints is to be that of a server with all its programs.
    flags.add_engine_flags(parser, config_defaults(environment) | {"ready_with": "all"})


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Runs the demonstration."""
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        report_environment(progress)
        ensure_asset(config, progress)
        from jaxserve.frontend.client import Client
        from jaxserve.frontend.grpc.server import ServerThread
        from jaxserve.launch import build

        service = build(config, progress)
    server = ServerThread(service.text, service.info, ServerConfig(port=0))
    messages = [{"role": "user", "content": options.question}]
    with service, server as address, Client(address) as client:
        print(ready_line(service, Doors(address)))
        print(f"> {options.question}")
        stream = partial(client.stream, messages=messages, **sampling_options(options))
        answer = read_answer(stream, write_now)
        print(f"\n[{answer.timing()}]")
    return 0
