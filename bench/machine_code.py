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
    for kernel in row["kernels"]:
        if max(kernel["spill_bytes"], kernel["stack_bytes"]) > case.most_spill_bytes:
            wrong.append(f"{kernel['name']} spills {kernel['spill_bytes']} bytes")
        if kernel["spills_between_products"]:
            wrong.append(f"{kernel['name']} spills between its products")
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
                "spills_between_products": _spills_between_products(code),
                "shared_bytes": _number(r"smem_scratch_bytes=(\d+)", resources),
                "instructions": {name: counted[name] for name in shown if counted[name]},
            }
        )
    return kernels


def _spills_between_products(code: str) -> int:
    """Counts what is spilled, or read back, between the first and the last tensor instruction."""
    lines = code.splitlines()
    is_product = re.compile(rf"\b(?:{'|'.join(TENSOR_CORES)})\b")
    products = [number for number, line in enumerate(lines) if is_product.search(line)]
    if not products:
        return 0
    between = lines[products[0] : products[-1]]
    return sum(bool(re.search(r"\b(?:STL|LDL)\b", line)) for line in between)


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
        "the disassembler say of sm_90a code. No kernel spills. Bulk copies are those of TMA;",
        "launches are of the whole compiled program, XLA's own included.",
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


def loop_launches(program: str) -> dict[str, int]:
    """Counts what one turn of the loop over layers launches, by kind.

    The loop's body is the computation that calls Mosaic kernels; without one, nothing is counted.
    """
    counted = Counter[str]()
    for line in _layer_loop(program):
        found = INSTRUCTION.match(line)
        if found is None or (op := found["op"]) in FREE or op.endswith("-done"):
            continue
        if op == "custom-call":
            op = "Mosaic kernel" if MOSAIC in line else "product"
        elif op == "fusion" and "dynamic_slice_fusion" in found["name"] and "kCustom" in line:
            op = "product"  # Of a matrix where it lies in its stack.
        counted[op.removesuffix("-start")] += 1
    return dict(sorted(counted.items()))


def large_copies(program: str, least_bytes: int) -> list[tuple[int, str]]:
    """Finds what one turn of the loop over layers copies, and how many bytes.

    Those are copies, and slices that are written out; a slice within a product is none.
    """
    copies = []
    for line in _layer_loop(program):
        found = INSTRUCTION.match(line)
        if found is None or "kCustom" in line:
            continue
        if found["op"] == "copy" or SLICES.match(found["name"]):
            size = _bytes(found["type"])
            if size >= least_bytes:
                copies.append((size, line.strip()[:120]))
    return copies


MOSAIC = 'custom_call_target="mosaic_gpu'
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\([^=]*?\)|\S+) (?P<op>[a-z][a-z-]*)\("
)
SLICES = re.compile(r"^(?:loop_|input_|wrapped_)?(?:dynamic[-_]slice|slice|copy)")
NUMBER_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s16": 2}


def _layer_loop(program: str) -> list[str]:
    """The lines of the computation that calls Mosaic kernels, the entry apart."""
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        if not computation.startswith("ENTRY") and MOSAIC in computation:
            return computation.splitlines()
    return []


def _bytes(type: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]", type):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * NUMBER_BYTES.get(dtype, 4)
    return total
