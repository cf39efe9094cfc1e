"""Reads what became of a GPU kernel: what ptxas, the disassembler and XLA say about it."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
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
        if kernel["spill_bytes"] > case.most_spill_bytes:
            wrong.append(f"{kernel['name']} spills {kernel['spill_bytes']} bytes")
        if kernel["stack_bytes"] > case.most_spill_bytes:
            # Also of arrays whose index is not known when it is compiled, which are no spills.
            wrong.append(f"{kernel['name']} has a stack of {kernel['stack_bytes']} bytes")
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
    """Reads what Mosaic wrote about each kernel that it compiled.

    Raises:
        ValueError: A line that must be there is not: nothing is known then, least of all that a
            kernel does not spill.
    """
    kernels = []
    for path in sorted(dump.glob("*.ptxas")):
        text = path.read_text()
        resources = path.with_suffix(".resources.txt").read_text()
        code = path.with_suffix(".sass_ctrl").read_text()
        number = partial(_number, path.name)
        counted = Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", code))
        shown = (*TENSOR_CORES, *BULK_COPIES, "LDGSTS")
        kernels.append(
            {
                "name": path.stem.rsplit("_", 1)[0],
                "registers": number(r"Used (\d+) registers", text),
                "stack_bytes": number(r"(\d+) bytes stack frame", text),
                "spill_bytes": number(r"(\d+) bytes spill stores", text)
                + number(r"(\d+) bytes spill loads", text),
                "spills_between_products": _spills_between_products(code),
                "shared_bytes": number(r"smem_scratch_bytes=(\d+)", resources),
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
        "the disassembler say of sm_90a code. Spills are bytes of registers that are stored and",
        "loaded, never between the first and the last product. Bulk copies are those of TMA;",
        "launches are of the whole compiled program, XLA's own included.",
        "",
        "| Case | Kernel | Registers | Spills | Shared memory | Tensor cores | Bulk copies "
        "| Launches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for kernel in row["kernels"]:
            cells = (
                name,
                kernel["name"],
                str(kernel["registers"]),
                str(kernel["spill_bytes"]),
                f"{kernel['shared_bytes'] / 1024:.0f} KiB",
                _counts(kernel["instructions"], TENSOR_CORES),
                _counts(kernel["instructions"], BULK_COPIES),
                str(sum(row["launches"].values())),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(name: str, pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"what is written of {name} has no {pattern!r}: {text[:300]!r}")
    return int(found[1])


def _counts(counted: dict[str, int], names: tuple[str, ...]) -> str:
    return ", ".join(f"{counted[name]} {name}" for name in names if name in counted) or "none"


def loop_launches(program: str) -> dict[str, int]:
    """Counts what one turn of the loop over layers launches, by kind.

    The loop's body is the computation that calls Mosaic kernels.

    Raises:
        ValueError: There is none.
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


def more_than(row: dict[str, Any], most_launches: int, most_temporary_bytes: int) -> list[str]:
    """Says what a compiled step takes more of than it may.

    Args:
        row: Its record.
        most_launches: Of one turn of the loop over layers.
        most_temporary_bytes: Of the step, on each device.
    """
    wrong = []
    launches, temporary_bytes = row["launches_of_a_layer"], row["temporary_bytes"]
    if sum(launches.values()) > most_launches:
        wrong.append(f"a layer launches {launches}, and {most_launches} in all are allowed")
    if temporary_bytes > most_temporary_bytes:
        wrong.append(
            f"{temporary_bytes} bytes of temporaries, and {most_temporary_bytes} are allowed"
        )
    return wrong


def large_copies(program: str, least_bytes: int) -> list[tuple[int, str]]:
    """Finds what one turn of the loop over layers copies, and how many bytes.

    Those are copies, and slices that are written out; a slice within a product is none.

    Raises:
        ValueError: There is no such loop, or a number's size is not known.
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
NUMBER_BITS = {"token": 0, "s4": 4, "u4": 4, "pred": 8, "s8": 8, "u8": 8, "f8e4m3fn": 8}
NUMBER_BITS |= {"f8e5m2": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32, "s32": 32}
NUMBER_BITS |= {"u32": 32, "f64": 64, "s64": 64, "u64": 64}
"""As the compiled programs of a GPU hold them: two numbers of 4 bits share a byte."""


def _layer_loop(program: str) -> list[str]:
    """The lines of the computation that calls Mosaic kernels, the entry apart."""
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        if not computation.startswith("ENTRY") and MOSAIC in computation:
            return computation.splitlines()
    raise ValueError("no loop over layers calls a Mosaic kernel: there is nothing to check")


def _bytes(type: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]", type):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        if dtype not in NUMBER_BITS:
            raise ValueError(f"it is not known how many bits a {dtype} has, in {type}")
        total += -(-count * NUMBER_BITS[dtype] // 8)
    return total
