"""Real weights through the whole engine, against what transformers recorded (tests/golden).

Greedy tokens of 20 prompts of 1 to 1,500 tokens, 64 tokens each, and the perplexity of four texts
through ``prompt_logprobs``: pages, chunks, buckets and programs, not just the model. float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine.request import Request, SamplingParams, StartedEvent
from jaxserve.launch import Service
from tests.agreement.ways import GREEDY, ask_together, engine_over, events_of, make_service

pytestmark = pytest.mark.slow
LONGER = ("moby_dick", "shakespeare", "argparse")
"""Texts that ``make prove-parity`` adds."""
GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Reference:
    """A served model and what was recorded of it."""

    service: Service
    name: str

    def recorded(self, file: str) -> np.lib.npyio.NpzFile:
        return np.load(GOLDEN / f"{file}{self.name}.npz")


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.prove)])
def reference(
    request: pytest.FixtureRequest, assets: Callable[[str], Path], cache_dir: Path
) -> Iterator[Reference]:
    path = assets(request.param)
    options = {
        "context_tokens": 2048,
        "step_tokens": 256,
        "max_rows": 16,
        "page_tokens": 32,
        "kv_memory_bytes": 768 * 2**20,
    }
    with make_service(str(path), cache_dir, path.parent, **options) as service:
        yield Reference(service, request.param)


def test_greedy_tokens_are_those_of_transformers(reference: Reference) -> None:
    recorded = reference.recorded("")
    ends = np.cumsum(recorded["prompt_lengths"])
    prompts = np.split(recorded["prompt_tokens"], ends[:-1])
    batch = [
        Request(request_id=f"p{number}", prompt=prompt.tolist(), sampling=GREEDY)
        for number, prompt in enumerate(prompts)
    ]
    assert len(batch) == 20
    with engine_over(reference.service) as engine:
        answers = ask_together(engine, batch)
    np.testing.assert_array_equal(answers, recorded["greedy_tokens"])


@pytest.mark.parametrize(
    "text",
    [*(pytest.param(text, marks=pytest.mark.prove) for text in LONGER), "gpl3"],
)
def test_perplexity_is_within_half_a_percent(
    reference: Reference, text: str, record_property: Callable[[str, object], None]
) -> None:
    recorded = reference.recorded("perplexity_")
    windows, expected = recorded[f"{text}_tokens"], recorded[f"{text}_nll"]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    batch = [
        Request(request_id=f"w{number}", prompt=window.tolist(), sampling=sampling)
        for number, window in enumerate(windows)
    ]
    with engine_over(reference.service) as engine:
        answers = events_of(engine, batch)
    total = 0.0
    for events in answers:
        started = events[0]
        assert isinstance(started, StartedEvent)
        scores = started.prompt_logprobs
        assert scores is not None
        total -= sum(score.logprob for score in scores[1:] if score is not None)
    count = windows[:, 1:].size
    ours, theirs = math.exp(total / count), math.exp(expected.sum() / count)
    record_property("perplexity", f"{ours:.3f} against {theirs:.3f}")
    assert ours == pytest.approx(theirs, rel=0.005)
