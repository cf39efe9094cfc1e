"""Chat messages to prompt text, through the model's own Jinja template.

The template comes out of a checkpoint and may loop, grow or attack, so it runs in a sandbox inside
a worker process (``template_worker.py``) that is started once per model and reused. It is started
as a fresh program, not forked, because forking a process that holds JAX's threads is not safe. A
render costs one message each way over a pipe, well under a millisecond for a short chat.

Special-token text inside a message ("<|im_end|>" typed by a user) is not escaped: the rendered
prompt is one string, and the tokenizer reads it as the special token, as other engines do. Callers
that must not trust their users filter messages before sending them.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.errors import InvalidRequestError, TokenizerError

RENDER_TIMEOUT_S = 2.0
"""Templates take about a millisecond; what takes this long does not end."""
START_TIMEOUT_S = 30.0
"""For Python and Jinja to load on a busy machine."""
MAX_RENDERED_CHARS = 8_000_000
"""Far above any context window's worth of text."""

WORKER = Path(__file__).with_name("template_worker.py")
FIELD = "chat"


class ChatTemplate:
    """A model's chat template, compiled in a worker process. Safe to call from many threads."""

    def __init__(
        self,
        template: str,
        *,
        source: str,
        special_texts: Mapping[str, str] | None = None,
        timeout_s: float = RENDER_TIMEOUT_S,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> None:
        """Starts the worker and compiles the template there.

        Args:
            template: Jinja source.
            source: where it came from, for messages.
            special_texts: ``bos_token`` and such, visible to the template.
            timeout_s: wall time of one render.
            max_chars: size of one rendered prompt.

        Raises:
            TokenizerError: the template does not compile, or the worker does not start.
        """
        self.source = source
        self.text = template
        """Jinja source."""
        self._special_texts = dict(special_texts or {})
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._closed = False
        with self._lock:
            self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders messages to the text that the model was trained on.

        Blocks for the time of one render; call it from a worker thread when that matters.

        Args:
            messages: each with ``role`` and ``content``, and what else the template knows.
            add_generation_prompt: end with the opening of the assistant's answer.
            tools: JSON schemas of functions, for templates that know them.
            variables: more names for the template, such as ``enable_thinking``.

        Raises:
            InvalidRequestError: the template refuses or cannot render these messages, or passes a
                limit with them.
        """
        context = {
            **self._special_texts,
            **(variables or {}),
            "messages": [dict(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = _frame({"context": context})
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"the messages cannot be written as JSON ({error}); send plain text and numbers",
                field=FIELD,
            ) from None
        with self._lock:
            reply = self._exchange(request)
        if "text" in reply:
            return reply["text"]
        raise InvalidRequestError(self._explain(reply), field=FIELD)

    def close(self) -> None:
        """Ends the worker process; ``render`` is an error afterwards."""
        with self._lock:
            self._closed = True
            self._stop()

    def __enter__(self) -> ChatTemplate:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def _exchange(self, request: bytes) -> dict[str, Any]:
        if self._closed:
            raise RuntimeError("this ChatTemplate is closed")
        if self._worker is not None and self._worker.poll() is not None:
            self._stop()  # It died between two renders; that is nobody's request's fault.
        if self._worker is None:
            self._start()
        # The worker's own alarm comes first; twice its time means that it cannot even die.
        reply = self._talk(request, 2 * self._timeout_s + 1)
        if reply is None:
            self._stop()
            return {"error": "time", "message": ""}
        return reply

    def _explain(self, reply: Mapping[str, Any]) -> str:
        message = reply["message"]
        match reply["error"]:
            case "refused":
                return f"the model's chat template refuses these messages: {message}"
            case "time":
                return (
                    f"the model's chat template took longer than {self._timeout_s:g} s with these "
                    "messages, or its process died; send fewer or shorter messages, or a text "
                    "prompt"
                )
            case "size":
                return (
                    "the model's chat template wrote more than "
                    f"{self._max_chars} characters for these messages; send fewer or shorter ones"
                )
            case "resources":
                return (
                    f"the model's chat template ran out of resources ({message}) with these "
                    "messages; send fewer or shorter ones, or a text prompt"
                )
            case "unsafe":
                return (
                    f"the model's chat template tried something that its sandbox forbids "
                    f"({message}); send a text prompt"
                )
        return (
            f"the model's chat template cannot render these messages ({message}); check roles and "
            "contents, or send a text prompt"
        )

    def _start(self) -> None:
        # -P keeps this directory, whose files are named like packages, out of the worker's imports.
        try:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as error:
            raise TokenizerError(
                f"the process for the chat template of {self.source} cannot be started "
                f"({error.strerror}); check the limits on processes and memory"
            ) from error
        first = {
            "template": self.text,
            "timeout_s": self._timeout_s,
            "max_chars": self._max_chars,
        }
        reply = self._talk(_frame(first), START_TIMEOUT_S + 2 * self._timeout_s)
        if reply is None or "error" in reply:
            self._stop()
            what = "it took too long" if reply is None else reply["message"] or reply["error"]
            raise TokenizerError(
                f"the chat template of {self.source} does not compile ({what}); correct it, or "
                "serve the model without one and send text prompts"
            )

    def _talk(self, request: bytes, timeout_s: float) -> dict[str, Any] | None:
        """Sends one frame and reads one; None when the worker dies or the time is over."""
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        assert worker.stdout is not None
        deadline = time.monotonic() + timeout_s
        try:
            _write(worker.stdin.fileno(), request, deadline)
            head = _read(worker.stdout.fileno(), 4, deadline)
            return json.loads(_read(worker.stdout.fileno(), struct.unpack(">I", head)[0], deadline))
        except (OSError, EOFError):
            return None

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                stream.close()

    def __del__(self) -> None:
        """Reaps the worker, which would also end by itself when its stdin closes."""
        self._stop()


def _frame(message: Mapping[str, Any]) -> bytes:
    raw = json.dumps(message).encode()
    return struct.pack(">I", len(raw)) + raw


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _write(descriptor: int, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        _wait(descriptor, select.POLLOUT, deadline)
        # A pipe that is writable takes at least PIPE_BUF bytes without blocking.
        view = view[os.write(descriptor, view[: select.PIPE_BUF]) :]


def _read(descriptor: int, count: int, deadline: float) -> bytes:
    pieces = bytearray()
    while len(pieces) < count:
        _wait(descriptor, select.POLLIN, deadline)
        piece = os.read(descriptor, count - len(pieces))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)
