"""Quantized checkpoints served: the tokens of the same model with plain weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM
from jaxserve.frontend.client_types import TokenScore
from tests.weights import tool_files
from tests.weights.tool_files import TOOLS

pytestmark = pytest.mark.slow

PROMPTS = ["Hello", "The sky is blue", "a", "1 2 3 4 5 6 7 8 9"]
NEAR_TIE = 0.02
"""Of log-probabilities."""
QUANTIZATION = {
    "awq": "int4",
    "gptq-act-order": "int4/ordered",
    "gptq-8": "int8",
    "fp8": "fp8",
}


def make(path: Path, **config: Any) -> LLM:
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "context_tokens": 128,
        "max_rows": 4,
        "step_tokens": 16,
        "kv_memory_bytes": 4 * 2**20,
        "progress": False,
        "cache_dir": Path(os.environ["JAX_COMPILATION_CACHE_DIR"]),
        **config,
    }
    return LLM(str(path), **settings)


def answers(llm: LLM) -> list[tuple[TokenScore, ...]]:
    """Greedy tokens and their likeliest alternatives."""
    asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    return [llm.generate(prompt, **asked, logprobs=2).choices[0].logprobs for prompt in PROMPTS]


@pytest.mark.parametrize("tool", QUANTIZATION)
def test_greedy_tokens_are_those_of_plain_weights_of_the_same_numbers(
    tool: str, tmp_path: Path
) -> None:
    """As long as two tokens do not come closer than what float16's minima may move them by."""
    plain = tool_files.write(tmp_path / "q", *TOOLS[tool])
    tool_files.write_plain(tmp_path / "p", plain)
    asked = "auto" if tool == "fp8" else tool.partition("-")[0]
    with make(tmp_path / "q", quantization=asked) as llm:
        assert llm.info.quantization.endswith(QUANTIZATION[tool])
        found = answers(llm)
    with make(tmp_path / "p") as llm:
        assert llm.info.quantization == ""
        expected = answers(llm)
    same = 0
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            first, second = other.top
            if one.token_id != other.token_id:
                assert first.logprob - second.logprob < NEAR_TIE
                break
            assert one.logprob == pytest.approx(other.logprob, abs=NEAR_TIE)
            same += 1
    assert same >= 48


@pytest.mark.parametrize("tool", ["awq", "gptq-act-order"])
def test_tokens_on_a_mesh_are_those_of_one_device(tool: str, tmp_path: Path) -> None:
    tool_files.write(tmp_path, *TOOLS[tool])
    with make(tmp_path) as llm:
        expected = answers(llm)
    with make(tmp_path, mesh="1x2", device="cpu:2") as llm:
        found = answers(llm)
    same = sum(
        one.token_id == other.token_id
        for ours, theirs in zip(found, expected, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    )
    assert same >= 48
