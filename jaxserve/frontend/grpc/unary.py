"""Gathers the outputs of one request into the single message of a unary call."""

from __future__ import annotations

from jaxserve.frontend.grpc.convert import finished_to_proto, logprobs_to_proto
from jaxserve.frontend.text_stream import Delta, Finished, Output, Started
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.v1 import generation_pb2 as pb


class AnswerCollector:
    """Takes outputs in order; ``response`` once all choices have finished."""

    def __init__(self, tokenizer: Tokenizer, model_digest: str) -> None:
        """Begins with nothing received."""
        self._tokenizer = tokenizer
        self._response = pb.GenerateUnaryResponse(model_digest=model_digest)
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, output: Output) -> None:
        """Adds one output."""
        match output:
            case Started():
                self._response.request_id = output.request_id
                self._response.seed_used = output.seed
            case Delta():
                self._add_delta(output)
            case Finished():
                self._choice(output.choice).finished.CopyFrom(finished_to_proto(output))

    def response(self) -> pb.GenerateUnaryResponse:
        """Returns the whole answer, its usage summed over the choices."""
        usage = self._response.usage
        for number in sorted(self._choices):
            choice = self._choices[number]
            choice.text = "".join(self._texts[number])
            self._response.choices.append(choice)
            usage.prompt_tokens = choice.finished.usage.prompt_tokens
            usage.cached_tokens = choice.finished.usage.cached_tokens
            usage.output_tokens += choice.finished.usage.output_tokens
        return self._response

    def _add_delta(self, delta: Delta) -> None:
        choice = self._choice(delta.choice)
        choice.token_ids.extend(delta.token_ids)
        self._texts[delta.choice].append(delta.text)
        scored = self._response.prompt_logprobs if delta.prompt else choice.logprobs
        scored.extend(logprobs_to_proto(delta.logprobs, self._tokenizer))

    def _choice(self, number: int) -> pb.Choice:
        if number not in self._choices:
            self._choices[number] = pb.Choice(choice=number)
            self._texts[number] = []
        return self._choices[number]
