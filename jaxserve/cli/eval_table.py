"""An evaluation as a table for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.evaluation.result import Evaluation, Outcome

WIDTH = 160
"""Of what is not a terminal."""
COLUMNS = (
    "setting",
    "weights",
    "KV",
    "perplexity",
    "ratio",
    "KL mean",
    "KL p99",
    "KL max",
    "same top",
    "weights MB",
    "KV B/token",
    "tokens/GiB",
)


def print_table(evaluation: Evaluation) -> None:
    """Prints what was measured, and how to read it."""
    # Imported here: a tenth of a second that commands without tables do not spend.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 3 else "right")
    for outcome in evaluation.outcomes:
        table.add_row(*_cells(outcome))
    console.print(f"{evaluation.model}: {', '.join(evaluation.texts)}", soft_wrap=True)
    console.print(table)
    console.print(_remarks(evaluation), soft_wrap=True)


def _cells(outcome: Outcome) -> list[str]:
    return [
        outcome.setting,
        outcome.weights,
        outcome.kv_dtype,
        f"{outcome.perplexity:.4f}",
        *_compared(outcome.against),
        f"{outcome.weight_bytes / 1e6:,.1f}",
        f"{outcome.kv_bytes_per_token:,}",
        f"{outcome.kv_tokens_per_gib:,}",
    ]


def _compared(against: Any) -> list[str]:
    if against is None:
        return ["1", "", "", "", ""]
    return [
        f"{against.perplexity_ratio:.5f}{_error(against.perplexity_ratio_error, '.5f')}",
        f"{against.kl_mean:.3g}{_error(against.kl_error, '.1g')}",
        f"{against.kl_p99:.2g}",
        f"{against.kl_max:.2g}",
        f"{against.same_top:.2%}",
    ]


def _error(value: float | None, shape: str) -> str:
    return "" if value is None else f" ±{value:{shape}}"


def _remarks(evaluation: Evaluation) -> str:
    left_out = evaluation.left_out_tokens
    lines = [
        f"{evaluation.scored_tokens:,} tokens scored in {evaluation.windows:,} windows of "
        f"{evaluation.window_tokens:,}; "
        f"{left_out:,} behind the last window of a text are left out; {evaluation.text_bytes:,} "
        "bytes of text",
        f"KL: of the next token, in nats, from {evaluation.outcomes[0].setting}, over the whole "
        "vocabulary; same top: places where both think the same token likeliest",
    ]
    if evaluation.windows == 1:
        lines.append("no standard errors: they need two windows or more")
    else:
        lines.append("±: standard error over windows")
    return "\n".join(lines)
