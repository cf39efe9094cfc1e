"""Splits the time of a decode step by part, beside what the machine could do at best.

    python -m bench.step --model smollm2 [--rows 64] [--context 300] [--out FILE]

So many requests are decoded by the engine that serves; while all of them are in flight JAX's
profiler notes when each operation of the program began and ended. An operation's own time (without
what runs inside it) goes to the part of the model that its name scope says. Bytes and FLOPs are
those that the part has to read and compute, not what some implementation does; the limit is the
larger of the two over the machine's rates, which ``bench.machine`` measures just before.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData

from bench import common, machine
from bench.asking import Asking
from bench.offline import add_engine_flags
from bench.workloads import Ask
from jaxserve.cli.flags import field_values
from jaxserve.config import ServeConfig
from jaxserve.launch import Service, build
from jaxserve.progress import show_to_person

PARTS = {
    "embed": "embed",
    "attn_norm": "norms and rope",
    "ffn_norm": "norms and rope",
    "final_norm": "norms and rope",
    "rope_table": "norms and rope",
    "rope": "norms and rope",
    "qkv": "qkv",
    "append": "append",
    "paged_attention": "attention",
    "o": "o",
    "ffn": "feed-forward",
    "head": "head",
    "sample": "sample",
}
"""The part that a name scope belongs to; of nested scopes the innermost that stands here counts."""
OTHER = "other"
WEIGHTS = {"qkv": ("w_qkv",), "o": ("w_o",), "feed-forward": ("w_gate_up", "w_down")}
"""A layer's matrices, by part."""
WARM_STEPS, TRACED_STEPS, MAX_STEPS = 10, 12, 200
TIMEOUT_S = 240.0
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
"""Of XLA's text: a name, and the name scopes that JAX was in."""


@dataclass(frozen=True)
class Need:
    """What a part of one step has to do at least."""

    flops: float
    read_bytes: float


def main(words: Sequence[str] | None = None) -> None:
    """Measures one step and prints a table; the JSON line is for comparing."""
    arguments = _parser().parse_args(words)
    facts = machine.measured()
    options = field_values(arguments, ServeConfig)
    options["ready_with"] = "all"  # Nothing is compiled beside what is measured.
    with show_to_person(None) as report:
        service = build(ServeConfig(**options), report)
    with service:
        times_ms, step_ms = _measure(service, arguments.rows, arguments.context)
        needs = _needs(service, arguments.rows, arguments.context)
    line = {
        "workload": {
            "model": service.info.name,
            "rows": arguments.rows,
            "context_tokens": arguments.context,
        },
        "precision": service.info.precision,
        "step_ms": round(step_ms, 3),
        "program_ms": round(sum(times_ms.values()), 3),
        "parts": {
            part: _entry(times_ms.get(part, 0.0), needs.get(part), facts)
            for part in dict.fromkeys((*PARTS.values(), OTHER))
        },
        "commit": common.commit(),
        "machine": facts,
    }
    common.write(line, arguments.out)
    common.say(_table(line))


def _measure(service: Service, rows: int, context: int) -> tuple[Counter[str], float]:
    """Returns each part's milliseconds a step, and the whole step's as the engine paces it."""
    prompt_tokens = context - WARM_STEPS - TRACED_STEPS // 2
    generator = np.random.default_rng(0)
    ids = generator.integers(10, service.info.vocab_size - 10, (rows, prompt_tokens))
    asks = [Ask(prompt=line, output_tokens=MAX_STEPS) for line in ids.tolist()]
    asking = Asking(service.text, asks, "step", arrivals_s=[0.0] * rows)
    asked = threading.Thread(target=asking.run, daemon=True)
    asked.start()
    stats = service.engine.stats
    end_s = time.monotonic() + TIMEOUT_S
    target = stats().prompt_tokens_total + rows * prompt_tokens
    while stats().prompt_tokens_total < target or stats().requests_waiting:
        if time.monotonic() > end_s or not asked.is_alive():
            raise SystemExit("the requests ended before all of them were decoded together")
        time.sleep(0.002)
    _pass_steps(service, WARM_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step_ms, steps = _pass_steps(service, TRACED_STEPS)
        if stats().rows_running < rows:
            raise SystemExit(f"answers of {MAX_STEPS} tokens ended before they were measured")
        (file,) = Path(folder).rglob("*.xplane.pb")
        times = _own_times(ProfileData.from_file(str(file)), _scopes(service, rows))
    asked.join(TIMEOUT_S)
    return Counter({part: ms / steps for part, ms in times.items()}), step_ms


def _pass_steps(service: Service, count: int) -> tuple[float, int]:
    """Waits for so many steps; returns the milliseconds of one, and how many there were."""
    before, start_s = service.engine.stats().steps_total, time.perf_counter()
    while (passed := service.engine.stats().steps_total - before) < count:
        time.sleep(0.001)
    return (time.perf_counter() - start_s) / passed * 1e3, passed


def _scopes(service: Service, rows: int) -> dict[str, str]:
    """Maps the operations of the decode program to parts of the model."""
    runner = service.runner
    keys = [key for key in runner.program_keys() if key.kind == "decode" and key.rows >= rows]
    key = min(keys, key=lambda key: key.rows)
    text = runner.trace(key).lower().compile(runner.compiler_options).as_text()
    scopes = dict[str, str]()
    for name, path in _INSTRUCTION.findall(text):
        parts = [PARTS[scope] for scope in path.split("/") if scope in PARTS]
        scopes[name] = parts[-1] if parts else OTHER
    return scopes


def _own_times(profile: Any, scopes: Mapping[str, str]) -> Counter[str]:
    """Adds up each part's milliseconds on the threads that run programs.

    A program's operations follow each other on one thread; the threads that help it are not
    counted, since it waits for them.
    """
    times = Counter[str]()
    for plane in profile.planes:
        for line in plane.lines:
            events = [event for event in line.events if event.name in scopes]
            events.sort(key=lambda event: (event.start_ns, -event.duration_ns))
            open_until = list[tuple[float, str]]()
            for event in events:
                while open_until and event.start_ns >= open_until[-1][0]:
                    open_until.pop()
                if open_until:  # It runs within another operation, whose own time this is not.
                    times[open_until[-1][1]] -= event.duration_ns / 1e6
                part = scopes[event.name]
                times[part] += event.duration_ns / 1e6
                open_until.append((event.start_ns + event.duration_ns, part))
    return times


def _needs(service: Service, rows: int, context: int) -> dict[str, Need]:
    """Returns the least work of each part with matrices or the cache in it."""
    runner = service.runner
    config, params = runner.model.config, runner.abstract_params
    assert isinstance(params.layers, dict)
    needs = dict[str, Need]()
    for part, names in WEIGHTS.items():
        matrices = [params.layers[name] for name in names]
        numbers = sum(math.prod(matrix.shape) for matrix in matrices)
        needs[part] = Need(2.0 * rows * numbers, float(sum(_nbytes(x) for x in matrices)))
    head = runner.model.head_weight(params)
    needs["head"] = Need(2.0 * rows * math.prod(head.shape), float(_nbytes(head)))
    pairs = rows * context * config.layers
    cache = runner.config.cache
    token_bytes = cache.page_bytes(config) / cache.page_tokens
    needs["attention"] = Need(
        4.0 * pairs * config.q_heads * config.head_dim, rows * context * token_bytes
    )
    return needs


def _nbytes(matrix: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(matrix))


def _entry(ms: float, need: Need | None, facts: Mapping[str, Any]) -> dict[str, float]:
    entry = {"ms": round(ms, 3)}
    if need is not None:
        rate = max(facts["f32_tflop_per_s"], facts["bf16_tflop_per_s"]) * 1e12
        limit_ms = 1e3 * max(need.flops / rate, need.read_bytes / (facts["read_gb_per_s"] * 1e9))
        entry |= {
            "gflop": round(need.flops / 1e9, 3),
            "mb": round(need.read_bytes / 1e6, 2),
            "limit_ms": round(limit_ms, 3),
        }
    return entry


def _table(line: Mapping[str, Any]) -> str:
    rows = [f"{'part':16} {'ms':>8} {'share':>6} {'GFLOP':>7} {'MB':>7} {'limit':>7} {'of it':>6}"]
    for part, entry in line["parts"].items():
        text = f"{part:16} {entry['ms']:8.2f} {entry['ms'] / line['program_ms']:6.1%}"
        if "limit_ms" in entry:
            share = entry["limit_ms"] / entry["ms"] if entry["ms"] else 0.0
            text += f" {entry['gflop']:7.2f} {entry['mb']:7.1f}"
            text += f" {entry['limit_ms']:7.2f} {share:6.0%}"
        rows.append(text)
    rows.append(f"{'program':16} {line['program_ms']:8.2f}")
    rows.append(f"{'step':16} {line['step_ms']:8.2f}")
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description="Splits the time of a decode step by part."
    )
    parser.add_argument("--rows", type=int, default=64, help="decoded together (default 64)")
    parser.add_argument("--context", type=int, default=300, help="tokens of each (default 300)")
    parser.add_argument("--out", type=Path, help="append the line to this file")
    add_engine_flags(parser)
    return parser


if __name__ == "__main__":
    main()
