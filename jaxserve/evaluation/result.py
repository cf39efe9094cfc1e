"""What an evaluation has found, in numbers. Shown by ``cli/eval_table.py`` and ``plot.py``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Against:
    """One setting beside the first, over the same tokens."""

    more_nats: float
    """What a token costs more, in the mean; the logarithm of ``perplexity_ratio``."""
    more_nats_error: float | None
    """Its standard error over windows, each the difference of the same text; None of one window."""
    perplexity_ratio: float
    perplexity_ratio_error: float | None
    kl_mean: float
    """KL(first || this) of the next token, in nats."""
    kl_error: float | None
    """Standard error of the mean, over windows: places of one window are not independent."""
    kl_p99: float
    kl_max: float
    same_top: float
    """Share of places where both think the same token likeliest."""

    @classmethod
    def of(
        cls,
        more_nats: Float[np.ndarray, " windows"],
        kl: Float[np.ndarray, "windows places"],
        same: Bool[np.ndarray, "windows places"],
    ) -> Against:
        """Sums up what each window and each place said."""
        more, kl = float(np.mean(more_nats)), kl.astype(np.float64)
        error, ratio = _error(more_nats), math.exp(more)
        return cls(
            more_nats=more,
            more_nats_error=error,
            perplexity_ratio=ratio,
            perplexity_ratio_error=None if error is None else ratio * error,
            kl_mean=float(kl.mean()),
            kl_error=_error(kl.mean(axis=1)),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            same_top=float(same.mean()),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One setting."""

    setting: str
    flags: dict[str, Any]
    dtype: str
    weights: str
    """How the matrices are held: quantized formats, or the dtype."""
    kv_dtype: str
    nats_per_token: float
    perplexity: float
    against: Against | None
    """None of the first, which the others are compared with."""
    weight_bytes: int
    kv_bytes_per_token: int
    seconds: float
    """Scoring and comparing, without the launch."""

    @property
    def kv_tokens_per_gib(self) -> int:
        """Tokens of context that a GiB of pages holds."""
        return GIB // self.kv_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All settings of one model over the same texts."""

    model: str
    texts: list[str]
    text_bytes: int
    windows: int
    window_tokens: int
    scored_tokens: int
    left_out_tokens: int
    """Of the texts, that no window has."""
    outcomes: list[Outcome]

    def as_json(self) -> dict[str, Any]:
        """Returns everything, as JSON has it."""
        settings = [
            asdict(outcome) | {"kv_tokens_per_gib": outcome.kv_tokens_per_gib}
            for outcome in self.outcomes
        ]
        facts = {name: value for name, value in vars(self).items() if name != "outcomes"}
        return facts | {"settings": settings}


def _error(windows: Float[np.ndarray, " windows"]) -> float | None:
    """The standard error of a mean."""
    if len(windows) < 2:
        return None
    return float(np.std(windows, ddof=1) / math.sqrt(len(windows)))
