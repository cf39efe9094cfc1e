"""Between the client's arguments and results and protobuf messages. No calls are made here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor

from jaxserve.engine.request import FinishReason, Timing
from jaxserve.engine.stats import EngineStats, ShardStats
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.client_types import (
    Chunk,
    DrainProgress,
    Finish,
    GeneratedChoice,
    GenerateOptions,
    Generation,
    HealthDetail,
    Score,
    TokenScore,
    TopToken,
    Usage,
)
from jaxserve.frontend.grammar import Grammar, take_grammar
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import admin_pb2, model_pb2
from jaxserve.v1 import generation_pb2 as pb

Messages = Sequence[Mapping[str, str]]

_ROLES = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
    "tool": pb.CHAT_ROLE_TOOL,
}
_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    pb.FINISH_REASON_ERROR: FinishReason.ERROR,
}
_OPTION_NAMES = frozenset(GenerateOptions.__annotations__)


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Messages | None,
    options: GenerateOptions,
) -> pb.GenerateRequest:
    """Builds a GenerateRequest; options that are None are left to the server's default.

    Raises:
        TypeError: an option that does not exist.
        InvalidRequestError: not exactly one prompt, or a value that the message cannot hold.
    """
    unknown = sorted(set(options) - _OPTION_NAMES)
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(_OPTION_NAMES))}"
        )
    given = {name: value for name, value in options.items() if value is not None}
    grammar = take_grammar(given)
    request = pb.GenerateRequest()
    if grammar is not None:
        request.MergeFrom(_constraint(grammar))
    set_prompt(request, prompt, token_ids, messages)
    for name, value in given.items():
        if name == "stop" and isinstance(value, str):
            value = [value]  # Not a list of its characters.
        try:
            request.MergeFrom(_one_field(name, value))
        except (TypeError, ValueError) as error:
            text = f"{name} cannot be sent: {error}{_range_of(name)}"
            raise InvalidRequestError(text, field=name) from None
    return request


def embed_request(texts: Sequence[str], truncate_prompt_tokens: int | None) -> pb.EmbedRequest:
    """Builds an EmbedRequest.

    Raises:
        InvalidRequestError: something that is no text, or no number.
    """
    try:
        return pb.EmbedRequest(
            texts=[texts] if isinstance(texts, str) else texts,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"texts cannot be sent: {error}", field="texts") from None


def set_prompt(
    request: Any,
    prompt: str | None,
    token_ids: Sequence[int] | None = None,
    messages: Messages | None = None,
) -> None:
    """Sets the ``prompt`` oneof of any message that has one.

    Raises:
        InvalidRequestError: not exactly one prompt, an unknown role, an id that is no int32, or
            text that is no Unicode.
    """
    given = [value for value in (prompt, token_ids, messages) if value is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"pass exactly one of a text prompt, token_ids and messages, got {len(given)}",
            field="prompt",
        )
    field = "prompt" if prompt is not None else "messages" if token_ids is None else "token_ids"
    try:
        if prompt is not None:
            request.text = prompt
        elif token_ids is not None:
            request.token_ids.ids.extend(token_ids)
            request.token_ids.SetInParent()
        else:
            request.chat.messages.extend(_message(message) for message in messages or ())
            request.chat.SetInParent()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{field} cannot be sent: {error}", field=field) from None


def chunk_from(response: pb.GenerateResponse) -> Chunk:
    """Reads a delta or a finish."""
    if response.HasField("delta"):
        delta = response.delta
        return Chunk(
            choice=delta.choice,
            first_index=delta.first_index,
            token_ids=tuple(delta.token_ids),
            text=delta.text,
            logprobs=scores_from(delta.logprobs),
            prompt=delta.prompt,
        )
    finish = finish_from(response.finished)
    return Chunk(finish.choice, finish.usage.output_tokens, (), "", finish=finish)


def finish_from(message: pb.GenerateFinished) -> Finish:
    """Reads how a choice ended."""
    return Finish(
        choice=message.choice,
        reason=_REASONS[message.reason],
        usage=usage_from(message.usage),
        timing=Timing(
            queue_s=message.timing.queue_seconds,
            first_token_s=message.timing.first_token_seconds,
            total_s=message.timing.total_seconds,
        ),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        stop_string=message.stop_string or None,
    )


def generation_from(response: pb.GenerateUnaryResponse) -> Generation:
    """Reads a whole answer."""
    choices = tuple(
        GeneratedChoice(
            choice=choice.choice,
            text=choice.text,
            token_ids=tuple(choice.token_ids),
            logprobs=scores_from(choice.logprobs),
            finish=finish_from(choice.finished),
        )
        for choice in response.choices
    )
    return Generation(
        request_id=response.request_id,
        model_digest=response.model_digest,
        seed=response.seed_used,
        choices=choices,
        usage=usage_from(response.usage),
        prompt_logprobs=scores_from(response.prompt_logprobs),
    )


def score_from(response: pb.ScoreResponse) -> Score:
    """Reads the log-probabilities of a text."""
    return Score(
        request_id=response.request_id,
        model_digest=response.model_digest,
        tokens=scores_from(response.logprobs),
        total_logprob=response.total_logprob,
        usage=usage_from(response.usage),
    )


def scores_from(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenScore, ...]:
    """Reads log-probabilities."""
    return tuple(
        TokenScore(
            token_id=item.token_id,
            logprob=item.logprob if item.HasField("logprob") else None,
            rank=item.rank,
            text=item.token_text,
            bytes=item.token_bytes,
            top=tuple(
                TopToken(top.token_id, top.logprob, top.token_text, top.token_bytes)
                for top in item.top
            ),
        )
        for item in messages
    )


def usage_from(message: pb.Usage) -> Usage:
    """Reads token counts."""
    return Usage(message.prompt_tokens, message.output_tokens, message.cached_tokens)


def stats_from(response: model_pb2.GetStatsResponse) -> EngineStats:
    """Reads the engine's counters; the names are the same on both sides."""
    fields = _fields(response, EngineStats)
    fields["data_shards"] = tuple(
        ShardStats(**_fields(shard, ShardStats)) for shard in response.data_shards
    )
    return EngineStats(**fields)


def model_from(message: model_pb2.Model) -> ModelInfo:
    """Reads the facts of a model; the names are the same on both sides."""
    fields = _fields(message, ModelInfo)
    fields["eos_token_ids"] = tuple(message.eos_token_ids)
    return ModelInfo(**fields)


def health_from(response: admin_pb2.GetHealthDetailResponse) -> HealthDetail:
    """Reads the state of health."""
    return HealthDetail(
        serving=response.serving,
        detail=response.detail,
        draining=response.draining,
        last_step_age_s=response.last_step_age_seconds,
        uptime_s=response.uptime_seconds,
        model_digest=response.model_digest,
    )


def drain_from(response: admin_pb2.DrainResponse) -> DrainProgress:
    """Reads how far a drain is."""
    return DrainProgress(response.idle, response.rows_running, response.requests_waiting)


def conversation(messages: Messages | str) -> Messages:
    """Makes a conversation of one user message; returns others as they are."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _fields(message: Any, cls: type) -> dict[str, Any]:
    fields = {name: getattr(message, name) for name in cls.__dataclass_fields__}
    return {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()
    }


def _one_field(name: str, value: object) -> pb.GenerateRequest:
    if name == "resume_token_ids":
        return pb.GenerateRequest(resume=pb.Resume(token_ids=cast(Sequence[int], value)))
    return pb.GenerateRequest(**{name: value})  # pyright: ignore[reportArgumentType]


def _constraint(grammar: Grammar) -> pb.GenerateRequest:
    match grammar.kind:
        case "json_object":
            return pb.GenerateRequest(json_object=True)
        case "choices":
            try:
                return pb.GenerateRequest(choices=pb.Choices(texts=json.loads(grammar.text)))
            except TypeError:
                text = "choices holds something that is no string; send texts"
                raise InvalidRequestError(text, field="choices") from None
        case kind:
            return pb.GenerateRequest(**{kind: grammar.text})  # pyright: ignore[reportArgumentType]


def _range_of(name: str) -> str:
    """What a number may be, as the end of a sentence."""
    field = pb.GenerateRequest.DESCRIPTOR.fields_by_name.get(name)
    match field and field.cpp_type:
        case FieldDescriptor.CPPTYPE_INT32:
            return "; choose at most 2147483647"
        case FieldDescriptor.CPPTYPE_UINT64:
            return "; choose 0 to 18446744073709551615"
        case _:
            return ""


def _message(message: Mapping[str, str]) -> pb.ChatMessage:
    role = message.get("role", "")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"a message has the role {role!r}; it must be one of {', '.join(_ROLES)}",
            field="messages",
        )
    if not isinstance(message.get("content"), str):
        raise InvalidRequestError(
            f"a message of the role {role!r} has no text; a message looks like "
            "{'role': 'user', 'content': 'Hello'}",
            field="messages",
        )
    return pb.ChatMessage(role=_ROLES[role], content=message["content"])
