"""Reads what became of a GPU kernel: what ptxas, the disassembler and XLA say about it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from pallas_kernels.compiling import BULK_COPIES, TENSOR_CORES, CompileCase

FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"}
"""Instructions of a compiled program that launch nothing."""


def faults_of(case: CompileCase, row: dict[str, Any], donated_bytes: int) -> list[str]:
    """Says what is wrong with a compiled case."""
    wrong = []
    if not row["kernels"]:
        wrong.append("there is no Mosaic kernel in it, or another case has the same")
    wrong += [
        f"{kernel['name']} spills {kernel['spill_bytes']} bytes"
        for kernel in row["kernels"]
        if kernel["spill_bytes"] or kernel["stack_bytes"]
    ]
    used = Counter[str]()
    for kernel in row["kernels"]:
        used.update(kernel["instructions"])
    wrong += [f"no {name} is left" for name in case.instructions if not used[name]]
    if row["aliased_bytes"] < donated_bytes:
        wrong.append(f"{row['aliased_bytes']} of {donated_bytes} donated bytes stay in place")
    if donated_bytes and row["temporary_bytes"] >= donated_bytes:
        wrong.append(f"{row['temporary_bytes']} bytes of temporaries: is a pool copied?")
    if case.most_launches is not None and sum(row["launches"].values()) > case.most_launches:
        wrong.append(f"launches {row['launches']}, and {case.most_launches} in all are allowed")
    return wrong


def kernels_of(dump: Path) -> list[dict[str, Any]]:
    """Reads what Mosaic wrote about each kernel that it compiled."""
    kernels = []
    for path in sorted(dump.glob("*.ptxas")):
        text = path.read_text()
        resources = path.with_suffix(".resources.txt").read_text()
        code = path.with_suffix(".sass_ctrl").read_text()
        counted = Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", code))
        shown = (*TENSOR_CORES, *BULK_COPIES, "LDGSTS")
        kernels.append(
            {
                "name": path.stem.rsplit("_", 1)[0],
                "registers": _number(r"Used (\d+) registers", text),
                "stack_bytes": _number(r"(\d+) bytes stack frame", text),
                "spill_bytes": _number(r"(\d+) bytes spill stores", text)
                + _number(r"(\d+) bytes spill loads", text),
                "shared_bytes": _number(r"smem_scratch_bytes=(\d+)", resources),
                "instructions": {name: counted[name] for name in shown if counted[name]},
            }
        )
    return kernels


def launches_of(program: str) -> dict[str, int]:
    """Counts what the entry of a compiled program launches, by opcode; loops count as one."""
    entry = program[program.index("\nENTRY ") :]
    # `%name = type opcode(`; a type may be a tuple.
    found = re.findall(r"^\s+(?:ROOT )?%\S+ = (?:\([^)]*\)|\S+) ([a-z][a-z-]*)\(", entry, re.M)
    return dict(sorted(Counter(op for op in found if op not in FREE).items()))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the record as a table of Markdown."""
    lines = [
        "# GPU kernels, compiled for an H200",
        "",
        "Written by `make prove-compile ARGS=--record`, on a machine without a GPU: what ptxas and",
        "the disassembler say of sm_90a code. No kernel spills. Bulk copies are what hardware copies",
        "alone (TMA); launches are those of the whole compiled program, XLA's own included.",
        "",
        "| Case | Kernel | Registers | Shared memory | Tensor cores | Bulk copies | Launches |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for kernel in row["kernels"]:
            cells = (
                name,
                kernel["name"],
                str(kernel["registers"]),
                f"{kernel['shared_bytes'] / 1024:.0f} KiB",
                _counts(kernel["instructions"], TENSOR_CORES),
                _counts(kernel["instructions"], BULK_COPIES),
                str(sum(row["launches"].values())),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _counts(counted: dict[str, int], names: tuple[str, ...]) -> str:
    return ", ".join(f"{counted[name]} {name}" for name in names if name in counted) or "none"
