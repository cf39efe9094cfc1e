"""How results look in a notebook and at a prompt: short, and with everything escaped.

Text comes from a model and may hold any markup; it is shown, never interpreted.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.frontend.client_types import Generation, Score

REPR_CHARS = 60
HTML_CHARS = 4000
"""A notebook keeps its outputs; the whole text is in ``.text``."""


def answer_repr(answer: Generation) -> str:
    """Returns one line."""
    more = f", {len(answer.choices)} choices" if len(answer.choices) > 1 else ""
    return (
        f"Generation({_shorten(answer.text, REPR_CHARS)!r}, {len(answer.token_ids)} tokens, "
        f"{answer.finish_reason.value}{more})"
    )


def answer_html(answer: Generation) -> str:
    """Returns each choice's text, and one line of facts."""
    blocks = [
        f'<pre style="white-space: pre-wrap">{html.escape(_shorten(choice.text, HTML_CHARS))}</pre>'
        for choice in answer.choices
    ]
    usage, timing = answer.usage, answer.timing
    facts = (
        f"{answer.finish_reason.value} &middot; {usage.prompt_tokens} prompt tokens "
        f"({usage.cached_tokens} cached) &middot; {usage.output_tokens} output tokens &middot; "
        f"first after {timing.first_token_s * 1e3:.0f} ms, all after {timing.total_s:.2f} s "
        f"&middot; seed {answer.seed}"
    )
    return f"{''.join(blocks)}<small>{facts}</small>"


def score_repr(score: Score) -> str:
    """Returns one line."""
    return f"Score({len(score.tokens)} tokens, total_logprob={score.total_logprob:.3f})"


def score_html(score: Score) -> str:
    """Returns the text with each token the redder the less likely it was."""
    spans = []
    length = 0
    for token in score.tokens:
        length += len(token.text)
        if length > HTML_CHARS:
            spans.append("…")
            break
        surprise = 0.0 if token.logprob is None else 1.0 - math.exp(token.logprob)
        title = "no log-probability" if token.logprob is None else f"{token.logprob:.3f}"
        spans.append(
            f'<span title="{title}" style="background: rgba(255, 80, 80, {surprise * 0.6:.2f})">'
            f"{html.escape(token.text)}</span>"
        )
    body = "".join(spans)
    return (
        f'<pre style="white-space: pre-wrap">{body}</pre>'
        f"<small>{len(score.tokens)} tokens &middot; total {score.total_logprob:.3f}</small>"
    )


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
