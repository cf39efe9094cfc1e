"""Compares each kernel with its reference, then times it: one JSON line per case.

    python -m bench.kernels --device gpu [--kernels paged_attention] [--budget-s 60] [--search]
    python -m bench.kernels --device gpu --dry-run

A case whose answers are off is printed with its error and not timed. The others' microseconds are
the median, and the fastest and slowest, of loops of many calls in one program, which go round the
layers of a pool or stack larger than the second-level cache: its pages and matrices come from
memory. ``share`` is of what bytes over the copy bandwidth, or FLOPs over the rate of a large
bfloat16 product, would take at least; both are measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bench import common
from bench.gpu.device import ceilings
from bench.gpu.part import Setting
from bench.hopper import search
from bench.hopper.kernels import KernelCase, grid
from bench.hopper.measure import interpreted, measure
from pallas_kernels import mosaic

KERNELS = ("paged_attention", "quantized_matmul", "rope_append")


def main(words: Sequence[str] | None = None) -> int:
    """Runs what the arguments select; returns the exit code: 1 if answers were off."""
    arguments = _parse(words)
    dry = arguments.dry_run
    with interpreted() if dry else contextlib.nullcontext():
        if reason := mosaic.why_not():
            print(f"{reason}; try --dry-run", file=sys.stderr)
            return 2
    rates = rates_here(dry=dry)
    kind = jax.devices()[0].device_kind
    origin = {"device": kind, "dry_run": dry, "commit": common.commit()} | rates
    wrong = 0
    for kernel in arguments.kernels:
        cases = [case for case in grid(kernel, dry=dry) if arguments.only in str(case.label)]
        ends_s = time.monotonic() + arguments.budget_s
        work = partial(search.lines, kind=kind, folder=arguments.configs)
        each = work if arguments.search else measurements
        for line in each(kernel, cases, rates, ends_s, dry=dry):
            wrong += "wrong" in line
            text = json.dumps(line | origin)
            print(text, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(text + "\n")
    return int(wrong > 0)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels --device gpu", description="Measures the kernels for Hopper."
    )
    parser.add_argument(
        "--kernels", type=_kernels, default=KERNELS, metavar="NAMES", help=", ".join(KERNELS)
    )
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--budget-s", type=float, default=60.0, help="for each kernel")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases, interpreted on a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines there as well")
    parser.add_argument("--search", action="store_true", help="try tilings and record the fastest")
    parser.add_argument(
        "--configs",
        type=Path,
        default=search.FOLDER,
        metavar="FOLDER",
        help="where a search writes KERNEL/configs.json (default: where kernels read it)",
    )
    arguments = parser.parse_args(words)
    if arguments.budget_s <= 0:
        parser.error(f"--budget-s is {arguments.budget_s:g}; give seconds above 0")
    if arguments.dry_run and arguments.search and arguments.configs == search.FOLDER:
        parser.error("--dry-run would record times that mean nothing; give --configs FOLDER")
    return arguments


def _kernels(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(KERNELS):
        raise argparse.ArgumentTypeError(
            f"there is no kernel {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}"
        )
    return names


def measurements(
    kernel: str, cases: Sequence[KernelCase], rates: dict[str, float], ends_s: float, *, dry: bool
) -> Iterator[dict[str, Any]]:
    """Yields a line for each case, and one that says how many the budget left out."""
    for done, case in enumerate(cases):
        if time.monotonic() > ends_s:
            yield {"kernel": kernel, "left_out": len(cases) - done}
            return
        yield {"kernel": kernel, **case.label} | measure(case, rates, dry=dry)


def rates_here(*, dry: bool) -> dict[str, float]:
    """What a copy and a large product reach here, now."""
    kind = jax.devices()[0].device_kind
    setting = Setting(
        dry=dry, device_kind=kind, cache_dir=Path(), traces=None, ends_s=time.time() + 60
    )
    found = {number.name: number.value for number in ceilings(setting)}
    return {
        "copy_bytes_per_s": found["copy on the device"] * 1e9,
        "flops_per_s": found["product bfloat16"] * 1e12,
    }
