"""Answers of an engine in this process, as the dataclasses that the client gives back.

``LLM`` and ``Client`` return the same types, so code moves from a notebook to a server unchanged.
Nothing here waits or submits; outputs come from ``text_stream.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxserve.engine.request import StartedEvent, TokenLogprobs
from jaxserve.frontend.client_types import (
    Chunk,
    Finish,
    GeneratedChoice,
    Generation,
    Score,
    TokenScore,
    TopToken,
    Usage,
)
from jaxserve.frontend.text_stream import Delta, Finished, Output, Started
from jaxserve.frontend.tokenizer import Tokenizer


def chunk_from(output: Delta | Finished, tokenizer: Tokenizer) -> Chunk:
    """Makes what a stream yields.

    Raises:
        JaxserveError: what the choice failed with.
    """
    if isinstance(output, Finished):
        finish = finish_from(output)
        return Chunk(finish.choice, finish.usage.output_tokens, (), "", finish=finish)
    return Chunk(
        choice=output.choice,
        first_index=output.first_index,
        token_ids=tuple(output.token_ids),
        text=output.text,
        logprobs=token_scores(output.logprobs, tokenizer),
        prompt=output.prompt,
    )


def finish_from(output: Finished) -> Finish:
    """Makes the end of a choice.

    Raises:
        JaxserveError: what the choice failed with.
    """
    if output.error is not None:
        raise output.error
    return Finish(
        choice=output.choice,
        reason=output.reason,
        usage=Usage(output.prompt_tokens, output.output_tokens, output.cached_tokens),
        timing=output.timing,
        stop_token_id=output.stop_token_id,
        stop_string=output.stop_string,
    )


def token_scores(
    scored: Sequence[tuple[int, TokenLogprobs | None]], tokenizer: Tokenizer
) -> tuple[TokenScore, ...]:
    """Makes log-probabilities with the text and bytes of every token in them."""
    return tuple(_token_score(token, entry, tokenizer) for token, entry in scored)


def score_from(
    prompt: Sequence[int], started: StartedEvent, tokenizer: Tokenizer, model_digest: str
) -> Score:
    """Makes the log-probabilities of a prompt, which ``started`` carries."""
    entries = started.prompt_logprobs or ()
    return Score(
        request_id=started.request_id,
        model_digest=model_digest,
        tokens=token_scores(list(zip(prompt, entries, strict=True)), tokenizer),
        total_logprob=math.fsum(entry.logprob for entry in entries if entry is not None),
        usage=Usage(len(prompt), 0, started.cached_tokens),
    )


class AnswerBuilder:
    """Gathers the outputs of one request into a ``Generation``."""

    def __init__(self, tokenizer: Tokenizer, model_digest: str) -> None:
        """Starts with nothing."""
        self._tokenizer = tokenizer
        self._model_digest = model_digest
        self._started: Started | None = None
        self._prompt_scores: list[TokenScore] = []
        self._choices: dict[int, _Choice] = {}

    def add(self, output: Output) -> None:
        """Adds one output.

        Raises:
            JaxserveError: what a choice failed with; the answer is then of no use.
        """
        if isinstance(output, Started):
            self._started = output
            return
        choice = self._choices.setdefault(output.choice, _Choice())
        if isinstance(output, Finished):
            choice.finish = finish_from(output)
            return
        choice.token_ids += output.token_ids
        choice.texts.append(output.text)
        scores = self._prompt_scores if output.prompt else choice.scores
        scores += token_scores(output.logprobs, self._tokenizer)

    def generation(self) -> Generation:
        """Returns the whole answer once every choice has finished; usage is their sum."""
        assert self._started is not None, "no output came before the end"
        choices = tuple(self._choices[number].build(number) for number in sorted(self._choices))
        usages = [choice.finish.usage for choice in choices]
        return Generation(
            request_id=self._started.request_id,
            model_digest=self._model_digest,
            seed=self._started.seed,
            choices=choices,
            usage=Usage(
                usages[0].prompt_tokens,
                sum(usage.output_tokens for usage in usages),
                usages[0].cached_tokens,
            ),
            prompt_logprobs=tuple(self._prompt_scores),
        )


class _Choice:
    """One choice being gathered."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.scores: list[TokenScore] = []
        self.finish: Finish | None = None

    def build(self, number: int) -> GeneratedChoice:
        assert self.finish is not None, "the choice has not finished"
        return GeneratedChoice(
            choice=number,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.scores),
            finish=self.finish,
        )


def _token_score(token: int, entry: TokenLogprobs | None, tokenizer: Tokenizer) -> TokenScore:
    raw = tokenizer.token_bytes(token)
    text = raw.decode("utf-8", "replace")
    if entry is None:
        return TokenScore(token, None, 0, text, raw, ())
    top = tuple(
        TopToken(other, value, tokenizer.token_text(other), tokenizer.token_bytes(other))
        for other, value in zip(entry.top_ids, entry.top_logprobs, strict=True)
    )
    return TokenScore(token, entry.logprob, entry.rank, text, raw, top)
