"""Bugs to plant in the engine, each one a replaced line, for the simulator to find."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from jaxserve.engine import step
from jaxserve.engine.admission import Admission
from jaxserve.engine.data_shard import DataShard
from jaxserve.engine.engine import Engine
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix import PrefixCache
from jaxserve.engine.publish import Publisher
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stream import TokenStream


@dataclass(frozen=True)
class Bug:
    """A method or function whose source has ``old`` replaced by ``new``."""

    name: str
    owner: type | ModuleType
    method: str
    old: str
    new: str
    seed: int
    """Which notices it soonest of those that are tried; it comes first."""

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compiles the changed function and puts it in the place of the right one."""
        right = inspect.unwrap(getattr(self.owner, self.method))
        source = textwrap.dedent(inspect.getsource(right))
        assert source.count(self.old) == 1, f"{self.name}: the line to change is not there"
        owner = self.owner
        module = owner if isinstance(owner, ModuleType) else sys.modules[owner.__module__]
        # The annotations would be evaluated, and some of the names are imported nowhere.
        changed = "from __future__ import annotations\n" + source.replace(self.old, self.new)
        code = compile(changed, f"<{self.name}>", "exec")
        found: dict[str, Any] = {}
        exec(code, vars(module), found)
        monkeypatch.setattr(owner, self.method, found[self.method])

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


BUGS = [
    Bug(
        "pages are not freed when a request is cancelled",
        DataShard,
        "vacate",
        "self.pool.release(pages)",
        "sequence.done or self.pool.release(pages)",
        seed=0,
    ),
    Bug(
        "a page is freed twice",
        PagePool,
        "release",
        "self._free.append(page)",
        "self._free.extend((page, page))",
        seed=0,
    ),
    Bug(
        "a prefix hit takes no reference",
        PagePool,
        "share",
        "references[page] += 1",
        "references[page] = max(1, references[page])",
        seed=6,
    ),
    Bug(
        "the last page of a prompt is one token short",
        DataShard,
        "admit",
        "-(-len(tokens) // size)",
        "-(-(len(tokens) - 1) // size)",
        seed=4,
    ),
    Bug(
        "a sequence grows one token too late",
        DataShard,
        "plan_decode",
        "position >= len(sequence.pages)",
        "position > len(sequence.pages)",
        seed=0,
    ),
    Bug(
        "the last to come is the first to be served",
        Scheduler,
        "enqueue",
        "(sequence.rank, sequence)",
        "((sequence.rank[0], -sequence.rank[1], sequence.choice), sequence)",
        seed=6,
    ),
    Bug(
        "priority is forgotten",
        Engine,
        "_make_live",
        "request.priority * PRIORITY_SECONDS",
        "0",
        seed=0,
    ),
    Bug(
        "the salt is forgotten",
        PrefixCache,
        "extend_chain",
        "self.root(salt)",
        'self.root("")',
        seed=3,
    ),
    Bug(
        "a prompt can be found before it is computed",
        DataShard,
        "add_chunk",
        "sequence.computed += count",
        "sequence.computed += count; self.commit(sequence, sequence.target)",
        seed=14,
    ),
    Bug(
        "a row is handed out while it is taken",
        DataShard,
        "admit",
        "self._rows.pop()",
        "self._rows[-1]",
        seed=0,
    ),
    Bug(
        "a sequence comes back while its token is in flight",
        Scheduler,
        "plan",
        "if not preempted:",
        "if True:",
        seed=15,
    ),
    Bug(
        "a preemption loses the last token",
        DataShard,
        "_grow",
        "self.vacate(victim)",
        "self.vacate(victim); victim.tokens.pop()",
        seed=8,
    ),
    Bug(
        "a token that a failed step lost stays counted",
        DataShard,
        "admit",
        "sequence.sampled = sequence.output_tokens",
        "pass",
        seed=10,
    ),
    Bug(
        "the admission counter is not taken down",
        Admission,
        "_uncount",
        "self.waiting_tokens -= len(live.request.prompt)",
        "pass",
        seed=1,
    ),
    Bug(
        "a finished request stays live",
        Publisher,
        "finish",
        "if live.open_choices == 0:",
        "if live.open_choices == 0 and reason is not FinishReason.DEADLINE:",
        seed=2,
    ),
    Bug(
        "an evicted page can still be found",
        PagePool,
        "allocate",
        "self.on_evict(page)",
        "pass",
        seed=14,
    ),
    Bug(
        "a failed step leaves the prefix cache standing",
        Scheduler,
        "preempt_all",
        "shard.prefix.clear()",
        "pass",
        seed=9,
    ),
    Bug(
        "a prefix known in one data shard is taken for another's",
        Scheduler,
        "_admit",
        "shard.admit(sequence, hit)",
        "shard = self.shards[-1] if self.shards[-1].has_row else shard; shard.admit(sequence, hit)",
        seed=10,
    ),
    Bug(
        "pages are made findable in the first data shard",
        Scheduler,
        "commit",
        "self.shards[sequence.shard]",
        "self.shards[0]",
        seed=4,
    ),
    Bug(
        "a page stays findable after its last holder, with the cache off",
        PrefixCache,
        "released",
        "self._drop(page)",
        "pass",
        seed=13,
    ),
    Bug(
        "a sequence that is cancelled while it waits is still counted",
        Scheduler,
        "finish",
        "self._waiting -= 1",
        "pass",
        seed=0,
    ),
    Bug(
        "deadlines of waiting requests are not watched",
        Engine,
        "_expire",
        "if live.open_choices:",
        "if live.open_choices and live.scheduled_s is not None:",
        seed=14,
    ),
    Bug(
        "a stop ends the wrong choice",
        Engine,
        "_stop_choice",
        "live.sequences[choice]",
        "live.sequences[0]",
        seed=18,
    ),
    Bug(
        "a choice that ends early is never followed by the others",
        Publisher,
        "finish",
        "elif not live.choices_queued:",
        "elif False:",
        seed=0,
    ),
    Bug(
        "min_tokens lets a stop through one token early",
        step,
        "_suppresses_stop",
        "sequence.sampled <=",
        "sequence.sampled <",
        seed=10,
    ),
    Bug(
        "a reader is not woken",
        TokenStream,
        "put",
        "len(self._events) <= 1",
        "len(self._events) == 2",
        seed=7,
    ),
]
