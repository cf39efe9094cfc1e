"""Compares the doors of one server: the same model and load over gRPC and over HTTP, in turns.

    python -m bench.doors [--model smollm2] [--rows 32] [--tokens 128] [--rounds 7] [--out FILE]

The clients are those of ``bench.frontend``, another process over loopback, one stream a row. Goal:
HTTP delivers at least 85 % of the tokens that gRPC delivers in the same time.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.frontend import run_clients
from jaxserve.cli.environment import Environment
from jaxserve.config import ServeConfig
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.launch import Service, build
from jaxserve.progress import show_to_person

GOAL_RATIO = 0.85
DOORS = ("grpc", "http")


def main(words: Sequence[str] | None = None) -> None:
    """Serves a model over both doors and asks them in turns; prints one line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.doors", description="Compares the doors of one server."
    )
    parser.add_argument("--model", default="smollm2", help="default smollm2")
    parser.add_argument("--rows", type=int, default=32, help="clients at a time (default 32)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default 128)")
    parser.add_argument("--rounds", type=int, default=7, help="of both doors (default 7)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the line to this file")
    arguments = parser.parse_args(words)
    # Everything is compiled before anything is measured.
    environment = Environment.read(os.environ)
    config = ServeConfig(
        model=arguments.model,
        assets_dir=environment.assets_dir,
        cache_dir=environment.cache_dir,
        max_rows=arguments.rows,
        ready_with="all",
    )
    with show_to_person(None) as report:
        service = build(config, report)
    with service:
        line = measure(service, arguments.rows, arguments.tokens, arguments.rounds)
    common.write(line, arguments.out)
    ratio = line["ratio"]["median"]
    met = "met" if ratio >= GOAL_RATIO else "MISSED"
    common.say(f"HTTP over gRPC {ratio:g}; goal >= {GOAL_RATIO:g}: {met}")


def measure(service: Service, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Returns what the clients of both doors saw, round by round."""
    server = ServerThread(service.text, service.info, ServerConfig(port=0), HttpConfig(port=0))
    rates: dict[str, list[float]] = {door: [] for door in DOORS}
    with server as grpc_address:
        assert server.http_address is not None
        addresses = {"grpc": grpc_address, "http": server.http_address}
        other = machine.OtherLoad()
        for number in range(rounds + 1):
            for door in DOORS if number % 2 else reversed(DOORS):
                seconds = run_clients(door, addresses[door], rows, tokens)["seconds"]
                if number:  # The first round warms up.
                    rates[door].append(rows * tokens / seconds)
        cores = other.cores()
    ratios = [http / grpc for grpc, http in zip(rates["grpc"], rates["http"], strict=True)]
    return {
        "bench": "doors",
        "model": service.info.name,
        "rows": rows,
        "tokens": tokens,
        "rounds": rounds,
        "tokens_per_s": {door: round(statistics.median(rates[door]), 1) for door in DOORS},
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
        "commit": common.commit(),
        "versions": common.versions(),
        "other_cores": cores,
    }


if __name__ == "__main__":
    main()
