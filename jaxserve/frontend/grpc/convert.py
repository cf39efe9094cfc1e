"""Between protobuf messages and the front end's own types. Straight-line work, no decisions.

Absent and zero differ wherever a field is ``optional``; nothing is checked here but what the own
types cannot express (unknown enum values). Ranges are ``Request.validate``'s business.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

from jaxserve.engine.request import (
    MAX_LOGPROBS,
    FinishReason,
    SamplingParams,
    StartedEvent,
    TokenLogprobs,
)
from jaxserve.engine.stats import EngineStats
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.generation import EMBEDDING, GenerationCall, check_prompts
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.text_stream import Delta, Finished, Output, Started
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.v1 import generation_pb2 as pb
from jaxserve.v1 import model_pb2

_OPTIONAL_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "n",
    "logprobs",
    "prompt_logprobs",
)

_ROLES = {
    pb.CHAT_ROLE_SYSTEM: "system",
    pb.CHAT_ROLE_USER: "user",
    pb.CHAT_ROLE_ASSISTANT: "assistant",
    pb.CHAT_ROLE_TOOL: "tool",
}

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


def call_from_generate(
    request: pb.GenerateRequest, request_id: str, deadline_s: float | None
) -> GenerationCall:
    """Reads a GenerateRequest.

    Args:
        request: as received.
        request_id: the client's, or the server's choice.
        deadline_s: of the RPC, on the ``time.monotonic`` clock.

    Raises:
        InvalidRequestError: an enum value that this version does not know, or ``json_object`` is
            false.
    """
    given = {name: getattr(request, name) for name in _OPTIONAL_SAMPLING if request.HasField(name)}
    sampling = SamplingParams(
        **given,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop=request.include_stop,
        ignore_eos=request.ignore_eos,
        logit_bias=dict(request.logit_bias),
        allowed_token_ids=tuple(request.allowed_token_ids),
        banned_token_ids=tuple(request.banned_token_ids),
    )
    return dataclasses.replace(
        call_from_prompt(request),
        sampling=sampling,
        request_id=request_id,
        truncate_prompt_tokens=_truncation(request),
        echo=request.echo,
        resume=tuple(request.resume.token_ids),
        priority=request.priority,
        cache_salt=request.cache_salt,
        deadline_s=deadline_s,
        grammar=_grammar(request),
    )


def call_from_score(
    request: pb.ScoreRequest, request_id: str, deadline_s: float | None
) -> GenerationCall:
    """Reads a ScoreRequest: a generation of which only the prompt's log-probabilities matter.

    Raises:
        InvalidRequestError: ``top_logprobs`` is out of range, or an enum value that this version
            does not know.
    """
    # The engine would refuse it too, under the name that it has in a GenerateRequest.
    if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be 0 to {MAX_LOGPROBS}, got {request.top_logprobs}",
            field="top_logprobs",
        )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=request.top_logprobs)
    return dataclasses.replace(
        call_from_prompt(request),
        sampling=sampling,
        request_id=request_id,
        truncate_prompt_tokens=_truncation(request),
        priority=request.priority,
        cache_salt=request.cache_salt,
        deadline_s=deadline_s,
    )


def calls_from_embed(
    request: pb.EmbedRequest, request_id: str, deadline_s: float | None
) -> list[GenerationCall]:
    """Reads an EmbedRequest: a call for each prompt.

    Raises:
        InvalidRequestError: there is none, or there are too many.
    """
    prompts = [GenerationCall(text=text) for text in request.texts]
    prompts += [GenerationCall(token_ids=tuple(each.ids)) for each in request.token_ids]
    check_prompts(len(prompts), field="texts")
    truncation = request.HasField("truncate_prompt_tokens") and request.truncate_prompt_tokens
    return [
        dataclasses.replace(
            prompt,
            embed=True,
            sampling=EMBEDDING,
            request_id=f"{request_id[:112]}-{place}",
            truncate_prompt_tokens=None if truncation is False else truncation,
            priority=request.priority,
            deadline_s=deadline_s,
        )
        for place, prompt in enumerate(prompts)
    ]


def call_from_prompt(
    request: pb.GenerateRequest | pb.ScoreRequest | pb.TokenizeRequest | pb.CountTokensRequest,
) -> GenerationCall:
    """Reads the ``prompt`` oneof that these messages share; no form is set when it is absent.

    Raises:
        InvalidRequestError: an unknown chat role.
    """
    match request.WhichOneof("prompt"):
        case "text":
            return GenerationCall(text=request.text)
        case "token_ids":
            assert isinstance(request, pb.GenerateRequest | pb.ScoreRequest)
            return GenerationCall(token_ids=tuple(request.token_ids.ids))
        case "chat":
            chat = request.chat
            return GenerationCall(
                messages=_messages(chat),
                add_generation_prompt=(
                    chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
                ),
            )
    return GenerationCall()


def response_from(output: Output, tokenizer: Tokenizer, model_digest: str) -> pb.GenerateResponse:
    """Writes one output as one stream message."""
    if type(output) is Delta:
        return pb.GenerateResponse(delta=delta_to_proto(output, tokenizer))
    if type(output) is Finished:
        return pb.GenerateResponse(finished=finished_to_proto(output))
    assert type(output) is Started
    started = pb.GenerateStarted(
        request_id=output.request_id,
        model_digest=model_digest,
        seed_used=output.seed,
        cached_tokens=output.cached_tokens,
        prompt_tokens=output.prompt_tokens,
    )
    return pb.GenerateResponse(started=started)


def delta_to_proto(delta: Delta, tokenizer: Tokenizer) -> pb.GenerateDelta:
    """Writes a delta; the per-token path."""
    return pb.GenerateDelta(
        choice=delta.choice,
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=logprobs_to_proto(delta.logprobs, tokenizer) if delta.logprobs else None,
        prompt=delta.prompt,
    )


def logprobs_to_proto(
    scored: Sequence[tuple[int, TokenLogprobs | None]], tokenizer: Tokenizer
) -> list[pb.TokenLogprob]:
    """Writes log-probabilities with the text and bytes of every token in them."""
    return [_logprob(token_id, entry, tokenizer) for token_id, entry in scored]


def finished_to_proto(output: Finished) -> pb.GenerateFinished:
    """Writes how a choice ended."""
    return pb.GenerateFinished(
        choice=output.choice,
        reason=_REASONS[output.reason],
        usage=pb.Usage(
            prompt_tokens=output.prompt_tokens,
            output_tokens=output.output_tokens,
            cached_tokens=output.cached_tokens,
        ),
        timing=pb.Timing(
            queue_seconds=output.timing.queue_s,
            first_token_seconds=output.timing.first_token_s,
            total_seconds=output.timing.total_s,
        ),
        stop_token_id=output.stop_token_id,
        stop_string=output.stop_string or "",
    )


def score_response(
    prompt: Sequence[int], started: StartedEvent, tokenizer: Tokenizer, model_digest: str
) -> pb.ScoreResponse:
    """Writes the log-probabilities of a prompt, which ``started`` carries."""
    entries = started.prompt_logprobs or ()
    scored = list(zip(prompt, entries, strict=True))
    return pb.ScoreResponse(
        request_id=started.request_id,
        model_digest=model_digest,
        logprobs=logprobs_to_proto(scored, tokenizer),
        total_logprob=math.fsum(entry.logprob for entry in entries if entry is not None),
        usage=pb.Usage(prompt_tokens=len(prompt), cached_tokens=started.cached_tokens),
    )


def stats_to_proto(stats: EngineStats, model_digest: str) -> model_pb2.GetStatsResponse:
    """Writes the counters; the names are the same on both sides."""
    return model_pb2.GetStatsResponse(**dataclasses.asdict(stats), model_digest=model_digest)


def model_to_proto(info: ModelInfo) -> model_pb2.Model:
    """Writes the facts of a model; the names are the same on both sides."""
    return model_pb2.Model(**dataclasses.asdict(info))


def _logprob(token_id: int, entry: TokenLogprobs | None, tokenizer: Tokenizer) -> pb.TokenLogprob:
    raw = tokenizer.token_bytes(token_id)
    text = raw.decode("utf-8", "replace")
    if entry is None:
        return pb.TokenLogprob(token_id=token_id, token_text=text, token_bytes=raw)
    top = [
        _top(other, value, tokenizer)
        for other, value in zip(entry.top_ids, entry.top_logprobs, strict=True)
    ]
    return pb.TokenLogprob(
        token_id=token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        token_text=text,
        token_bytes=raw,
        top=top,
    )


def _top(token_id: int, logprob: float, tokenizer: Tokenizer) -> pb.TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return pb.TopLogprob(
        token_id=token_id,
        logprob=logprob,
        token_text=raw.decode("utf-8", "replace"),
        token_bytes=raw,
    )


def _messages(chat: pb.Chat) -> list[dict[str, str]]:
    rendered = []
    for number, message in enumerate(chat.messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise InvalidRequestError(
                f"chat.messages[{number}].role is {message.role}; it must be 1 (system), 2 (user), "
                "3 (assistant) or 4 (tool)",
                field=f"chat.messages[{number}].role",
            )
        rendered.append({"role": role, "content": message.content})
    return rendered


def _grammar(request: pb.GenerateRequest) -> Grammar | None:
    match request.WhichOneof("constraint"):
        case None:
            return None
        case "choices":
            return Grammar("choices", json.dumps(list(request.choices.texts)), "choices")
        case "json_object":
            if not request.json_object:
                raise InvalidRequestError(
                    "json_object is false, which asks for nothing; leave it unset",
                    field="json_object",
                )
            return Grammar("json_object", "", "json_object")
        case kind:
            return Grammar(kind, getattr(request, kind), kind)


def _truncation(request: pb.GenerateRequest | pb.ScoreRequest) -> int | None:
    if request.HasField("truncate_prompt_tokens"):
        return request.truncate_prompt_tokens
    return None
