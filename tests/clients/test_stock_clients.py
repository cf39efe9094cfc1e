"""Clients that others wrote, as they are, against our servers: Triton's, buf's, and a gateway."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import BIN, BOUND_S, wait_for

pytestmark = pytest.mark.slow

MODEL = "dummy:tiny-llama"
PROMPT = "The sky is blue"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
BUF = Path(sys.executable).with_name("buf")


# -- tritonclient ----------------------------------------------------------------------------------


def test_tritons_client_finds_a_server_of_its_kind(ask, servers):
    server = servers[0]
    expected = server.llm.generate(PROMPT, **GREEDY, ignore_eos=True).text
    said = ask("ask_triton.py", server.address, MODEL, PROMPT)

    assert (said["live"], said["ready"], said["model_ready"]) == (True, True, [True, False])
    assert said["server"]["name"] == "jaxserve"
    assert said["metadata"]["inputs"][0] == {
        "name": "text_input", "datatype": "BYTES", "shape": ["1"],
    }  # fmt: skip
    assert said["config"]["input"][0]["data_type"] == "TYPE_STRING"
    assert said["config"]["model_transaction_policy"] == {"decoupled": True}
    assert said["infer"] == {"id": "one", "text": expected, "reason": "length"}
    assert said["with_tensors"] == PROMPT + expected
    assert "".join(said["stream"]["texts"]) == expected
    assert len(said["stream"]["texts"]) > 1
    assert said["stream"]["errors"] == ["max_tokens must be at least 1, got 0"]
    (range_code, range_text), (model_code, _), (index_code, _) = said["errors"]
    assert range_code == "StatusCode.INVALID_ARGUMENT"
    assert "top_p must be a finite number" in range_text
    assert model_code == "StatusCode.NOT_FOUND"
    assert index_code == "StatusCode.UNIMPLEMENTED"
    assert said["cancelled"][0] == "StatusCode.CANCELLED"
    server.wait_idle()
    assert server.cancelled() >= 1


# -- buf curl --------------------------------------------------------------------------------------


def curl(address: str, *arguments: str, reflection: str = "grpc-v1") -> str:
    if not BUF.exists():
        pytest.skip(f"{BUF} is missing; install the dev extra")
    command = [
        BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge",
        "--reflect-protocol", reflection, *arguments,
    ]  # fmt: skip
    where = f"http://{address}"
    command = [part.replace("@", where) if isinstance(part, str) else part for part in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("reflection", ["grpc-v1", "grpc-v1alpha"])
def test_buf_curl_lists_checks_and_streams_by_reflection(servers, reflection):
    server = servers[1]
    listed = curl(server.address, "--list-services", "@", reflection=reflection).split()
    health = curl(
        server.address, "-d", '{"service": "vllm.grpc.engine.VllmEngine"}',
        "@/grpc.health.v1.Health/Check", reflection=reflection,
    )  # fmt: skip
    asked = {
        "tokenized": {"inputIds": [5, 6, 7]},
        "samplingParams": {"temperature": 0, "maxTokens": 4, "ignoreEos": True},
        "stream": True,
    }
    streamed = curl(
        server.address, "-d", json.dumps(asked), "@/vllm.grpc.engine.VllmEngine/Generate",
        reflection=reflection,
    )  # fmt: skip
    ready = curl(
        server.address, "-d", json.dumps({"name": MODEL}),
        "@/inference.GRPCInferenceService/ModelReady", reflection=reflection,
    )  # fmt: skip

    assert {"vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService"} <= {*listed}
    assert {"jaxserve.v1.GenerationService", "grpc.health.v1.Health"} <= {*listed}
    assert json.loads(health) == {"status": "SERVING"}
    assert json.loads(ready) == {"ready": True}
    messages = list(read_all(streamed))
    expected = server.llm.generate([5, 6, 7], temperature=0.0, max_tokens=4, ignore_eos=True)
    chunks = [message["chunk"] for message in messages if "chunk" in message]
    tokens = [token for chunk in chunks for token in chunk["tokenIds"]]
    assert tuple(tokens) == expected.token_ids
    assert messages[-1]["complete"]["finishReason"] == "length"


def read_all(text: str) -> Iterator[Any]:
    decoder, place = json.JSONDecoder(), 0
    while place < len(text.rstrip()):
        value, place = decoder.raw_decode(text, place)
        yield value
        place += len(text[place:]) - len(text[place:].lstrip())


# -- smg, with OpenAI's client on top --------------------------------------------------------------


@pytest.fixture
def gateway(ask, servers, tmp_path) -> Iterator[str]:
    """Starts the gateway over both servers; returns its URL."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        port, metrics = one.getsockname()[1], other.getsockname()[1]
    command = [
        BIN / "smg", "launch", "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-port", str(metrics), "--policy", "cache_aware",
        "--worker-urls", *(f"grpc://{server.address}" for server in servers),
    ]  # fmt: skip
    log = tmp_path / "smg.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"

    def listed() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                return bool(json.load(answer)["data"])
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_for(listed)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_gateway_makes_openais_http_of_two_servers(ask, servers, gateway):
    llm = servers[0].llm
    before = sum(server.cancelled() for server in servers)
    # Both are asked what they have cached.
    for server in servers:
        wait_for(lambda server=server: server.llm._service.engine._news._feeds)
    said = ask("ask_openai.py", gateway, MODEL, PROMPT)

    chat = llm.chat(PROMPT, **GREEDY)
    assert said["models"] == [MODEL]
    assert said["chat"] == [chat.text, "length", chat.usage.prompt_tokens, 12]
    assert said["streamed"] == [chat.text, 12]
    assert said["completion"] == [llm.generate(PROMPT, **GREEDY).text, "length"]
    assert said["choices"] == [2, True]
    assert said["schema"] in ('"red"', '"blue"')
    assert said["refused"] == 400
    # The client that left in the middle has left nothing behind.
    for server in servers:
        server.wait_idle()
    assert sum(server.cancelled() for server in servers) == before + 1
