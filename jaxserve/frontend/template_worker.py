"""The process in which a chat template runs: a file of its own that imports nothing of jaxserve.

    stdin   length (4 bytes, big-endian) | JSON    first {"template": ...}, then {"context": ...}
    stdout  the same framing                       {"text": ...} or {"error": ..., "message": ...}

A template is a program out of a checkpoint. Here it has a sandbox, a memory limit and an alarm that
the kernel delivers even inside a single endless C call (``9**9**9``), which no in-process limit can
stop. ``template.py`` starts this file, waits for it and starts it anew after an alarm.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
"""Address space of this process; Python and Jinja take about a tenth of it."""


class RefusedError(Exception):
    """The template called ``raise_exception``."""


class TooLargeError(Exception):
    """The output has passed its limit."""


class GenerationTag(Extension):
    """Accepts ``{% generation %}``, which marks answers for training; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replaces the tag by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Builds the environment that chat templates are written for, as ``transformers`` has it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    del environment.globals["lipsum"]
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON without Jinja's escaping for HTML, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def refuse(message: object) -> NoReturn:
    """Lets a template refuse messages that its model was not trained on."""
    raise RefusedError(str(message))


def strftime_now(form: str) -> str:
    """Gives the local date, which some templates put into their system line."""
    return datetime.datetime.now().strftime(form)


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Reads one message; None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", head)[0]))


def write_frame(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Writes one message."""
    raw = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(raw)) + raw)
    stream.flush()


def answer(work: Callable[[], str], timeout_s: float) -> dict[str, Any]:
    """Runs ``work`` under the alarm and says what came of it."""
    # No handler: the default action ends the process, whatever it is doing.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return {"text": work()}
    except RefusedError as error:
        return {"error": "refused", "message": str(error)}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": "unsafe", "message": str(error)}
    except TooLargeError:
        return {"error": "size", "message": ""}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"error": "resources", "message": type(error).__name__}
    # A template can raise anything that Python can; all of it is one failed render.
    except Exception as error:
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Compiles one template, then renders until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server; stdin's end is ours.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(requests)
    if first is None:
        return
    timeout_s, max_chars = first["timeout_s"], first["max_chars"]
    environment = make_environment()
    compiled: list[Any] = []

    def compile_template() -> str:
        compiled.append(environment.from_string(first["template"]))
        return ""

    write_frame(replies, answer(compile_template, timeout_s))
    while compiled and (request := read_frame(requests)) is not None:
        context = request["context"]

        def render(context: dict[str, Any] = context) -> str:
            pieces, chars = [], 0
            for piece in compiled[0].generate(**context):
                chars += len(piece)
                if chars > max_chars:
                    raise TooLargeError
                pieces.append(piece)
            return "".join(pieces)

        write_frame(replies, answer(render, timeout_s))


if __name__ == "__main__":
    main()
