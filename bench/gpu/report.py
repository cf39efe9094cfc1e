"""What ``python -m bench.gpu`` leaves behind: a JSON file, its table, and two files compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
BENCH = "gpu"
HEADER = ("date", "commit", "device")


def write(document: Document, path: Path) -> None:
    """Writes the file whole or not at all: it is renewed after every part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> Document | None:
    """Returns a file that ``write`` wrote; None when it is something else."""
    try:
        document = json.loads(path.read_text())
    except ValueError:
        return None  # Several lines of JSON, as the other benchmarks write.
    return document if isinstance(document, dict) and document.get("bench") == BENCH else None


def table(document: Document) -> str:
    """Returns every number with its limit and its share of it, part by part."""
    rows = [("part", "number", "value", "unit", "limit", "share of limit")]
    notes = []
    for name, part in document["parts"].items():
        if part["status"] != "ok":
            notes.append(f"{name} {part['status']}: {part['reason']}")
        for number in part["numbers"]:
            share = number.get("share_of_limit")
            rows.append(
                (
                    name,
                    number["name"],
                    f"{number['value']:.4g}",
                    number["unit"],
                    f"{number['limit']:.4g}" if "limit" in number else "",
                    "" if share is None else f"{100 * share:.1f} %",
                )
            )
    return "\n".join([*_aligned(rows, left=(0, 1, 3)), *notes])


def compare(before: Document, after: Document) -> str:
    """Returns the numbers of two files beside each other.

    Raises:
        ValueError: one is of a dry run, or they share no number.
    """
    for document in (before, after):
        if document["dry_run"]:
            raise ValueError("a dry run measures nothing; run without --dry-run")
    left, right = dict(_numbers(before)), dict(_numbers(after))
    rows = [("part", "number", "unit", "before", "after", "after/before", "shares of limit")]
    rows += [(*key, *_beside(number, right[key])) for key, number in left.items() if key in right]
    if len(rows) == 1:
        raise ValueError("no number is in both files")
    notes = [
        f"note: {key} is {before[key]} before and {after[key]} after"
        for key in HEADER
        if before[key] != after[key]
    ]
    only = sorted({part for part, *_ in left.keys() ^ right.keys()})
    if only:
        notes.append(f"note: parts with numbers in one of them only: {', '.join(only)}")
    return "\n".join([*_aligned(rows, left=(0, 1, 2)), *notes])


def _numbers(document: Document) -> Iterator[tuple[tuple[str, str, str], Mapping[str, Any]]]:
    for name, part in document["parts"].items():
        for number in part["numbers"]:
            yield (name, number["name"], number["unit"]), number


def _beside(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str, str, str]:
    ratio = f"{after['value'] / before['value']:.3f}" if before["value"] else "-"
    key = "share_of_limit"
    shares = [f"{100 * number[key]:.1f} %" for number in (before, after) if key in number]
    told = " -> ".join(shares) if len(shares) == 2 else ""
    return f"{before['value']:.4g}", f"{after['value']:.4g}", ratio, told


def _aligned(rows: Sequence[tuple[str, ...]], *, left: Sequence[int]) -> list[str]:
    """Pads columns to one width; those not in ``left`` end at the right."""
    columns = range(len(rows[0]))
    widths = [max(len(row[column]) for row in rows) for column in columns]
    return [
        "  ".join(
            f"{row[c]:<{widths[c]}}" if c in left else f"{row[c]:>{widths[c]}}" for c in columns
        ).rstrip()
        for row in rows
    ]
