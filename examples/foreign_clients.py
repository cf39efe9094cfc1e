"""Other projects' clients at one server: `python examples/foreign_clients.py 127.0.0.1:50051`.

Start a server first (`make serve`) and install the clients (`make clients`). Triton's client asks
it directly; a gateway, smg, is put in front of it and OpenAI's client asks that. What each says is
printed. The scripts that the clients run are those of the tests, in tests/clients/.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from jaxserve import Client

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ROOT / ".clients" / "bin"
PROMPT = "The sky is blue because"


def show(title: str, *command: str | Path) -> None:
    print(f"\n== {title}", flush=True)
    subprocess.run(command, check=True)


def main(address: str) -> None:
    if not CLIENTS.exists():
        sys.exit("no stock clients in .clients/; install them with `make clients`")
    with Client(address) as client:
        model = client.model().name
    scripts, python = ROOT / "tests" / "clients", CLIENTS / "python"
    show("tritonclient", python, scripts / "ask_triton.py", address, model, PROMPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    gateway = subprocess.Popen(
        [CLIENTS / "smg", "launch", "--host", "127.0.0.1", "--port", port, "--log-level", "error",
         "--worker-urls", f"grpc://{address}"],
        start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        while not answers(f"{url}/v1/models") and gateway.poll() is None:
            time.sleep(0.1)
        show("openai, through smg", python, scripts / "ask_openai.py", url, model, PROMPT)
    finally:
        os.killpg(gateway.pid, signal.SIGTERM)
        gateway.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return b'"id"' in answer.read()
    except OSError:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
