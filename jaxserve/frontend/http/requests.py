"""What requests of all routes have in common: types alone, and how they become sampling parameters.

Ranges are ``Request.validate``'s business, so that no rule is written twice. A parameter that
OpenAI documents is honoured, or harmless here, or refused because ignoring it would change the
answer; one that nobody knows is refused by its name (pydantic's ``extra="forbid"``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxserve.engine.request import SamplingParams
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.grammar import Grammar, take_grammar

_SAMPLING_NAMES = {field.name for field in fields(SamplingParams)}


class StrictModel(BaseModel):
    """Types are as in JSON: no number for a string, no field that is not listed."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictModel):
    """How a stream ends."""

    include_usage: bool = False
    """Send one more chunk with the usage, and no choices."""
    continuous_usage_stats: bool = False
    """vLLM's: usage in every chunk."""
    include_obfuscation: bool | None = None
    """Accepted; nothing is padded here."""


class JsonSchema(StrictModel):
    """A named schema of ``response_format``."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What the answer has to be."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's: exactly one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    """Accepted: there is no other whitespace than one space behind separators."""
    whitespace_pattern: None = None
    structural_tag: None = None


class GenerationRequest(StrictModel):
    """Fields of completions and chats alike."""

    model: str = ""
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """By token id, written as text."""
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    """Accepted; nobody is told apart by it."""

    # What clients of vLLM send.
    top_k: int | None = None
    """Also -1 for all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = None
    priority: int = 0
    cache_salt: str = ""
    request_id: str = ""
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    response_format: ResponseFormat | None = None

    def sampling(self, **more: Any) -> SamplingParams:
        """Returns how tokens are chosen; ``more`` are fields that only one route has.

        Raises:
            InvalidRequestError: a value that another name or type would be needed for.
        """
        given = {
            name: value
            for name, value in self.model_dump(
                include=_SAMPLING_NAMES & set(type(self).model_fields)
            ).items()
            if value is not None
        }
        given.pop("logprobs", None)
        if self.top_k == -1:
            given["top_k"] = 0
        if self.logit_bias is not None:
            given["logit_bias"] = biases(self.logit_bias)
        if self.include_stop_str_in_output is not None:
            given["include_stop"] = self.include_stop_str_in_output
        if isinstance(self.stop, list):
            given["stop"] = tuple(self.stop)
        given |= {name: value for name, value in more.items() if value is not None}
        return SamplingParams(**given)

    def refuse_what_changes_answers(self) -> None:
        """Refuses values of known parameters that would change the answer and are not offered.

        Raises:
            InvalidRequestError: with the name and what is possible.
        """
        refuse("use_beam_search", self.use_beam_search, (None, False), "sample with n instead")
        refuse("length_penalty", self.length_penalty, (None, 1.0), "it belongs to beam search")
        if self.stream:
            refuse(
                "prompt_logprobs", self.prompt_logprobs, (None,), "it comes with whole answers only"
            )
        refuse(
            "spaces_between_special_tokens",
            self.spaces_between_special_tokens,
            (None, True, False) if self.skip_special_tokens is not False else (None, False),
            "special tokens are written as they are",
        )

    def grammar(self) -> Grammar | None:
        """Returns what the answer has to be, if anything.

        Raises:
            InvalidRequestError: it is asked for in several ways, or in no way that is known.
        """
        asked: dict[str, tuple[str, Any]] = {
            "guided_json": ("json_schema", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choices", self.guided_choice),
            "guided_grammar": ("grammar", self.guided_grammar),
            "response_format": _of_format(self.response_format),
        }
        outputs = self.structured_outputs
        if outputs is not None:
            asked |= {
                "structured_outputs.json": ("json_schema", outputs.json_),
                "structured_outputs.regex": ("regex", outputs.regex),
                "structured_outputs.choice": ("choices", outputs.choice),
                "structured_outputs.grammar": ("grammar", outputs.grammar),
                "structured_outputs.json_object": ("json_object", outputs.json_object or None),
            }
        given = {name: pair for name, pair in asked.items() if pair[1] is not None}
        if len(given) > 1:
            raise InvalidRequestError(
                f"{' and '.join(given)} are given, and an answer obeys one of them; choose one",
                field=next(iter(given)),
            )
        for name, (kind, value) in given.items():
            made = take_grammar({kind: value})
            assert made is not None
            return Grammar(made.kind, made.text, name)
        return None


def _of_format(format: ResponseFormat | None) -> tuple[str, Any]:
    match format:
        case None | ResponseFormat(type="text"):
            return "", None
        case ResponseFormat(type="json_object"):
            return "json_object", True
        case ResponseFormat(type="json_schema", json_schema=JsonSchema() as named):
            return "json_schema", named.schema_
        case ResponseFormat(type="json_schema"):
            raise InvalidRequestError(
                "response_format.json_schema is missing; send an object with name and schema",
                field="response_format",
            )
    raise InvalidRequestError(
        f"response_format.type is {format.type!r}; choose text, json_object or json_schema",
        field="response_format",
    )


def biases(given: Mapping[str, float]) -> dict[int, float]:
    """Reads ``logit_bias``, whose keys JSON makes texts.

    Raises:
        InvalidRequestError: a key that is no token id.
    """
    found = {}
    for key, value in given.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise InvalidRequestError(
                f"logit_bias has the key {key[:40]!r}; keys are token ids", field="logit_bias"
            )
        found[int(key)] = value
    return found


def checked[Model: BaseModel](model: type[Model], given: Mapping[str, Any], name: str) -> Model:
    """Reads a part of a request whose types depend on another part.

    Raises:
        InvalidRequestError: a field is unknown or of another type.
    """
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([name, *map(str, first["loc"])])
        why = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidRequestError(f"{field}: {why}"[:300], field=field[:200]) from None


def refuse(name: str, value: object, allowed: Sequence[object], why: str) -> None:
    """Refuses a value of a known parameter that is not offered here.

    Raises:
        InvalidRequestError: it is none of ``allowed``.
    """
    if value not in allowed:
        shown = json.dumps(value, default=str)[:80]
        raise InvalidRequestError(f"{name} is {shown}, which is not offered: {why}", field=name)
