"""An evaluation as a picture: perplexity ratio and KL of each setting, as an SVG of its own.

Written by hand, since a plotting library would be the heaviest thing that evaluation needs. Both
axes are logarithmic; whiskers are standard errors, and a dot is the 99th percentile of KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from jaxserve.evaluation.result import Against, Evaluation

WIDTH, ROW, TOP, BOTTOM = 940, 34, 84, 62
LEFT, PANEL, GAP = 150, 330, 90
BLUE, ORANGE, GREY, INK = "#3b6fb6", "#d9822b", "#d7dbe0", "#22262b"
MOST_TICKS = 6
LABEL = 62
"""Pixels that the widest label takes."""


def svg(evaluation: Evaluation) -> str:
    """Returns the picture; the first setting is the line that others are measured from."""
    compared = [(each.setting, each.against) for each in evaluation.outcomes if each.against]
    base = evaluation.outcomes[0]
    height = TOP + ROW * max(1, len(compared)) + BOTTOM
    title = f"{evaluation.model}: what settings cost beside {base.setting}"
    about = (
        f"{evaluation.scored_tokens:,} tokens in windows of {evaluation.window_tokens:,}; "
        f"{base.setting} has perplexity {base.perplexity:.4g} "
        f"(weights {base.weights}, cache {base.kv_dtype})"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(20, 26, title, size=16, weight="bold"),
        _text(20, 46, about, size=12),
    ]
    if not compared:
        return "\n".join([*parts, _text(20, TOP + 20, "nothing was compared"), "</svg>\n"])
    parts += [_text(LEFT - 10, _middle(row) + 4, name, "end") for row, (name, _) in _rows(compared)]
    parts += _ratios([against for _, against in compared], LEFT)
    parts += _divergences([against for _, against in compared], LEFT + PANEL + GAP)
    foot = "whiskers: standard error over windows; dot: 99th percentile"
    parts.append(_text(WIDTH - 20, height - 12, foot, "end", size=11))
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class _Axis:
    """A panel's values, as logarithms, to pixels."""

    x: int
    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value is; what is beyond the axis is at its end."""
        inside = min(max(value, self.low), self.high)
        return self.x + PANEL * (inside - self.low) / (self.high - self.low)


def _ratios(compared: Sequence[Against], x: int) -> list[str]:
    ends = [0.0]
    for each in compared:
        error = each.more_nats_error or 0.0
        ends += [each.more_nats - error, each.more_nats + error]
    room = 0.12 * (max(ends) - min(ends)) or 1e-3
    axis = _Axis(x, min(ends) - room, max(ends) + 2 * room)
    parts = _panel("perplexity ratio", axis, len(compared), _ratio_ticks(axis))
    for row, each in _rows(compared):
        error = each.more_nats_error or 0.0
        whisker = (each.more_nats - error, each.more_nats + error)
        parts += _bar(axis, row, (0.0, each.more_nats), whisker, BLUE)
        end = max(axis.at(0.0), *map(axis.at, whisker))
        parts.append(_text(end + 6, _middle(row) + 4, f"{each.perplexity_ratio:.5g}", size=11))
    zero = axis.at(0.0)
    bottom = TOP + ROW * len(compared)
    return [*parts, f'<path d="M{zero:.1f} {TOP}V{bottom}" stroke="{INK}"/>']


def _divergences(compared: Sequence[Against], x: int) -> list[str]:
    found = [value for each in compared for value in (each.kl_mean, each.kl_p99) if value > 0]
    lowest = math.floor(math.log10(min(found)) - 0.3) if found else -6
    highest = math.ceil(math.log10(max(found)) + 0.3) if found else 0
    low = float(lowest)
    axis = _Axis(x, low, float(highest))
    step = -(-(highest - lowest) // MOST_TICKS)
    ticks = [(float(power), f"1e{power}") for power in range(lowest, highest + 1, step)]
    parts = _panel("mean KL of the next token, nats", axis, len(compared), ticks)
    log = _log10_from(low)
    for row, each in _rows(compared):
        error = each.kl_error or 0.0
        whisker = (log(each.kl_mean - error), log(each.kl_mean + error))
        parts += _bar(axis, row, (low, log(each.kl_mean)), whisker, ORANGE)
        p99 = axis.at(log(each.kl_p99))
        if each.kl_p99 > 0:
            parts.append(f'<circle cx="{p99:.1f}" cy="{_middle(row)}" r="3.5" fill="{INK}"/>')
        end = axis.at(whisker[1]) + 7
        if end - 7 < p99 < end + LABEL:
            end = p99 + 7
        parts.append(_text(end, _middle(row) + 4, f"{each.kl_mean:.2g}", size=11))
    return parts


def _panel(title: str, axis: _Axis, rows: int, ticks: Sequence[tuple[float, str]]) -> list[str]:
    bottom = TOP + ROW * rows
    parts = [_text(axis.x, TOP - 12, title, weight="bold")]
    for value, label in ticks:
        at = axis.at(value)
        parts.append(f'<path d="M{at:.1f} {TOP}V{bottom + 4}" stroke="{GREY}"/>')
        parts.append(_text(at, bottom + 18, label, "middle", size=11))
    return parts


def _bar(
    axis: _Axis, row: int, bar: tuple[float, float], whisker: tuple[float, float], color: str
) -> list[str]:
    left, right = sorted(map(axis.at, bar))
    low, high = map(axis.at, whisker)
    y, middle = _middle(row) - 9, _middle(row)
    return [
        f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="18" fill="{color}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10'
        f'M{high:.1f} {middle - 5}v10" stroke="{INK}" fill="none"/>',
    ]


def _ratio_ticks(axis: _Axis) -> list[tuple[float, str]]:
    """Round ratios within the axis: evenly spaced while they are near 1, else 1, 2, 5, 10, ..."""
    low, high = math.exp(axis.low), math.exp(axis.high)
    if high / low > 4:
        ratios = [base * 10.0**power for power in range(-9, 10) for base in (1, 2, 5)]
        inside = [ratio for ratio in ratios if low <= ratio <= high]
        ratios = inside[:: -(-len(inside) // MOST_TICKS)]
    else:
        rough = (high - low) / MOST_TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
        first, last = math.ceil((low - 1) / step), math.floor((high - 1) / step)
        ratios = [1 + step * count for count in range(first, last + 1)]
    return [(math.log(ratio), f"{ratio:.6g}") for ratio in ratios]


def _log10_from(low: float) -> Callable[[float], float]:
    return lambda value: math.log10(value) if value > 0 else low


def _rows[T](items: Sequence[T]) -> list[tuple[int, T]]:
    return list(enumerate(items))


def _middle(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _text(
    x: float | int,
    y: float | int,
    text: str,
    anchor: str = "start",
    *,
    size: int = 13,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
