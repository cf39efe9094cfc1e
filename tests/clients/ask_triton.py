"""Triton's own client against one server, in the clients' environment; prints JSON for the test."""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # pyright: ignore[reportMissingImports]
from tritonclient.utils import (  # pyright: ignore[reportMissingImports]
    InferenceServerException,
)

BOUND_S = 60.0


def text_input(text: str) -> Any:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def tensor(name: str, datatype: str, value: Any) -> Any:
    made = triton.InferInput(name, [1], datatype)
    made.set_data_from_numpy(np.array([value], dtype=triton_dtype(datatype)))
    return made


def triton_dtype(datatype: str) -> Any:
    return {"INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}[datatype]


def error_of(call: Any) -> list[str | None]:
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return [None, "no error"]


def ask(address: str, model: str, prompt: str) -> dict[str, Any]:
    said: dict[str, Any] = {}
    client = triton.InferenceServerClient(address)
    said["live"] = client.is_server_live()
    said["ready"] = client.is_server_ready()
    said["model_ready"] = [client.is_model_ready(model), client.is_model_ready("other")]
    said["server"] = client.get_server_metadata(as_json=True)
    said["metadata"] = client.get_model_metadata(model, as_json=True)
    said["config"] = client.get_model_config(model, as_json=True)["config"]
    options = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    result = client.infer(
        model,
        [text_input(prompt)],
        request_id="one",
        parameters={**options, "exclude_input_in_output": True},
        outputs=[triton.InferRequestedOutput(name) for name in ("text_output", "finish_reason")],
        client_timeout=BOUND_S,
    )
    said["infer"] = {
        "id": result.get_response().id,
        "text": result.as_numpy("text_output").tolist()[0].decode(),
        "reason": result.as_numpy("finish_reason").tolist()[0].decode(),
    }
    whole = client.infer(
        model,
        [
            text_input(prompt),
            tensor("max_tokens", "INT32", 12),
            tensor("temperature", "FP32", 0.0),
            tensor("ignore_eos", "BOOL", True),
        ],
    )
    said["with_tensors"] = whole.as_numpy("text_output").tolist()[0].decode()
    said["errors"] = [
        error_of(lambda: client.infer(model, [text_input(prompt)], parameters={"top_p": 2.0})),
        error_of(lambda: client.infer("other", [text_input(prompt)])),
        error_of(client.get_model_repository_index),
    ]
    said["stream"] = stream(client, model, prompt, options)
    said["cancelled"] = cancel(client, model, prompt)
    client.close()
    return said


def stream(client: Any, model: str, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two requests on one stream, one of them refused."""
    heard: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: heard.put((result, error)))
    wanted = {**options, "stream": True}
    client.async_stream_infer(model, [text_input(prompt)], request_id="a", parameters=wanted)
    client.async_stream_infer(
        model,
        [text_input(prompt)],
        request_id="b",
        parameters={"sampling_parameters": json.dumps({"max_tokens": "0"}), "stream": True},
    )
    texts, errors, final = [], [], False
    while not (final and errors):
        result, error = heard.get(timeout=BOUND_S)
        if error is not None:
            errors.append(error.message())
            continue
        response = result.get_response()
        assert response.id == "a"
        texts.append(result.as_numpy("text_output").tolist()[0].decode())
        final = response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    return {"texts": texts, "errors": errors}


def cancel(client: Any, model: str, prompt: str) -> list[str | None]:
    """A request and a stream that are given up in the middle."""
    heard: queue.Queue[Any] = queue.Queue()
    endless = {"max_tokens": 200, "temperature": 1.0, "ignore_eos": True}
    call = client.async_infer(
        model,
        [text_input(prompt)],
        lambda result, error: heard.put((result, error)),
        parameters=endless,
    )
    call.cancel()
    _, error = heard.get(timeout=BOUND_S)
    client.start_stream(lambda result, error: heard.put((result, error)))
    client.async_stream_infer(model, [text_input(prompt)], parameters={**endless, "stream": True})
    heard.get(timeout=BOUND_S)
    client.stop_stream(cancel_requests=True)
    return [error.status(), error.message()]


if __name__ == "__main__":
    print(json.dumps(ask(*sys.argv[1:])))
