"""The measurement: one engine after the other over the same windows.

    1 prepare   every setting is resolved and every text cut, so that what will be refused is
                refused before anything is compiled
    2 score     each window is one request to the engine of service that asks for the
                log-probabilities of its prompt: pages, chunks and kernels are those of service
    3 compare   what the head saw in those very steps goes to ``runner/divergence.py``, beside what
                the first setting's saw

One model is held at a time, and with it the first one's head. Of the first one's places their
hidden states are kept in host memory: a hundredth of what log-probabilities would take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxserve.config import ServeConfig
from jaxserve.engine.request import SamplingParams
from jaxserve.engine.step import ProgramCall
from jaxserve.errors import ConfigError, LaunchError, RequestFailedError
from jaxserve.evaluation.result import Against, Evaluation, Outcome
from jaxserve.evaluation.settings import Setting
from jaxserve.evaluation.texts import Windows, cut, start_tokens
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import GenerationCall
from jaxserve.frontend.in_process_calls import score
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.launch import Report, Service, build, open_configured, silent
from jaxserve.resolve import LaunchPlan, configure_jax, resolve
from jaxserve.runner.divergence import Divergence, Head
from jaxserve.weights.source import ModelSource

WINDOW_TOKENS = 1024
"""Of a window, where the model's context has room for it."""
MAX_KEPT_BYTES = 4 * 2**30
"""Of the first setting's hidden states, in host memory."""

Hidden = Float[np.ndarray, "T D"]
SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)


@dataclass(frozen=True)
class Prepared:
    """A setting that can be launched, as far as can be said before weights are loaded."""

    setting: Setting
    config: ServeConfig
    plan: LaunchPlan


def evaluate(
    config: ServeConfig,
    settings: Sequence[Setting],
    texts: Mapping[str, str],
    *,
    window: int | None = None,
    most_windows: int | None = None,
    report: Report = silent,
) -> Evaluation:
    """Measures every setting on every text.

    Args:
        config: the model, and what all settings share.
        settings: the first is what others are compared with.
        texts: by name.
        window: tokens that are scored together; None is ``WINDOW_TOKENS``, or what fits.
        most_windows: of each text; None takes all.
        report: hears of launches, and of each window.

    Raises:
        LaunchError: a text or a setting has to change; the message says which and how.
    """
    configure_jax(config)
    with closing(_open(config, settings[0])) as source:
        context, tokenizer = source.model_config().context_tokens, _tokenizer(source)
    start = len(start_tokens(tokenizer))
    # The engine wants room for one new token behind a prompt.
    room = context - start - 1
    window = min(WINDOW_TOKENS, room) if window is None else window
    if not 2 <= window <= room:
        raise ConfigError(
            f"--window is {window:,} and the model's context of {context:,} tokens has room for 2 "
            f"to {room:,}"
        )
    windows = cut(texts, tokenizer, window, most_windows)
    prepared = [_prepare(config, setting, windows, texts, tokenizer) for setting in settings]
    outcomes = measure(prepared, windows, report)
    return Evaluation(
        model=config.model,
        texts=list(texts),
        text_bytes=windows.text_bytes,
        windows=len(windows.prompts),
        window_tokens=window,
        scored_tokens=len(windows.prompts) * windows.scored_each,
        left_out_tokens=windows.left_out_tokens,
        outcomes=outcomes,
    )


def prepare(config: ServeConfig, setting: Setting, prompt_tokens: int) -> Prepared:
    """Decides how a setting runs over prompts of so many tokens.

    Raises:
        ConfigError: the model, or the machine, refuses the setting.
    """
    # A window at a time: rows and pages for one, and every program there before it is timed.
    one_window = {
        "context_tokens": prompt_tokens + 1,
        "max_rows": 1,
        "prefix_cache": False,
        "prompt_logprobs": True,
        "ready_with": "all",
    }
    try:
        asked = replace(config, **one_window, **setting.flags)
        with closing(open_configured(asked)) as source:
            plan = resolve(asked, source.model_config(), source.formats)
    except LaunchError as error:
        raise ConfigError(
            f"setting {setting.name!r} is refused: {error} (in --settings --FLAG VALUE is "
            "NAME=FLAG:VALUE)"
        ) from error
    return Prepared(setting, asked, plan)


def measure(
    prepared: Sequence[Prepared], windows: Windows, report: Report = silent
) -> list[Outcome]:
    """Launches one setting after the other over the same windows.

    Raises:
        ConfigError: the windows are more than hidden states are kept of, or vocabularies differ.
        LaunchError: a setting cannot be launched.
    """
    _check_together(prepared, windows)
    outcomes = list[Outcome]()
    base: _Base | None = None
    for each in prepared:
        with _launch(each, report) as service:
            head = Head.of(service.runner)
            against = None if base is None else _Comparison(base, head, service)
            start_s = time.perf_counter()
            nats, kept = list[float](), list[Hidden]()
            for number, (cost, hidden) in enumerate(_score(service, windows)):
                if not math.isfinite(cost):
                    raise RequestFailedError(
                        f"{each.setting.name}, window {number + 1}",
                        "the log-probability of a token is not a finite number; the weights, or "
                        "this setting's arithmetic, are damaged",
                    )
                nats.append(cost)
                if against is not None:
                    against.add(number, cost, hidden)
                elif len(prepared) > 1:
                    kept.append(hidden)
                report(each.setting.name, number + 1, len(windows.prompts), "windows")
            seconds = time.perf_counter() - start_s
            if base is None:
                base = _Base(head, kept, nats, service.plan)
            outcomes.append(
                _outcome(each.setting, service, nats, seconds, against and against.result())
            )
    return outcomes


@dataclass(frozen=True)
class _Base:
    """What is kept of the first setting."""

    head: Head
    hidden: list[Hidden]
    nats: list[float]
    plan: LaunchPlan


class _Comparison:
    """One setting beside the base, window by window."""

    def __init__(self, base: _Base, head: Head, service: Service) -> None:
        dtypes = (base.plan.activations, service.plan.activations)
        self._base = base
        self._diverge = Divergence(base.head, head, service.runner, dtypes)
        self._more, self._kl, self._same = list[float](), list[np.ndarray](), list[np.ndarray]()

    def add(self, number: int, nats: float, hidden: Hidden) -> None:
        kl, same = self._diverge(self._base.hidden[number], hidden)
        self._more.append(nats - self._base.nats[number])
        self._kl.append(kl)
        self._same.append(same)

    def result(self) -> Against:
        return Against.of(np.array(self._more), np.stack(self._kl), np.stack(self._same))


def _score(service: Service, windows: Windows) -> Iterator[tuple[float, Hidden]]:
    """Yields of each window the mean cost of a token, and what the head saw before each."""
    calls = list[tuple[ProgramCall, Array]]()
    service.runner.on_scored = lambda call, hidden: calls.append((call, hidden))
    first = windows.first_scored
    for prompt in windows.prompts:
        calls.clear()
        call = GenerationCall(token_ids=prompt, sampling=SAMPLING)
        tokens = score(service.text, service.info.model_digest, call).tokens
        logprobs = [token.logprob for token in tokens[first:]]
        # One that is missing is not finite, either.
        nats = -math.fsum(math.nan if logprob is None else logprob for logprob in logprobs)
        yield nats / windows.scored_each, _hidden_of(calls, len(prompt) - 1)[first - 1 :]


def _hidden_of(calls: Sequence[tuple[ProgramCall, Array]], places: int) -> Hidden:
    """Puts the chunks of one prompt together: what the head saw at its first places.

    A prompt's last token is not scored from; its place, if there is one, is left out.
    """
    chunks = dict[int, np.ndarray]()
    for call, array in calls:
        by_shard = np.asarray(array).reshape(len(call.chunks), -1, array.shape[-1])
        for own, hidden in zip(call.chunks, by_shard, strict=True):
            for chunk in own:
                chunks[chunk.start] = hidden[: chunk.count]
    whole = np.concatenate([chunks[start] for start in sorted(chunks)])[:places]
    assert len(whole) == places, "a place of the prompt was not scored"
    return whole


def _outcome(
    setting: Setting, service: Service, nats: list[float], seconds: float, against: Against | None
) -> Outcome:
    runner, mean = service.runner, math.fsum(nats) / len(nats)
    return Outcome(
        setting=setting.name,
        flags=setting.flags,
        dtype=service.info.dtype,
        weights=service.info.quantization or service.info.dtype,
        kv_dtype=service.info.kv_dtype,
        nats_per_token=mean,
        perplexity=math.exp(mean),
        against=against,
        weight_bytes=sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(runner.abstract_params)
        ),
        kv_bytes_per_token=runner.config.cache.token_bytes(runner.model.config),
        seconds=seconds,
    )


def _launch(prepared: Prepared, report: Report) -> Service:
    name = prepared.setting.name

    def told(stage: str, done: int, total: int, detail: str) -> None:
        report(f"{name}: {stage}", done, total, detail)

    try:
        return build(prepared.config, told)
    except LaunchError as error:
        raise ConfigError(f"setting {name!r} cannot be launched: {error}") from error


# -- before anything is launched -------------------------------------------------------------------


def _prepare(
    config: ServeConfig,
    setting: Setting,
    windows: Windows,
    texts: Mapping[str, str],
    tokenizer: Tokenizer,
) -> Prepared:
    """``prepare``, and a checkpoint of its own has to read the texts as the first one does."""
    prepared = prepare(config, setting, len(windows.prompts[0]))
    if prepared.config.model != config.model:
        with closing(open_configured(prepared.config)) as source:
            own = _tokenizer(source)
        if any(
            own.encode(text, add_special_tokens=True)
            != tokenizer.encode(text, add_special_tokens=True)
            for text in texts.values()
        ):
            raise ConfigError(
                f"setting {setting.name!r} is refused: {prepared.config.model} reads the texts as "
                "other tokens than the first setting's model; compare models of one tokenizer"
            )
    return prepared


def _check_together(prepared: Sequence[Prepared], windows: Windows) -> None:
    base = prepared[0].plan
    for each in prepared:
        if each.plan.model.vocab_size != base.model.vocab_size:
            raise ConfigError(
                f"setting {each.setting.name!r} is refused: its model has a vocabulary of "
                f"{each.plan.model.vocab_size:,} and the first setting's of "
                f"{base.model.vocab_size:,}; compare models of one tokenizer"
            )
    places = len(windows.prompts) * windows.scored_each
    kept = places * base.model.embed * base.activations.itemsize
    if len(prepared) > 1 and kept > MAX_KEPT_BYTES:
        raise ConfigError(
            f"{places:,} places have {kept / 2**20:,.0f} MiB of hidden states and "
            f"{MAX_KEPT_BYTES / 2**20:,.0f} are kept; give less text, or --max-windows"
        )


def _open(config: ServeConfig, setting: Setting) -> ModelSource:
    return open_configured(replace(config, **setting.flags))


def _tokenizer(source: ModelSource) -> Tokenizer:
    files = source.tokenizer()
    return byte_tokenizer() if files is None else load_tokenizer(files)
