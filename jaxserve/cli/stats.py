"""Show what a server's engine is doing: rows, queue, pages, speed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from jaxserve.cli.chat import check_server
from jaxserve.cli.environment import Environment

if TYPE_CHECKING:
    from jaxserve.engine.stats import EngineStats, ShardStats

SUMMARY = "show what a server is doing"
USAGE = "[FLAGS]"
EXAMPLES = """\
  jaxserve stats
  jaxserve stats --watch --interval-s 5
  jaxserve stats --json | jq .pages_free
"""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the server and the output format."""
    parser.add_argument(
        "--server",
        default=environment.default_server,
        metavar="ADDRESS",
        help="server to ask (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="JSON; with --watch one object a line")
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument(
        "--interval-s",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two snapshots of --watch (default: %(default)s)",
    )


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Prints one snapshot or many."""
    from jaxserve.frontend.client import Client

    check_server(options.server)
    with Client(options.server) as client:
        if not options.watch:
            stats = client.stats(timeout_s=10.0)
            print(json.dumps(asdict(stats), indent=2) if options.json else table(stats))
            return 0
        for stats in client.watch_stats(options.interval_s):
            print(json.dumps(asdict(stats)) if options.json else line(stats), flush=True)
    return 0


def table(stats: EngineStats) -> str:
    """Returns every counter on a line of its own."""
    lines = []
    for name, value in asdict(stats).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_number(item)}" for key, item in value.items()) or "none"
        if name != "data_shards":
            lines.append(f"{name:26} {_number(value)}")
    if len(stats.data_shards) > 1:
        for number, shard in enumerate(stats.data_shards):
            lines.append(f"{f'data_shard {number}':26} {_shard(shard)}")
    return "\n".join(lines)


def line(stats: EngineStats) -> str:
    """Returns the counters that change most, on one line."""
    return (
        f"rows {stats.rows_running}/{stats.rows_max}  waiting {stats.requests_waiting} "
        f"({stats.queue_age_seconds:.1f} s)  pages {stats.pages_used} used, "
        f"{stats.pages_cached} cached, {stats.pages_free} free  "
        f"{stats.output_tokens_per_second:.1f} tokens/s  "
        f"prefix hits {stats.prefix_hit_rate:.0%}  "
        f"{'healthy' if stats.healthy else 'NOT SERVING'}"
    )


def _shard(shard: ShardStats) -> str:
    hits = shard.prefix_hit_tokens / max(1, shard.prefix_lookup_tokens)
    return (
        f"rows {shard.rows_running}/{shard.rows_max}  pages {shard.pages_used} used, "
        f"{shard.pages_cached} cached, {shard.pages_free} free  prefix hits {hits:.0%}"
    )


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
