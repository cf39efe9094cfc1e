"""Tries tilings of a kernel and records the fastest for each of its problems.

A problem is what the kernel's own lookup asks for: shapes and formats, not how long contexts are.
The rule's tiling comes first, so that a search which runs out of time never records a worse one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.hopper.kernels import FLOAT, Attention, KernelCase, Product
from bench.hopper.measure import measure, reference
from pallas_kernels.paged_attention import mosaic_config as attention
from pallas_kernels.quantized_matmul import mosaic_config as matmul
from pallas_kernels.quantized_matmul.formats import spec

FOLDER = Path(attention.__file__).parents[1]
DRY_CANDIDATES = 2
FREE = {"blocks", "programs"}
"""Fields that follow from the device."""


def lines(
    kernel: str,
    cases: Sequence[KernelCase],
    rates: dict[str, float],
    ends_s: float,
    *,
    dry: bool,
    kind: str,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Searches for each problem of some cases, and yields a line for each.

    Args:
        kernel: Whose cases they are.
        cases: The first of a problem stands for it.
        rates: Of a copy and a large product.
        ends_s: On the monotonic clock. Problems have equal shares of what is left.
        dry: Whether kernels are interpreted.
        kind: Of device, as it calls itself.
        folder: Where ``KERNEL/configs.json`` is written, after each problem.
    """
    chosen: dict[str, KernelCase] = {}
    for case in cases:
        if type(case) in PROBLEMS:
            chosen.setdefault(PROBLEMS[type(case)](case).key, case)
    for number, (key, case) in enumerate(chosen.items()):
        left_s = ends_s - time.monotonic()
        if left_s <= 0:
            yield {"kernel": kernel, "left_out": len(chosen) - number}
            return
        until_s = time.monotonic() + left_s / (len(chosen) - number)
        best, line = _fastest(case, rates, until_s, dry=dry)
        if best is not None:
            recorded = {name: n for name, n in asdict(best).items() if name not in FREE}
            record(folder / kernel / "configs.json", kind, key, recorded)
            line["config"] = recorded
        yield {"kernel": kernel, "key": key, **case.label, **line}


def _fastest(
    case: KernelCase, rates: dict[str, float], until_s: float, *, dry: bool
) -> tuple[Any, dict[str, Any]]:
    """Tries the rule's tiling, then others in random order, as long as there is time."""
    rule, *others = CANDIDATES[type(case)](case)
    shuffled = [others[i] for i in np.random.default_rng(0).permutation(len(others))]
    best, fastest, tried, wrong = None, None, 0, []
    expected = reference(case, case.state())
    for config in [rule, *shuffled][: DRY_CANDIDATES if dry else None]:
        if tried and time.monotonic() > until_s:
            break
        tried += 1
        found = measure(case, rates, dry=dry, config=config, expected=expected)
        if "wrong" in found:
            wrong.append(f"{config}: {found['wrong']}")
        elif fastest is None or found["microseconds"] < fastest["microseconds"]:
            best, fastest = config, found
    line = {"tried": tried, "of": 1 + len(others), **(fastest or {})}
    return best, line | ({"wrong": wrong} if wrong else {})


def record(path: Path, kind: str, key: str, config: dict[str, int]) -> None:
    """Puts one tiling into a family's file, beside whatever is there."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(kind, {})[key] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def attention_problem(case: Attention) -> attention.Problem:
    """What the kernel will look up."""
    shape = case.case
    return attention.Problem(
        head_dim=shape.head_dim,
        group=shape.q_heads // shape.kv_heads,
        page_tokens=shape.page_tokens,
        pages=case.dtype,
        one_query=not shape.is_ragged and shape.query_tokens == 1,
    )


def attention_candidates(case: Attention) -> list[attention.Config]:
    """Every tiling that the kernel takes, the rule's first."""
    problem = attention_problem(case)
    rule = attention.rule(problem)
    sizes = product((1, 2), (64, 128), range(2, 9), (1, 2))
    others = [
        replace(rule, tiles=tiles, tile_keys=keys, stages=stages, query_stages=query_stages)
        for tiles, keys, stages, query_stages in sizes
    ]
    return [rule, *(c for c in others if c != rule and problem.why_not(c) is None)]


def product_problem(case: Product) -> matmul.Problem:
    """What the kernel will look up."""
    its = spec(case.format)
    values = np.dtype("int4") if its.kind == "int4" else its.value_dtype
    activations = np.dtype("float16") if its.kind == "fp8" else FLOAT
    if case.narrow and case.can_round:
        activations = values
    return matmul.Problem(
        rows=case.rows,
        outs=case.out,
        depth=case.depth,
        groups=case.depth // (its.group or case.depth),
        values=values,
        activations=activations,
        has_minimum=its.kind == "int4",
        scale=its.scale_dtype,
    )


def product_candidates(case: Product) -> list[matmul.Config]:
    """Every way to cut it, the rule's first; few rows must fit with any number of them."""
    problem = product_problem(case)
    rule, few = matmul.choose(problem), problem.is_few
    most = replace(problem, rows=matmul.FEW) if few else problem
    sizes = product(
        matmul.DEPTHS,
        (1,) if few else (1, 2),
        matmul.CHAINS if few else (1,),
        range(1, matmul.MOST_PARTS + 1),
        range(2, matmul.MOST_STAGES + 1),
    )
    others = [
        replace(rule, depth=depth, rows=rows, chains=chains, parts=parts, stages=stages)
        for depth, rows, chains, parts, stages in sizes
    ]
    widest = matmul.FEW_TOKENS[-1] if few else rule.tokens
    return [
        rule,
        *(c for c in others if c != rule and most.why_not(replace(c, tokens=widest)) is None),
    ]


PROBLEMS: dict[type, Callable[[Any], Any]] = {
    Attention: attention_problem,
    Product: product_problem,
}
CANDIDATES: dict[type, Callable[[Any], list[Any]]] = {
    Attention: attention_candidates,
    Product: product_candidates,
}
