"""Tiny mixtures served from their checkpoints, against what transformers recorded of them.

Three prompts of 5 to 100 tokens and 48 greedy tokens each, through pages, chunks and buckets.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from jaxserve.engine.request import Request, SamplingParams
from jaxserve.llm import LLM
from tests.agreement.ways import ask_alone, ask_together, engine_over, make_service

pytestmark = pytest.mark.slow
TINY = Path(__file__).parents[1] / "golden" / "tiny"
SETTINGS: dict[str, object] = {"max_rows": 4, "step_tokens": 32, "context_tokens": 256}
GREEDY = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)


def asked(name: str) -> tuple[list[Request], list[list[int]]]:
    recorded = np.load(TINY / name / "reference.npz")
    prompts = [recorded[f"prompt_{number}"].tolist() for number in range(3)]
    batch = [
        Request(request_id=f"r{number}", prompt=prompt, sampling=GREEDY)
        for number, prompt in enumerate(prompts)
    ]
    return batch, [recorded[f"greedy_{number}"].tolist() for number in range(3)]


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A token for each byte, and more that stand for nothing; the recorded prompts are tokens."""
    tokens = sorted(ByteLevel.alphabet())
    tokens += [f"<{token}>" for token in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixtral", "1x1"),
        pytest.param("qwen2_moe", "1x1", marks=pytest.mark.wide),
        ("qwen2_moe", "1x3"),
        ("qwen3_moe", "1x2"),
    ],
)
def test_a_served_mixture_answers_as_transformers_does(
    name: str, mesh: str, cache_dir: Path, tmp_path: Path
) -> None:
    batch, greedy = asked(name)
    with_tokenizer = tmp_path / name
    shutil.copytree(TINY / name, with_tokenizer)
    byte_tokenizer(320).save(str(with_tokenizer / "tokenizer.json"))
    with (
        make_service(str(with_tokenizer), cache_dir, cache_dir, mesh=mesh, **SETTINGS) as service,
        engine_over(service) as engine,
    ):
        assert ask_together(engine, batch) == greedy


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_experts_answer_alone_as_in_company(quantization: str, cache_dir: Path) -> None:
    batch, _ = asked("mixtral")
    settings = {**SETTINGS, "quantization": quantization}
    with (
        make_service("dummy:tiny-qwen3-moe", cache_dir, cache_dir, **settings) as service,
        engine_over(service) as engine,
    ):
        together = ask_together(engine, batch)
        assert ask_alone(engine, batch) == together
    assert len({*map(tuple, together)}) == len(batch)


def test_the_notebooks_front_door_serves_a_mixture(cache_dir: Path) -> None:
    sizes: dict[str, Any] = {"max_rows": 2, "step_tokens": 16, "context_tokens": 64}
    with LLM("dummy:tiny-qwen3-moe", dtype="float32", cache_dir=cache_dir, **sizes) as llm:
        first, again = (llm.generate("Hello", max_tokens=8, temperature=0.0) for _ in range(2))
    assert first.token_ids == again.token_ids
    assert first.text
