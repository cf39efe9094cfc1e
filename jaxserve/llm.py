"""The notebook's front door: an engine in this process, with the client's types and methods.

    with LLM("smollm2") as llm:
        print(llm.generate("The sky is", max_tokens=16).text)
        for chunk in llm.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

The engine runs on threads of its own, so all of this works inside a running event loop. What a
server adds (a socket, deadlines, several processes) is left to ``Client``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, Unpack, cast, overload

import numpy as np

from jaxserve.assets import default_directory
from jaxserve.config import ServeConfig
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.stats import EngineStats
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.frontend.client_types import GenerateOptions, Generation, Score
from jaxserve.frontend.generation import EMBEDDING, GenerationCall
from jaxserve.frontend.grammar import GRAMMAR_OPTIONS, take_grammar
from jaxserve.frontend.in_process_calls import Batch, Stream, embed, score
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.launch import build
from jaxserve.progress import Progress, show_to_person
from jaxserve.runner.dense import DenseForward

Messages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | np.ndarray

_SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))
_CALL_NAMES = {
    "request_id": "request_id",
    "truncate_prompt_tokens": "truncate_prompt_tokens",
    "echo": "echo",
    "resume_token_ids": "resume",
    "priority": "priority",
    "cache_salt": "cache_salt",
}


class LLM:
    """One model in this process. Close it, or use ``with``, to get its memory back."""

    def __init__(
        self,
        model: str = "smollm2",
        *,
        mesh: str = "1x1",
        device: str = "auto",
        dtype: str = "auto",
        progress: bool | None = None,
        **config: Any,
    ) -> None:
        """Loads and compiles; takes seconds to a minute.

        Args:
            model: a path, a hub id, an alias, or ``dummy:NAME``.
            mesh: DATAxTENSOR.
            device: ``auto``, ``cpu``, ``cpu:N`` or ``cuda``.
            dtype: of weights, activations and cache.
            progress: show progress; None does when somebody is watching.
            **config: other fields of ``ServeConfig``.

        Raises:
            LaunchError: the message says what has to change.
        """
        directories = {
            "assets_dir": default_directory({}),
            "cache_dir": Path.home() / ".cache" / "jaxserve",
        }
        asked = ServeConfig(
            model=model, mesh=mesh, device=device, dtype=dtype, **{**directories, **config}
        )
        self._progress = progress
        with show_to_person(progress) as report:
            self._service = build(asked, report)
        self._text = self._service.text
        self._dense: DenseForward | None = DenseForward(self._service.runner.model)
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._text.tokenizer

    @property
    def info(self) -> ModelInfo:
        """The facts of the model."""
        return self._service.info

    def stats(self) -> EngineStats:
        """Returns the engine's counters."""
        return self._service.engine.stats()

    # A str is a sequence of str, too; the first overload wins, as it should.
    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompts: Prompt,
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation]:
        """Returns whole answers; a list of prompts is computed together.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling: how tokens are chosen.
            **options: single parameters, as of ``Client.generate``; they win over ``sampling``.

        Raises:
            JaxserveError: a prompt was refused or failed; the others are given up.
        """
        if _is_prompt(prompts):
            return self._run([self._call(_prompt(prompts), sampling, options)])[0]
        many = cast("Sequence[Prompt]", prompts)
        return self._run([self._call(_prompt(prompt), sampling, options) for prompt in many])

    def chat(
        self,
        messages: Messages | str,
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Returns the model's answer to a conversation, or to one user message."""
        return self._run([self._call(_conversation(messages), sampling, options)])[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        sampling: SamplingParams | None = None,
        *,
        messages: Messages | str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Returns an answer as it is made; closing or dropping it cancels the request.

        Args:
            prompt: a text or token ids; or give ``messages``.
            sampling: how tokens are chosen.
            messages: a conversation, or one user message.
            **options: as for ``generate``.

        Raises:
            JaxserveError: the request was refused.
        """
        if (prompt is None) == (messages is None):
            raise InvalidRequestError("pass exactly one of a prompt and messages", field="prompt")
        given = _prompt(prompt) if prompt is not None else _conversation(messages or ())
        self._check_open()
        return Stream(self._text, self._call(given, sampling, options))

    def score(
        self,
        text: Prompt | None = None,
        *,
        token_ids: Sequence[int] | np.ndarray | None = None,
        messages: Messages | None = None,
        top_logprobs: int = 0,
    ) -> Score:
        """Returns the log-probability of every token of a text.

        Args:
            text: one text or its token ids; exactly one of this, ``token_ids`` and ``messages``.
            token_ids: used as they are.
            messages: a conversation.
            top_logprobs: the likeliest tokens to tell beside each.

        Raises:
            InvalidRequestError: also when the LLM was made with ``prompt_logprobs=False``.
        """
        if sum(each is not None for each in (text, token_ids, messages)) != 1:
            raise InvalidRequestError(
                "pass exactly one of a text, token_ids and messages", field="prompt"
            )
        prompt = text if token_ids is None else token_ids
        given = GenerationCall(messages=messages) if prompt is None else _prompt(prompt)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_logprobs)
        self._check_open()
        return score(self._text, self.info.model_digest, replace(given, sampling=sampling))

    def embed(
        self, texts: Sequence[str] | str, *, truncate_prompt_tokens: int | None = None
    ) -> np.ndarray:
        """Returns what texts mean, float32 ``[N, D]``, each row of length 1.

        Args:
            texts: one or several.
            truncate_prompt_tokens: keep only the last so many tokens of each.

        Raises:
            InvalidRequestError: also when the LLM was made without ``embeddings=True``.
        """
        self._check_open()
        calls = [
            GenerationCall(
                text=text,
                embed=True,
                sampling=EMBEDDING,
                truncate_prompt_tokens=truncate_prompt_tokens,
            )
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return np.array(embed(self._text, calls), np.float32)

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the float32 logits ``[T, V]`` after every token, from one dense forward pass.

        Computed beside the serving loop, in the weights' dtype; compiles when first asked for a
        length (rounded up to a power of two).

        Raises:
            InvalidRequestError: no tokens, too many, or an id that the model does not have.
            ConfigError: the LLM was made with ``strict_compile``, or has been closed.
        """
        Request(request_id="", prompt=list(token_ids)).validate(
            vocab_size=self.info.vocab_size, context_tokens=self.info.context_tokens + 1
        )
        if self._service.config.strict_compile:
            raise ConfigError(
                "logits compiles a program, which strict_compile forbids; leave it off"
            )
        self._check_open()
        params = self._service.runner.params
        assert params is not None
        assert self._dense is not None
        return self._dense(params, [int(token) for token in token_ids])

    def close(self) -> None:
        """Ends whatever runs and gives the memory back. Safe to call again."""
        self._closed = True
        self._dense = None
        self._service.close()

    def __enter__(self) -> LLM:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    def __repr__(self) -> str:
        """One line: what runs, and where."""
        info = self.info
        return f"LLM({info.name!r}, {info.dtype}, {info.platform}, {info.mesh})"

    # -- one request -------------------------------------------------------------------------------

    def _call(
        self,
        prompt: GenerationCall,
        sampling: SamplingParams | None,
        options: GenerateOptions,
    ) -> GenerationCall:
        """Joins a prompt with its parameters; options that are None are left out."""
        given = {name: value for name, value in options.items() if value is not None}
        self.info.check_name(cast("str", given.pop("model", "")))
        grammar = take_grammar(given)
        unknown = sorted(set(given) - _SAMPLING_NAMES - set(_CALL_NAMES))
        if unknown:
            known = ", ".join(sorted({"model", *_SAMPLING_NAMES, *_CALL_NAMES, *GRAMMAR_OPTIONS}))
            raise TypeError(f"unknown option {', '.join(unknown)}; there are {known}")
        chosen: dict[str, Any] = {n: v for n, v in given.items() if n in _SAMPLING_NAMES}
        other: dict[str, Any] = {_CALL_NAMES[n]: v for n, v in given.items() if n in _CALL_NAMES}
        chosen_from = replace(sampling or SamplingParams(), **chosen)
        return replace(prompt, sampling=chosen_from, grammar=grammar, **other)

    def _run(self, calls: Sequence[GenerationCall]) -> list[Generation]:
        self._check_open()
        with show_to_person(self._progress if len(calls) > 1 else False) as progress:
            report = partial(_report, progress)
            return Batch(self._text, self.info.model_digest, calls, report).run()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this LLM has been closed; make another")


def _report(progress: Progress, done: int, total: int) -> None:
    progress("generate", done, total, "")


def _is_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    items = cast("Sequence[object]", prompts)
    return len(items) > 0 and isinstance(items[0], Integral)


def _prompt(prompt: object) -> GenerationCall:
    if isinstance(prompt, str):
        return GenerationCall(text=prompt)
    try:
        return GenerationCall(token_ids=[index(token) for token in cast("Sequence[int]", prompt)])
    except TypeError:
        raise InvalidRequestError(
            f"a prompt is a text or a list of token ids, got {reprlib.repr(prompt)}", field="prompt"
        ) from None


def _conversation(messages: Messages | str) -> GenerationCall:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return GenerationCall(messages=messages)
