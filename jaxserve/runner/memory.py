"""How many pages fit: one pure function over bytes, and the count remembered between launches.

The page count is part of every program's shape, so a second launch can only reuse compiled
programs when it arrives at the same count. Free memory is never the same twice; hence counts are
rounded, and the last one is taken again while it still fits.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import MemoryPlanError

LEADING_BITS = 4  # Rounding keeps this many: at most an eighth of the pages is given up.


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes of one device."""

    free_bytes: int
    """Before weights are loaded."""
    weight_bytes: int
    row_state_bytes: int
    temporary_bytes: int
    """The most that one program needs beside its arguments."""
    page_bytes: int
    """One page over all layers, keys and values."""
    fraction: float
    """Of what is left, how much becomes pages."""
    kv_bytes: int | None
    """Bytes of pages asked for outright; overrides ``fraction``."""
    most_kv_bytes: int | None = None
    """What ``fraction`` may come to at most."""


def plan_memory(budget: MemoryBudget, *, least_pages: int, most_pages: int) -> int:
    """The page count, the null page included.

    Args:
        budget: the device's bytes.
        least_pages: what one sequence of full context needs, and the null page.
        most_pages: what all rows together could ever use, and the null page.

    Raises:
        MemoryPlanError: with the arithmetic, when not even ``least_pages`` fit.
    """
    fixed = budget.weight_bytes + budget.row_state_bytes + budget.temporary_bytes
    left = budget.free_bytes - fixed
    room = int(left * budget.fraction)
    if budget.most_kv_bytes is not None:
        room = min(room, budget.most_kv_bytes)
    if budget.kv_bytes is not None:
        room = budget.kv_bytes
    arithmetic = (
        f"{_mib(budget.free_bytes)} free - {_mib(budget.weight_bytes)} weights - "
        f"{_mib(budget.row_state_bytes)} row state - {_mib(budget.temporary_bytes)} temporaries "
        f"= {_mib(left)} left"
    )
    if budget.kv_bytes is not None and room > left:
        raise MemoryPlanError(
            f"--kv-memory asks for {_mib(room)} and only {_mib(max(left, 0))} are left "
            f"({arithmetic}); ask for less, or use fewer rows, a smaller dtype or more devices"
        )
    pages = room // budget.page_bytes
    if pages < least_pages:
        raise MemoryPlanError(
            f"{_mib(max(room, 0))} make {max(pages, 0)} pages and one sequence of full context "
            f"needs {least_pages} of {_mib(budget.page_bytes)} ({arithmetic}); lower "
            "--context-tokens, raise --kv-memory or --kv-memory-fraction, or use more devices"
        )
    return min(max(round_down(pages), least_pages), most_pages)


def round_down(pages: int) -> int:
    """Keeps the leading bits of a count.

    >>> round_down(1456), round_down(15)
    (1408, 15)
    """
    shift = max(0, pages.bit_length() - LEADING_BITS)
    return pages >> shift << shift


class PageCountMemory:
    """The last page count of a launch with the same programs, in a small JSON file."""

    def __init__(self, directory: Path, key: str) -> None:
        """Looks into ``directory``; ``key`` names everything that the count depends on."""
        self._path = directory / f"pages-{key}.json"

    def recall(self) -> int | None:
        """The remembered count; None when there is none, or the file cannot be read."""
        try:
            pages = json.loads(self._path.read_text())["num_pages"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pages if isinstance(pages, int) and pages >= 2 else None

    def remember(self, num_pages: int) -> None:
        """Writes the count; failing to is harmless, the next launch compiles again."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"num_pages": num_pages}))
            temporary.replace(self._path)
        except OSError:
            return


def host_free_bytes() -> int:
    """Memory that a process on this host can still take: the kernel's estimate, or the cgroup's."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        return free
    return free


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
