"""Between ``inference.ModelInferRequest`` and the front end's own types.

Behaves as Triton's vLLM backend does where the protocol is silent: without ``stream`` the answer
begins with the prompt unless that is excluded, with it there is one tensor of all choices in every
response. Ranges are ``Request.validate``'s business; names and types are in ``kserve_options.py``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from jaxserve.engine.request import SamplingParams
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.door import sound
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.grammar import take_grammar
from jaxserve.frontend.grpc.kserve_options import HARMLESS, read_options
from jaxserve.frontend.grpc.kserve_tensors import add_output, read_inputs
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.text_stream import Delta, Finished, Output, Started
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.third_party.triton import grpc_service_pb2 as pb

VERSION = "1"
"""Of every model: what is served is told by its digest."""
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""The first is sent always, the others when ``return_`` and their name is true."""
FINAL = "triton_final_response"


@dataclass(frozen=True, kw_only=True)
class Inference:
    """One ModelInferRequest, read."""

    id: str
    """The client's; need not be unique, and is given back."""
    call: GenerationCall
    stream: bool
    outputs: tuple[str, ...]


def read_inference(
    request: pb.ModelInferRequest, request_id: str, deadline_s: float | None
) -> Inference:
    """Reads a request.

    Args:
        request: as received.
        request_id: for the engine, where ids are unique.
        deadline_s: of the RPC, on the ``time.monotonic`` clock.

    Raises:
        InvalidRequestError: something is missing, not known, or cannot be done.
    """
    tensors = read_inputs(request)
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param")
        for name, value in request.parameters.items()
    }
    deadline_s = _take_triton_parameters(parameters, deadline_s)
    options = read_options({"an input": tensors, "a parameter": parameters})
    if "text_input" not in options:
        raise InvalidRequestError(
            "text_input is missing; send the prompt as an input of type BYTES and shape [1]",
            field="text_input",
        )
    if options.pop("beam_width", 1) != 1:
        raise InvalidRequestError(
            "beam_width is not 1, and there is no beam search here; leave it out",
            field="beam_width",
        )
    stream = options.pop("stream", False)
    outputs = _outputs(request, options)
    text = options.pop("text_input")
    echo = not options.pop("exclude_input_in_output", stream)
    truncation = options.pop("truncate_prompt_tokens", None)
    grammar = take_grammar(options)
    if "cumulative_logprob" in outputs:
        options.setdefault("logprobs", 0)
    return Inference(
        id=request.id,
        call=GenerationCall(
            text=text,
            sampling=SamplingParams(**options),
            request_id=request_id,
            truncate_prompt_tokens=truncation,
            echo=echo,
            deadline_s=deadline_s,
            grammar=grammar,
        ),
        stream=stream,
        outputs=outputs,
    )


def _take_triton_parameters(parameters: dict[str, Any], deadline_s: float | None) -> float | None:
    """Removes what Triton's client puts beside a model's own parameters; returns the deadline."""
    for name in HARMLESS:
        parameters.pop(name, None)
    if parameters.pop("sequence_id", 0):
        raise InvalidRequestError(
            "sequence_id is set, and requests have no state here; leave it out",
            field="sequence_id",
        )
    parameters.pop("sequence_start", None)
    parameters.pop("sequence_end", None)
    timeout_us = parameters.pop("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise InvalidRequestError(
            f"timeout is {timeout_us!r}; send microseconds, at least 0", field="timeout"
        )
    if not timeout_us:
        return deadline_s
    own_s = time.monotonic() + timeout_us / 1e6
    return own_s if deadline_s is None else min(own_s, deadline_s)


def _outputs(request: pb.ModelInferRequest, options: dict[str, Any]) -> tuple[str, ...]:
    """Returns the outputs to send: those that are requested, or else those switched on."""
    on = [name for name in OUTPUTS if options.pop(f"return_{name}", False)]
    if not request.outputs:
        return ("text_output", *on)
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequestError(
                f"output {output.name!r} is not known; known are {', '.join(OUTPUTS)}",
                field="outputs",
            )
        if output.parameters:
            raise InvalidRequestError(
                f"output {output.name!r} has the parameters {', '.join(output.parameters)}, and "
                "outputs are only sent as they are; leave them out",
                field="outputs",
            )
    return tuple(output.name for output in request.outputs)


class ResponseWriter:
    """Gathers outputs and writes what has come since the last response as one."""

    def __init__(self, asked: Inference, tokenizer: Tokenizer, model: str) -> None:
        """Begins before the first output."""
        self._asked = asked
        self._tokenizer = tokenizer
        self._model = model
        choices = asked.call.sampling.n
        self._texts = [""] * choices
        self._tokens = [0] * choices
        self._scores: list[list[Any]] = [[] for _ in range(choices)]
        self._total = [0.0] * choices
        self._reasons = ["None"] * choices
        self._prompt_tokens = 0

    def add(self, output: Output) -> None:
        """Takes one output.

        Raises:
            JaxserveError: what the choice failed with.
        """
        sound(output)
        match output:
            case Started():
                self._prompt_tokens = output.prompt_tokens
            case Delta():
                self._texts[output.choice] += output.text
                if not output.prompt:
                    self._add_tokens(output)
            case Finished():
                self._reasons[output.choice] = output.reason.value

    def _add_tokens(self, delta: Delta) -> None:
        self._tokens[delta.choice] += len(delta.token_ids)
        for token_id, entry in delta.logprobs:
            if entry is None:
                continue
            self._total[delta.choice] += entry.logprob
            scores = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
            ranks = {other: rank for rank, other in enumerate(entry.top_ids, start=1)}
            scores[token_id], ranks[token_id] = entry.logprob, entry.rank
            self._scores[delta.choice].append(
                {
                    other: {
                        "logprob": value,
                        "rank": ranks[other],
                        "decoded_token": self._tokenizer.token_text(other),
                    }
                    for other, value in scores.items()
                }
            )

    @property
    def has_news(self) -> bool:
        """Whether a response now would say something."""
        return any(self._texts) or any(self._tokens)

    def response(self) -> pb.ModelInferResponse:
        """Returns what has come since the last call."""
        response = pb.ModelInferResponse(
            model_name=self._model, model_version=VERSION, id=self._asked.id
        )
        for name in self._asked.outputs:
            add_output(response, name, OUTPUTS[name], self._values(name))
        self._texts = [""] * len(self._texts)
        self._tokens = [0] * len(self._tokens)
        self._scores = [[] for _ in self._scores]
        return response

    def _values(self, name: str) -> list[Any]:
        match name:
            case "text_output":
                return [text.encode() for text in self._texts]
            case "finish_reason":
                return [reason.encode() for reason in self._reasons]
            case "cumulative_logprob":
                return list(self._total)
            case "logprobs":
                if self._asked.call.sampling.logprobs is None:
                    return [b"null"] * len(self._scores)
                return [json.dumps(scores).encode() for scores in self._scores]
            case "num_input_tokens":
                return [self._prompt_tokens]
        return list(self._tokens)


def stream_response(response: pb.ModelInferResponse, final: bool) -> pb.ModelStreamInferResponse:
    """Marks a response as one of a stream's."""
    response.parameters[FINAL].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)


def stream_error(text: str, request_id: str, info: ModelInfo) -> pb.ModelStreamInferResponse:
    """Writes the end of one request of a stream that goes on."""
    response = pb.ModelInferResponse(model_name=info.name, model_version=VERSION, id=request_id)
    response.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=text, infer_response=response)
