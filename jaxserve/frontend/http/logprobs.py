"""Log-probabilities: OpenAI's objects for chats and lists for completions, vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxserve.engine.request import TokenLogprobs
from jaxserve.frontend.tokenizer import Tokenizer

LEAST = -9999.0
"""JSON has no minus infinity; this is what OpenAI's own servers send."""
ScoredToken = tuple[int, TokenLogprobs | None]
Scored = Sequence[ScoredToken]


def chat_logprobs(scored: Scored, tokenizer: Tokenizer, top: int) -> list[dict[str, Any]]:
    """``choices[].logprobs.content``: every token with its likeliest alternatives."""
    return [
        {
            **_token(token, entry.logprob if entry else LEAST, tokenizer),
            "top_logprobs": [
                _token(other, value, tokenizer)
                for other, value in zip(entry.top_ids[:top], entry.top_logprobs, strict=False)
            ]
            if entry
            else [],
        }
        for token, entry in scored
    ]


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": max(logprob, LEAST),
        "bytes": list(raw),
    }


def prompt_logprobs(
    scored: Scored, tokenizer: Tokenizer, top: int
) -> list[dict[int, dict[str, Any]] | None]:
    """vLLM's ``prompt_logprobs``: for every token but the first, its entry and the likeliest."""
    shown: list[dict[int, dict[str, Any]] | None] = []
    for token, entry in scored:
        if entry is None:
            shown.append(None)
            continue
        likeliest = zip(entry.top_ids[:top], entry.top_logprobs, strict=False)
        entries = {
            other: (value, rank) for rank, (other, value) in enumerate(likeliest, start=1)
        } | {token: (entry.logprob, entry.rank)}
        shown.append(
            {
                number: {
                    "logprob": max(value, LEAST),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(number),
                }
                for number, (value, rank) in entries.items()
            }
        )
    return shown


class CompletionLogprobs:
    """``choices[].logprobs`` of completions, gathered or piece by piece."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        """Begins at the first character; ``top`` alternatives are shown."""
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def take(self, scored: Scored) -> dict[str, list[Any]]:
        """The lists of the next tokens. The first token of a prompt has no log-probability."""
        taken: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, entry in scored:
            text = self._tokenizer.token_text(token)
            taken["tokens"].append(text)
            taken["text_offset"].append(self._offset)
            self._offset += len(text)
            taken["token_logprobs"].append(entry and max(entry.logprob, LEAST))
            taken["top_logprobs"].append(entry and self._alternatives(token, entry))
        return taken

    def _alternatives(self, token: int, entry: TokenLogprobs) -> dict[str, float]:
        """By text, of equal texts the likeliest; the token itself is among them, as with OpenAI."""
        pairs = [*zip(entry.top_ids[: self._top], entry.top_logprobs, strict=False)]
        found: dict[str, float] = {}
        for other, value in (*pairs, (token, entry.logprob)):
            found.setdefault(self._tokenizer.token_text(other), max(value, LEAST))
        return found
