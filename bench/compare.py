"""Prints two results of ``bench.offline``, ``bench.serving`` or ``bench.gpu`` side by side.

    python -m bench.compare BEFORE AFTER

Of the first two: medians over the lines of a workload, as ratios. Refuses to compare what is not
the same question (another workload, seed, model or load) or was not asked on the same machine, and
answers that were short. Of ``bench.gpu``, what may differ is said below the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import report
from bench.machine import NOISE_CORES

Line = Mapping[str, Any]

METRICS = (
    "output_tokens_per_s",
    "ttft_ms.p50",
    "ttft_ms.p99",
    "itl_ms.p50",
    "itl_ms.p99",
    "phases_ms.plan",
    "phases_ms.pack",
    "phases_ms.dispatch",
    "phases_ms.wait",
    "phases_ms.publish",
    "padding_waste",
)
MACHINE = ("cpu", "cores", "memory_gb", "device", "has_amx")
"""What must agree. Measured rates are only warned about: they move with the neighbours."""
RATES = ("read_gb_per_s", "f32_tflop_per_s", "bf16_tflop_per_s")
RATE_DRIFT = 0.15


class IncomparableError(ValueError):
    """The two results do not answer the same question."""


def main(words: Sequence[str] | None = None) -> None:
    """Prints the comparison; exits with 1 when there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description="Two results side by side, as ratios."
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args(words)
    try:
        text = _compared(arguments.before, arguments.after)
    except IncomparableError as error:
        print(f"NOT COMPARABLE: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(text)


def _compared(before: Path, after: Path) -> str:
    left, right = report.read(before), report.read(after)
    if left is None and right is None:
        return compare(read(before), read(after))
    if left is None or right is None:
        raise IncomparableError(f"only one of {before} and {after} is a result of bench.gpu")
    try:
        return report.compare(left, right)
    except ValueError as error:
        raise IncomparableError(str(error)) from error


def read(path: Path) -> list[Line]:
    """Reads the lines of a result.

    Raises:
        IncomparableError: there are none, or one says that its answers were short.
    """
    lines = [json.loads(text) for text in path.read_text().splitlines() if text.strip()]
    if not lines:
        raise IncomparableError(f"{path} holds no lines")
    for line in lines:
        if "workload" not in line:
            raise IncomparableError(f"{path} holds a line without a workload: {list(line)}")
        if "short" in line:
            raise IncomparableError(
                f"{path}: {line['workload']['name']} was short ({line['short']}); run it again"
            )
    return lines


def compare(before: Sequence[Line], after: Sequence[Line]) -> str:
    """Returns the table.

    Raises:
        IncomparableError: the workloads or the machines differ.
    """
    left, right = _by_workload(before), _by_workload(after)
    shared = [name for name in left if name in right]
    if not shared:
        raise IncomparableError(f"no workload is in both: {sorted(left)} and {sorted(right)}")
    rows = [("workload", "metric", "before", "after", "after/before")]
    notes: list[str] = []
    for name in shared:
        _check_same(name, left[name][0], right[name][0])
        notes += _notes(name, left[name], right[name])
        rows += _rows(name, left[name], right[name])
    only = sorted(left.keys() ^ right.keys())
    if only:
        notes.append(f"in one of them only: {', '.join(only)}")
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  "
        + "  ".join(f"{row[column]:>{widths[column]}}" for column in (2, 3, 4))
        for row in rows
    ]
    return "\n".join([*table, *(f"note: {note}" for note in notes)])


def _by_workload(lines: Sequence[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["workload"]["name"], []).append(line)
    for name, group in groups.items():
        for line in group[1:]:
            _check_same(f"{name}, within one file", group[0], line)
            for key in ("door", "precision"):
                if line[key] != group[0][key]:
                    raise IncomparableError(
                        f"{name}: one file mixes {key} {group[0][key]} and {line[key]}"
                    )
    return groups


def _check_same(name: str, left: Line, right: Line) -> None:
    pairs = [("workload", key, left["workload"], right["workload"]) for key in left["workload"]]
    pairs += [("machine", key, left["machine"], right["machine"]) for key in MACHINE]
    differences = [
        f"{kind} {key} is {a.get(key)!r} and {b.get(key)!r}"
        for kind, key, a, b in pairs
        if a.get(key) != b.get(key)
    ]
    if differences:
        raise IncomparableError(f"{name}: {'; '.join(differences)}")


def _notes(name: str, left: Sequence[Line], right: Sequence[Line]) -> list[str]:
    notes = [
        f"{name}: {key} {left[0][key]} before, {right[0][key]} after"
        for key in ("door", "precision", "versions")
        if left[0][key] != right[0][key]
    ]
    for key in RATES:
        before, after = _median(left, f"machine.{key}"), _median(right, f"machine.{key}")
        if abs(after - before) > RATE_DRIFT * before:
            notes.append(f"{name}: the machine's {key} was {before:g} before and {after:g} after")
    for when, lines in (("before", left), ("after", right)):
        cores = max(line["machine"]["other_cores"] or 0.0 for line in lines)
        if cores > NOISE_CORES:
            notes.append(f"{name}: {when}, others used {cores:g} cores; run it again")
        compiles = max(line["compiles_after_ready"] for line in lines)
        if compiles:
            notes.append(f"{name}: {when}, {compiles} programs were compiled after ready")
    return notes


def _rows(
    name: str, left: Sequence[Line], right: Sequence[Line]
) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for metric in METRICS:
        before, after = _median(left, metric), _median(right, metric)
        ratio = f"{after / before:.3f}" if before else "-"
        rows.append((name, metric, f"{before:.4g}", f"{after:.4g}", ratio))
    return rows


def _median(lines: Sequence[Line], metric: str) -> float:
    key, _, inner = metric.partition(".")
    return statistics.median(line[key][inner] if inner else line[key] for line in lines)


if __name__ == "__main__":
    main()
