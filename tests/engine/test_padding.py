"""How much of what is computed is padding, for prompts of unlike lengths."""

from __future__ import annotations

import numpy as np

from jaxserve.config import PROMPT_LINES, decode_buckets, prefill_buckets, score_buckets
from jaxserve.engine.admission import EngineLimits
from jaxserve.engine.engine import Engine
from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.step import ProgramCall, StepInputs, StepShape
from jaxserve.testing import PacedHandle, PacedRunner
from tests.engine.driving import run, submit


def test_mixed_prompts_pad_little() -> None:
    """64 requests at once as ``bench.offline`` has them, with the buckets of a CPU."""
    sizes = prefill_buckets(256)
    shape = StepShape(
        max_rows=64,
        table_width=32,
        vocab_size=259,
        decode_buckets=decode_buckets(64, 1),
        prefill_buckets=sizes,
        score_buckets=score_buckets(sizes),
        call_places=24,
    )
    calls = list[ProgramCall]()

    class NotingRunner(PacedRunner):
        def dispatch(self, inputs: StepInputs) -> PacedHandle:
            calls.extend(call for call in inputs.calls if call.kind == "prefill")
            return super().dispatch(inputs)

    engine = Engine(
        NotingRunner(shape),
        scheduler=SchedulerConfig(
            max_rows=64,
            step_tokens=256 + 64,
            chunk_tokens=256,
            max_chunks=PROMPT_LINES,
            page_tokens=32,
            num_pages=64 * 32 + 1,
        ),
        shape=shape,
        limits=EngineLimits(context_tokens=1024, vocab_size=259),
        end_ids=(),
    )
    rng = np.random.default_rng(0)
    tokens = 0
    for number in range(64):
        prompt, answer = int(rng.integers(64, 513)), int(rng.integers(32, 257))
        tokens += prompt
        submit(engine, str(number), [number] * prompt, max_tokens=answer)
    run(engine)
    assert 1 - tokens / sum(call.places for call in calls) < 0.01
    assert len(calls) <= tokens // 256 + 2
    assert engine.stats().padding_waste < 0.1
