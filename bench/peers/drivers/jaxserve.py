"""jaxserve as its users run it: ``jaxserve launch`` in a process, asked over gRPC."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from bench.peers.drivers import server
from bench.peers.protocol import Question, Reply
from jaxserve.frontend.client import AsyncClient, Client, RetryPolicy

READY = "ready "


class Jaxserve:
    """A server of this child, with further flags of the command."""

    def __init__(self, flags: Sequence[str]) -> None:
        # Nothing is compiled beside what is measured.
        flags = ("--ready-with", "all", *flags)
        command = [sys.executable, "-m", "jaxserve", "launch", "--port", "0", *flags]
        self._process = server.start(command, stdout=subprocess.PIPE)
        self.process_id = self._process.pid
        self._address = self._wait_for_address()
        with Client(self._address) as client:
            info = client.model()
        self.version = f"{info.server_version} ({info.precision})"

    def _wait_for_address(self) -> str:
        """Reads up to the line that scripts wait for; the parent bounds how long."""
        lines = self._process.stdout
        assert lines is not None
        for line in lines:
            if line.startswith(READY):
                # Somebody has to read on, or the server would wait for room in the pipe.
                threading.Thread(target=lambda: [*lines], daemon=True).start()
                return dict(word.split("=", 1) for word in line.split()[1:])["address"]
        raise RuntimeError(f"jaxserve ended with exit code {self._process.wait()}")

    def ask(self, questions: Sequence[Question], clients: int | None) -> list[Reply]:
        """As ``Driver.ask``."""
        return server.run(self._ask_all(questions, clients))

    async def _ask_all(self, questions: Sequence[Question], clients: int | None) -> list[Reply]:
        # A failure is a finding: it ends the run instead of being tried again.
        async with AsyncClient(self._address, retry=RetryPolicy(attempts=1)) as client:

            async def ask(question: Question, reply: Reply) -> None:
                stream = client.stream(
                    token_ids=question.prompt,
                    max_tokens=question.output_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                )
                async with stream:
                    async for chunk in stream:
                        reply.note(list(chunk.token_ids), time.perf_counter())

            return await server.ask_all(questions, clients, ask)

    def close(self) -> None:
        """Ends the server."""
        server.stop(self._process)


make = Jaxserve
