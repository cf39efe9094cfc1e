"""The families that are known, and how to tell which one a model is of.

Formats were read off the chat templates that the models were published with. To add a family of one
of the three shapes, describe it here and say what its template contains.
"""

from __future__ import annotations

from jaxserve.frontend.parsing.formats import AnswerFormat, JsonCalls, NamedCalls, TaggedCalls

THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")

PLAIN = AnswerFormat(name="plain")
THINKING = AnswerFormat(name="thinking", reasoning=THINK)
"""Reasoning only: tool calls in shapes that are not known here stay text."""

HERMES = AnswerFormat(
    name="hermes",
    reasoning=THINK,
    tools=(JsonCalls(begin=CALL[0], end=CALL[1], padding="\n"),),
)
SMOLLM2 = AnswerFormat(name="smollm2", tools=(JsonCalls(begin=CALL[0], end=CALL[1], is_list=True),))
QWEN3_CODER = AnswerFormat(
    name="qwen3_coder",
    reasoning=THINK,
    tools=(
        TaggedCalls(
            begin=CALL[0],
            end=CALL[1],
            name_open="<function=",
            name_close=">",
            key_open="<parameter=",
            key_close=">",
            value_close="</parameter>",
            call_end="</function>",
            padding="\n",
            value_lines=True,
        ),
    ),
)
GLM = AnswerFormat(
    name="glm",
    reasoning=THINK,
    tools=(
        TaggedCalls(
            begin=CALL[0],
            key_open="<arg_key>",
            key_close="</arg_key>",
            value_open="<arg_value>",
            value_close="</arg_value>",
            call_end=CALL[1],
            padding="\n",
        ),
    ),
)
LLAMA3 = AnswerFormat(
    name="llama3",
    tools=(
        JsonCalls(
            begin="<|python_tag|>",
            bare=True,
            argument_keys=("parameters", "arguments"),
            between="; ",
        ),
    ),
)


def _deepseek(name: str) -> str:
    """Returns one of DeepSeek's markers, which have full-width bars and a block for a space."""
    return f"<\uff5ctool▁{name}\uff5c>"


_MISTRAL_LIST = JsonCalls(begin="[TOOL_CALLS]", is_list=True)
_MISTRAL_NAMED = NamedCalls(
    call_begin="[TOOL_CALLS]",
    head=("", r"(?:\[CALL_ID\][^\[\]]*)?"),
    head_markers=("[CALL_ID]",),
    separator="[ARGS]",
)
_MISTRAL_THINK = ("[THINK]", "[/THINK]")
MISTRAL = AnswerFormat(
    name="mistral", reasoning=_MISTRAL_THINK, tools=(_MISTRAL_NAMED, _MISTRAL_LIST)
)
MISTRAL_LIST = AnswerFormat(name="mistral_list", tools=(_MISTRAL_LIST, _MISTRAL_NAMED))
DEEPSEEK = AnswerFormat(
    name="deepseek",
    reasoning=THINK,
    tools=(
        NamedCalls(
            begin=_deepseek("calls▁begin"),
            end=_deepseek("calls▁end"),
            call_begin=_deepseek("call▁begin"),
            head=("function" + _deepseek("sep"), ""),
            written_head=("function" + _deepseek("sep"), "\n"),
            head_markers=(_deepseek("sep"),),
            separator="```json",
            call_end=("```", _deepseek("call▁end")),
            padding="\n",
            between="\n",
        ),
    ),
)
DEEPSEEK_V3_1 = AnswerFormat(
    name="deepseek_v3_1",
    reasoning=THINK,
    tools=(
        NamedCalls(
            begin=_deepseek("calls▁begin"),
            end=_deepseek("calls▁end"),
            call_begin=_deepseek("call▁begin"),
            head=("", ""),
            separator=_deepseek("sep"),
            call_end=(_deepseek("call▁end"),),
        ),
    ),
)
KIMI = AnswerFormat(
    name="kimi",
    reasoning=THINK,
    tools=(
        NamedCalls(
            begin="<|tool_calls_section_begin|>",
            end="<|tool_calls_section_end|>",
            call_begin="<|tool_call_begin|>",
            head=(r"(?:functions\.)?", r"(?::\d+)?"),
            written_head=("functions.", ":"),
            is_numbered=True,
            separator="<|tool_call_argument_begin|>",
            call_end=("<|tool_call_end|>",),
        ),
    ),
)
GRANITE = AnswerFormat(
    name="granite",
    reasoning=THINK,
    tools=(JsonCalls(begin="<|tool_call|>", is_list=True),),
)
COMMAND_R = AnswerFormat(
    name="command_r",
    reasoning=("<|START_THINKING|>", "<|END_THINKING|>"),
    tools=(
        JsonCalls(
            begin="<|START_ACTION|>",
            end="<|END_ACTION|>",
            is_list=True,
            name_key="tool_name",
            argument_keys=("parameters", "arguments"),
            id_key="tool_call_id",
        ),
    ),
)
APRIEL = AnswerFormat(
    name="apriel", tools=(JsonCalls(begin="<tool_calls>", end="</tool_calls>", is_list=True),)
)
GEMMA4 = AnswerFormat(name="gemma4", reasoning=("<|channel>thought", "<channel|>"))
"""Reasoning only, like ``THINKING``: its calls are written in a syntax of their own."""

FORMATS: dict[str, AnswerFormat] = {
    format.name: format
    for format in (
        PLAIN,
        THINKING,
        HERMES,
        SMOLLM2,
        QWEN3_CODER,
        GLM,
        LLAMA3,
        MISTRAL,
        MISTRAL_LIST,
        DEEPSEEK,
        DEEPSEEK_V3_1,
        KIMI,
        GRANITE,
        COMMAND_R,
        APRIEL,
        GEMMA4,
    )
}

_TEMPLATES: tuple[tuple[AnswerFormat, tuple[str, ...]], ...] = (
    # Tags with attributes, as MiniMax writes them, are no known shape.
    (THINKING, ("<invoke name=", "<think>")),
    (PLAIN, ("<invoke name=",)),
    (QWEN3_CODER, ("<tool_call>", "<function=", "<parameter=")),
    (GLM, ("<tool_call>", "<arg_key>")),
    (DEEPSEEK, (_deepseek("calls▁begin"), "```json")),
    (DEEPSEEK_V3_1, (_deepseek("calls▁begin"),)),
    (MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
    (MISTRAL_LIST, ("[TOOL_CALLS]",)),
    (APRIEL, ("<tool_calls>[", "]</tool_calls>")),
    (KIMI, ("<|tool_calls_section_begin|>", "functions.")),
    (COMMAND_R, ("<|START_ACTION|>", "tool_name")),
    (GRANITE, ("<|tool_call|>", "<|start_of_role|>")),
    (HERMES, ("<tool_call>", "</tool_call>", "arguments")),
    (LLAMA3, ("<|start_header_id|>", '"parameters": ', "ipython")),
    (SMOLLM2, ("named SmolLM, trained by Hugging Face<|im_end|>",)),
    (GEMMA4, ("<|channel>thought", "<channel|>")),
    (THINKING, ("<think>", "</think>")),
)
"""The first format all of whose texts stand in a template is the model's."""

_NAMES: tuple[tuple[str, AnswerFormat], ...] = (
    ("smollm2", SMOLLM2),
    ("qwen3-coder", QWEN3_CODER),
    ("qwen", HERMES),
    ("hermes", HERMES),
    ("llama-3", LLAMA3),
    ("granite-4", HERMES),
    ("granite", GRANITE),
    ("kimi-k2", KIMI),
    ("glm-4", GLM),
    ("deepseek-v3.1", DEEPSEEK_V3_1),
    ("deepseek-r1", DEEPSEEK),
    ("deepseek-v3", DEEPSEEK),
    ("mistral-nemo", MISTRAL_LIST),
    ("mistral", MISTRAL),
)
"""For checkpoints without a template that says something; the first name that occurs counts."""


def choose_format(chat_template: str | None, model_name: str = "") -> AnswerFormat:
    """Returns the format of a model's answers.

    Args:
        chat_template: Jinja source; what it writes for tool calls tells the family.
        model_name: asked when the template tells nothing, as that of SmolLM2 may. Any spelling of
            upper and lower case, ``-`` and ``_``.
    """
    for format, texts in _TEMPLATES:
        if chat_template and all(text in chat_template for text in texts):
            return format
    name = model_name.lower().replace("_", "-")
    return next((format for part, format in _NAMES if part in name), PLAIN)
