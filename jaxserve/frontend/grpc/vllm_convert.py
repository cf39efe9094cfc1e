"""Between the messages of ``vllm.grpc.engine`` and the front end's own types.

Its proto3 scalars mostly have no presence: 0 is unset where 0 would make no sense (``top_p``,
``repetition_penalty``, ``n``). What is said and would change the answer is honoured or refused by
name; ranges are ``Request.validate``'s business. Facts and counters are in ``vllm_facts.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.engine.request import SamplingParams, TokenLogprobs
from jaxserve.errors import InvalidRequestError, RequestCancelledError
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.text_stream import Delta, Finished, Output, Started

_REFUSED = {
    "mm_inputs": "this server reads text alone",
    "extra_mm_inputs": "this server reads text alone",
    "media_refs": "this server reads text alone",
    "kv_transfer_params": "this server computes prompts itself",
    "kv_transfer_params_json": "this server computes prompts itself",
}


def call_from_generate(
    request: pb.GenerateRequest,
    request_id: str,
    deadline_s: float | None,
    *,
    context_tokens: int,
) -> GenerationCall:
    """Reads a GenerateRequest.

    ``data_parallel_rank`` is left to the scheduler, which knows better where a prompt is cached,
    and ``grammar_from_first_token`` is what grammars do here.

    Args:
        request: as received.
        request_id: the client's, or the server's choice.
        deadline_s: of the RPC, on the ``time.monotonic`` clock.
        context_tokens: what ``truncate_prompt_tokens`` of -1 makes a prompt fit into.

    Raises:
        InvalidRequestError: something is asked for that this server cannot do.
    """
    for field, value in request.ListFields():
        if field.name in _REFUSED and value:
            raise InvalidRequestError(
                f"{field.name} is set, and {_REFUSED[field.name]}; leave it out", field=field.name
            )
    asked = request.sampling_params
    form = request.WhichOneof("input")
    return GenerationCall(
        text=request.text if form == "text" else None,
        token_ids=tuple(request.tokenized.input_ids) if form == "tokenized" else None,
        sampling=_sampling(asked),
        request_id=request_id,
        truncate_prompt_tokens=_truncation(asked, context_tokens),
        deadline_s=deadline_s,
        grammar=_grammar(asked),
    )


def _sampling(asked: pb.SamplingParams) -> SamplingParams:
    given = {
        name: getattr(asked, name)
        for name in ("temperature", "max_tokens", "logprobs", "prompt_logprobs", "seed")
        if asked.HasField(name)
    }
    return SamplingParams(
        **given,
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k,
        min_p=asked.min_p,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        repetition_penalty=asked.repetition_penalty or 1.0,
        min_tokens=asked.min_tokens,
        n=asked.n or 1,
        stop=tuple(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids),
        include_stop=asked.include_stop_str_in_output,
        ignore_eos=asked.ignore_eos,
        skip_special_tokens=asked.skip_special_tokens,
        logit_bias=dict(asked.logit_bias),
    )


def _truncation(asked: pb.SamplingParams, context_tokens: int) -> int | None:
    if not asked.HasField("truncate_prompt_tokens"):
        return None
    if asked.truncate_prompt_tokens != -1:
        return asked.truncate_prompt_tokens
    # -1 is "what the model takes"; beside the prompt there has to be room for the answer.
    answer = asked.max_tokens if asked.HasField("max_tokens") else 1
    return max(1, context_tokens - answer)


def _grammar(asked: pb.SamplingParams) -> Grammar | None:
    match asked.WhichOneof("constraint"):
        case None:
            return None
        case "choice":
            return Grammar("choices", json.dumps(list(asked.choice.choices)), "choice")
        case "json_object":
            if not asked.json_object:
                raise InvalidRequestError(
                    "json_object is false, which asks for nothing; leave it unset",
                    field="json_object",
                )
            return Grammar("json_object", "", "json_object")
        case "structural_tag":
            raise InvalidRequestError(
                "structural_tag is set, and grammars that begin inside an answer are not "
                "supported; send json_schema, regex, grammar or choice",
                field="structural_tag",
            )
        case kind:
            return Grammar(kind, getattr(asked, kind), kind)


class AnswerWriter:
    """Writes the outputs of one request as messages, in the order of the outputs."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        """Begins before the first output of ``request``."""
        self._streams = request.stream
        self._stop_ids = frozenset(request.sampling_params.stop_token_ids)
        self._prompt_tokens = self._cached_tokens = 0
        self._input_logprobs: pb.InputLogProbs | None = None
        self._choices: dict[int, pb.GenerateComplete] = {}

    def write(self, output: Output) -> pb.GenerateResponse | None:
        """Returns the message for one output, if it makes one.

        Raises:
            JaxserveError: what the choice failed with, unless somebody aborted it.
        """
        match output:
            case Started():
                self._prompt_tokens = output.prompt_tokens
                self._cached_tokens = output.cached_tokens
            case Delta(prompt=True):
                self._add_prompt(output)
            case Delta() if output.token_ids:
                return self._add_delta(output)
            case Finished():
                return self._finish(output)
        return None

    def _add_prompt(self, delta: Delta) -> None:
        scored = self._input_logprobs or pb.InputLogProbs()
        self._input_logprobs = scored
        for token_id, entry in delta.logprobs:
            value = None if entry is None else entry.logprob
            scored.token_logprobs.add(value=value)
            scored.token_ids.append(token_id)
            scored.top_logprobs.append(_top(entry))

    def _add_delta(self, delta: Delta) -> pb.GenerateResponse | None:
        is_first = delta.choice not in self._choices
        complete = self._choices.setdefault(delta.choice, pb.GenerateComplete())
        complete.output_ids.extend(delta.token_ids)
        scored = _output_logprobs(delta) if delta.logprobs else None
        if not self._streams:
            if scored is not None:
                complete.output_logprobs.MergeFrom(scored)
            return None
        return pb.GenerateResponse(
            chunk=pb.GenerateStreamChunk(
                token_ids=delta.token_ids,
                prompt_tokens=self._prompt_tokens,
                # Of this chunk: clients of this protocol add them up.
                completion_tokens=len(delta.token_ids),
                cached_tokens=self._cached_tokens,
                output_logprobs=scored,
                input_logprobs=self._input_logprobs if is_first else None,
                index=delta.choice,
            )
        )

    def _finish(self, output: Finished) -> pb.GenerateResponse:
        aborted = isinstance(output.error, RequestCancelledError)
        if output.error is not None and not aborted:
            raise output.error
        complete = self._choices.setdefault(output.choice, pb.GenerateComplete())
        # "error" is never sent: a status says which.
        complete.finish_reason = "abort" if aborted else output.reason.value
        complete.prompt_tokens = output.prompt_tokens
        complete.completion_tokens = output.output_tokens
        complete.cached_tokens = output.cached_tokens
        complete.index = output.choice
        if self._input_logprobs is not None and not self._streams:
            complete.input_logprobs.CopyFrom(self._input_logprobs)
        if output.stop_string is not None:
            complete.matched_stop_str = output.stop_string
        elif output.stop_token_id in self._stop_ids:
            complete.matched_token_id = output.stop_token_id
        return pb.GenerateResponse(complete=complete)


def _output_logprobs(delta: Delta) -> pb.OutputLogProbs:
    entries: Sequence[tuple[int, TokenLogprobs | None]] = delta.logprobs
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob for _, entry in entries if entry is not None],
        token_ids=[token_id for token_id, _ in entries],
        top_logprobs=[_top(entry) for _, entry in entries],
    )


def _top(entry: TokenLogprobs | None) -> pb.TopLogProbs:
    if entry is None:
        return pb.TopLogProbs()
    return pb.TopLogProbs(values=entry.top_logprobs, token_ids=entry.top_ids)
