"""Families against the chat templates that real models were published with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve.frontend.parsing import (
    FORMATS,
    AnswerParser,
    Content,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
    choose_format,
)
from jaxserve.frontend.template import ChatTemplate
from jaxserve.weights.gguf import gguf_tokenizer
from jaxserve.weights.gguf_file import read_gguf_header
from tests.frontend.parsing.golden import SCHEMA, TOOLS, mark, read

CHOICES = {
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "ibm-granite-granite-4.0": "hermes",
    "Reka-Edge": "hermes",
    "Qwen3-Coder": "qwen3_coder",
    "Qwen3.5-4B": "qwen3_coder",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3_coder",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral_list",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek",
    "llama-cpp-deepseek-r1": "deepseek",
    "deepseek-ai-DeepSeek-V3.1": "deepseek_v3_1",
    "moonshotai-Kimi-K2": "kimi",
    "Kimi-K2-Thinking": "kimi",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command_r",
    "unsloth-Apriel-1.5": "apriel",
    "google-gemma-4-31B-it": "gemma4",
    # Reasoning is known, the shape of their calls is not.
    "deepseek-ai-DeepSeek-V3.2": "thinking",
    "MiniMax-M2": "thinking",
    "HuggingFaceTB-SmolLM3-3B": "thinking",
    # Nothing that is known.
    "google-gemma-2-2b-it": "plain",
    "microsoft-Phi-3.5-mini-instruct": "plain",
    "openai-gpt-oss-120b": "plain",
    "MiniMax-M3": "plain",
    "meetkai-functionary-medium-v3.1": "plain",
}

Template = Callable[[str], str]


@pytest.fixture(scope="module")
def template(assets: Callable[[str], Path]) -> Template:
    folder = assets("llama-cpp-vocabs") / "templates"
    return lambda name: (folder / f"{name}.jinja").read_text("utf-8")


@pytest.mark.parametrize(("name", "family"), CHOICES.items())
def test_a_template_tells_its_family(name: str, family: str, template: Template) -> None:
    assert choose_format(template(name)).name == family


def test_the_default_model_is_recognised(assets: Callable[[str], Path]) -> None:
    gguf = gguf_tokenizer(read_gguf_header(assets("smollm2"))).gguf
    assert gguf is not None
    assert choose_format(gguf["tokenizer.chat_template"]).name == "smollm2"


@pytest.mark.parametrize(
    ("template", "name", "family"),
    [
        (None, "", "plain"),
        (None, "SmolLM2_135M", "smollm2"),
        ("{{ messages }}", "SmolLM2-135M-Instruct.Q4_1", "smollm2"),
        (None, "Qwen3-Coder-30B", "qwen3_coder"),
        (None, "Qwen3-8B", "hermes"),
        (None, "deepseek-v3.1-base", "deepseek_v3_1"),
        (None, "gpt2", "plain"),
        ("<tool_call></tool_call> arguments", "gpt2", "hermes"),
    ],
)
def test_a_name_helps_where_the_template_does_not(
    template: str | None, name: str, family: str
) -> None:
    assert choose_format(template, name).name == family


ARGUMENTS = {"city": 'Par"is\n<b>', "days": 3, "unit": "C"}

TOOL = {"name": "get_weather", "description": "Tells the weather.", "parameters": SCHEMA}
SPECIAL_TEXTS = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize(
    ("name", "header", "as_text"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "assistant\n", False),
        ("Qwen-Qwen3-0.6B", "assistant\n", True),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "assistant\n", False),
        ("ibm-granite-granite-4.0", "assistant<|end_of_role|>", False),
        ("Qwen3-Coder", "assistant\n", False),
        ("Qwen3.5-4B", "assistant\n", False),
        ("GLM-4.6", "<|assistant|>", False),
        ("GLM-4.7-Flash", "<|assistant|>", False),
        ("meta-llama-Llama-3.1-8B-Instruct", "assistant<|end_header_id|>\n\n", False),
        ("Mistral-Small-3.2-24B-Instruct-2506", "[/INST]", False),
        ("mistralai-Mistral-Nemo-Instruct-2407", "[/INST]", False),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "<\uff5cAssistant\uff5c>", True),
        ("deepseek-ai-DeepSeek-V3.1", "<\uff5cAssistant\uff5c>", False),
        ("moonshotai-Kimi-K2", "assistant<|im_middle|>", False),
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "<|CHATBOT_TOKEN|>", False),
    ],
)
def test_what_a_template_writes_is_read_back(
    name: str, header: str, as_text: bool, template: Template
) -> None:
    """The template renders a call in an earlier turn just as the model is to write it."""
    arguments = json.dumps(ARGUMENTS) if as_text else ARGUMENTS
    function = {"name": "get_weather", "arguments": arguments}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None if "DeepSeek" in name else "",
            "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
        },
    ]
    source = template(name)
    with ChatTemplate(source, source=name, special_texts=SPECIAL_TEXTS) as chat:
        rendered = chat.render(messages, add_generation_prompt=False, tools=[{"function": TOOL}])
    answer = rendered.split("Weather?")[1].split(header)[1]
    format = choose_format(source)
    # Some close a reasoning that is not there, behind an opening that belongs to the prompt.
    opened = format.reasoning is not None and answer.startswith(format.reasoning[1])
    parts = read(AnswerParser(format, tools=TOOLS, in_reasoning=opened), answer)
    calls = [part for part in parts if not isinstance(part, Content | Reasoning)]
    assert calls[0] == ToolCallStarted(0, "get_weather")
    assert isinstance(calls[1], ToolCallArguments)
    assert json.loads(calls[1].text) == ARGUMENTS
    # What is left is the template's own end of turn, and nothing of the call.
    rest = "".join(part.text for part in parts if isinstance(part, Content))
    assert "get_weather" not in rest
    assert not any(marker in rest for marker in format.markers)


def test_names_are_keys() -> None:
    assert all(format.name == name for name, format in FORMATS.items())
    assert mark("sep") in FORMATS["deepseek"].markers
