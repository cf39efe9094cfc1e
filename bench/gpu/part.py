"""What a part of the benchmark is, what it finds, and the list of all parts.

A part is named by a function that yields numbers, and is imported by its child process only: this
file is read by the parent, which must never touch the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.planning.devices import DeviceFacts, facts_of_kind

WHOLE_S = 9 * 60 - 5
"""The whole command takes less than nine minutes, whatever its parts do."""
DRY_WHOLE_S = 170
DRY_BUDGET_S = 60
"""Of every part of a dry run."""

TIMES = ("s", "ms", "us")
TOLERATED = ("error", "share off")
"""Units of a difference; its limit is what is tolerated."""


@dataclass(frozen=True)
class Number:
    """One result."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    """In the same unit: what the data sheet allows at best, or the tolerance of a difference."""

    def __post_init__(self) -> None:
        """Refuses what no reader could use."""
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value} {self.unit}")

    @property
    def share(self) -> float | None:
        """Of the limit: 1 is as fast as the device could be; of a difference, the tolerated one."""
        if self.limit is None or not self.limit or not self.value:
            return None
        return self.limit / self.value if self.unit in TIMES else self.value / self.limit

    def as_json(self) -> dict[str, Any]:
        """Returns what the file keeps."""
        found: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.limit is not None:
            found["limit"] = self.limit
        if self.share is not None:
            found["share_of_limit"] = round(self.share, 4)
        return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a part is told."""

    dry: bool
    """Tiny sizes on the CPU: what is measured means nothing, that it can be measured does."""
    device_kind: str
    """JAX's word for the device."""
    cache_dir: Path
    """Compiled programs, shared by the parts of a run."""
    traces: Path | None
    """Folder of recorded traffic."""
    ends_s: float
    """On the clock of ``time.time``: when the part is killed."""

    @property
    def facts(self) -> DeviceFacts | None:
        """The data sheet; None when nothing is known of the device."""
        return facts_of_kind(self.device_kind)

    @property
    def left_s(self) -> float:
        """Seconds until the part is killed."""
        return self.ends_s - time.time()

    def pick[T](self, full: T, dry: T) -> T:
        """Returns a size for this run."""
        return dry if self.dry else full


Measure = Callable[[Setting], Iterator[Number]]


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own."""

    name: str
    budget_s: float
    """Its process is killed after so long; what it had found by then is kept."""
    function: str
    """``module:name`` of a ``Measure``."""
    needs_traces: bool = False


PARTS = (
    Part("agreement", 35, "bench.gpu.kernels:agreement"),
    Part("ceilings", 20, "bench.gpu.device:ceilings"),
    Part("dispatch", 15, "bench.gpu.device:dispatch"),
    Part("attention", 30, "bench.gpu.kernels:attention"),
    Part("sampling", 20, "bench.gpu.kernels:sampling"),
    Part("layers", 35, "bench.gpu.model:layers"),
    Part("command_buffers", 35, "bench.gpu.model:command_buffers"),
    Part("decode_1b", 30, "bench.gpu.model:decode_1b"),
    Part("decode_8b", 45, "bench.gpu.model:decode_8b"),
    Part("prefill", 60, "bench.gpu.serving:prefill"),
    Part("serving", 100, "bench.gpu.serving:serving"),
    Part("replay", 50, "bench.gpu.serving:replay", needs_traces=True),
    Part("start", 45, "bench.gpu.start:start"),
)
"""Cheap and certain ones first. The budgets add up to less than ``WHOLE_S``, with room for looking
at the device and for ending processes; no part can take what belongs to another."""
