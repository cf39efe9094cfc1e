"""Quantized checkpoints served: the tokens of the same model with plain weights of equal numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM
from jaxserve.cli.launch import describe_plan
from jaxserve.frontend.grpc.config import ServerConfig
from tests.weights import tool_files
from tests.weights.tool_files import TOOLS

pytestmark = pytest.mark.slow

PROMPTS = ["Hello", "The sky is blue", "a", "1 2 3 4 5 6 7 8 9"]
QUANTIZATION = {
    "awq": "int4",
    "gptq": "int4",
    "gptq-v2": "int4",
    "gptq-act-order": "int4/ordered",
    "gptq-8": "int8",
    "w8a8": "int8",
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


def answers(llm: LLM) -> list[Any]:
    return llm.generate(
        PROMPTS, temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2
    )


@pytest.mark.parametrize("tool", QUANTIZATION)
def test_greedy_tokens_are_those_of_plain_weights_of_the_same_numbers(
    tool: str, tmp_path: Path
) -> None:
    """Until two tokens are equally likely to a thousandth, if ever."""
    plain = tool_files.write(tmp_path / "q", *TOOLS[tool])
    tool_files.write_plain(tmp_path / "p", plain)
    asked = "auto" if tool in ("w8a8", "fp8") else tool.partition("-")[0]
    with make(tmp_path / "q", quantization=asked) as llm:
        assert llm.info.quantization == QUANTIZATION[tool]
        found = answers(llm)
    with make(tmp_path / "p") as llm:
        assert llm.info.quantization == ""
        expected = answers(llm)
    same = 0
    for ours, theirs in zip(found, expected, strict=True):
        for place, (one, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            if one != other:
                print(tool, place, theirs)
                break
            same += 1
    assert same >= 40
