"""Talk to a model on a server. Keeps the conversation; Ctrl-C stops an answer, Ctrl-D ends.

When stdin is not a terminal, every line of it is one message and only the answers are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jaxserve.cli.answering import add_sampling_flags, read_answer, sampling_options, write_now
from jaxserve.cli.environment import Environment
from jaxserve.errors import JaxserveError, RetryableError
from jaxserve.frontend.client_types import Chunk, GenerateOptions

if TYPE_CHECKING:
    from jaxserve.frontend.client import Client, Stream

SUMMARY = "talk to a model on a server"
USAGE = "[FLAGS]"
EXAMPLES = """\
  jaxserve chat
  jaxserve chat --server 10.0.0.7:50051 --system "Answer in one sentence." --temperature 0
  printf 'Hello\\nAnd in French?\\n' | jaxserve chat --timing
"""
COMMANDS = """\
/reset            forget the conversation
/system TEXT      set the system message, and forget the conversation; without TEXT, remove it
/params [K=V ...] show or set sampling parameters, such as temperature=0.2 max_tokens=100
/help             this
/quit             end (so does Ctrl-D)"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the server, the system message and how tokens are chosen."""
    parser.add_argument(
        "--server",
        default=environment.default_server,
        metavar="ADDRESS",
        help="server to talk to (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--timing", action="store_true", help="print tokens, time and rate of answers to stderr"
    )
    add_sampling_flags(parser, max_tokens=512, temperature=0.7, top_p=0.95)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Talks until the input ends."""
    from jaxserve.frontend.client import Client

    check_server(options.server)
    with Client(options.server) as client:
        chat = Chat(client, sampling_options(options), options.system, timing=options.timing)
        if sys.stdin.isatty():
            return _talk(chat, client)
        for line in sys.stdin:
            if not chat.take(line.strip()):
                break
        return 0


def check_server(address: str) -> None:
    """Asks a server for its model, once.

    Raises:
        JaxserveError: none answers; the message says how to start one.
    """
    from jaxserve.frontend.client import Client, RetryPolicy

    with Client(address, timeout_s=10.0, retry=RetryPolicy(attempts=1)) as client:
        try:
            client.model()
        except RetryableError as error:
            if error.reason != "UNAVAILABLE":
                raise
            raise JaxserveError(
                f"no server answers at {address}; start one with `jaxserve launch smollm2`, or "
                "name another with --server"
            ) from None


class Chat:
    """One conversation."""

    def __init__(
        self,
        client: Client,
        parameters: GenerateOptions,
        system: str | None,
        *,
        timing: bool,
        write: Callable[[str], object] = write_now,
    ) -> None:
        """Starts with nothing said but the system message."""
        self._client = client
        self._parameters = parameters
        self._system = system
        self._timing = timing
        self._write = write
        self.messages: list[dict[str, str]] = []
        self._reset()

    def take(self, line: str) -> bool:
        """Handles one line of input; returns False when it ends the chat.

        Raises:
            JaxserveError: the message was refused or its answer broke; it is forgotten.
        """
        if not line:
            return True
        if line.startswith("/"):
            return self._command(line)
        self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        stream: Stream | None = None

        def open_stream() -> Iterator[Chunk]:
            nonlocal stream
            stream = self._client.stream(messages=self.messages, **self._parameters)
            return stream

        def write(text: str) -> None:
            said.append(text)
            self._write(text)

        try:
            answer = read_answer(open_stream, write)
        except KeyboardInterrupt:
            self._write(" [stopped]")
        except JaxserveError:
            self.messages.pop()
            raise
        else:
            if self._timing:
                print(f"[{answer.timing()}]", file=sys.stderr)
        finally:
            if stream is not None:
                stream.close()
        self._write("\n")
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        match name:
            case "/quit" | "/exit":
                return False
            case "/reset":
                self._reset()
                self._say("the conversation is forgotten")
            case "/system":
                self._system = rest.strip() or None
                self._reset()
                self._say(f"system message: {self._system or 'none'}")
            case "/params":
                self._set_parameters(rest.split())
            case "/help":
                self._say(COMMANDS)
            case _:
                self._say(f"there is no command {name}\n{COMMANDS}")
        return True

    def _set_parameters(self, pairs: list[str]) -> None:
        changed: dict[str, Any] = dict(self._parameters)
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name not in NUMBERS:
                self._say(f"there is no parameter {name!r}; there are {', '.join(NUMBERS)}")
                return
            try:
                changed[name] = NUMBERS[name](value)
            except ValueError:
                self._say(f"{name} needs a number, such as {name}=1; got {value!r}")
                return
        self._parameters = GenerateOptions(**changed)
        shown = " ".join(f"{name}={value}" for name, value in changed.items())
        self._say(shown)

    def _reset(self) -> None:
        system = self._system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


NUMBERS: dict[str, Callable[[str], int | float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
}


def _talk(chat: Chat, client: Client) -> int:
    """Reads messages from a person at a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    print(f"{client.model().name} at {client.address}; /help lists commands", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends", file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return 0
        try:
            if not chat.take(line.strip()):
                return 0
        except JaxserveError as error:
            print(f"error: {error}", file=sys.stderr)
