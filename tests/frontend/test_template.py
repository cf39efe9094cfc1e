from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import InvalidRequestError, TokenizerError
from jaxserve.frontend.template import ChatTemplate
from jaxserve.frontend.template_worker import RefusedError, make_environment
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint

HI = [{"role": "user", "content": "Hi"}]
SMOLLM2_SYSTEM = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def smollm2(assets: Callable[[str], Path]) -> Iterator[ChatTemplate]:
    tokenizer = load_tokenizer(open_checkpoint(assets("smollm2")).tokenizer_files())
    assert tokenizer.chat_template is not None
    with ChatTemplate(
        tokenizer.chat_template, source="smollm2", special_texts=tokenizer.special_texts
    ) as template:
        yield template


def render(source: str, messages: list[dict[str, Any]] = HI, **options: Any) -> str:
    """Compiles and renders a template with short limits."""
    limits = {"timeout_s": 1.0, "max_chars": 100_000} | options
    with ChatTemplate(source, source="t.jinja", **limits) as template:
        return template.render(messages)


def test_smollm2_gets_its_default_system_line(smollm2: ChatTemplate) -> None:
    expected = SMOLLM2_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2.render(HI) == expected
    closed = expected.removesuffix("<|im_start|>assistant\n")
    assert smollm2.render(HI, add_generation_prompt=False) == closed


def test_smollm2_keeps_a_system_line_that_is_given(smollm2: ChatTemplate) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert smollm2.render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_token_text_in_a_message_is_passed_on_as_it_is(smollm2: ChatTemplate) -> None:
    rendered = smollm2.render([{"role": "user", "content": "a<|im_end|>b {{ 1 }}"}])
    assert "user\na<|im_end|>b {{ 1 }}<|im_end|>\n" in rendered


def test_templates_see_what_they_are_written_for() -> None:
    source = (
        "{{ bos_token }}{{ tools[0].name }}{{ thinking }}{{ {'a': '<é'}|tojson }}"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %}body{% endgeneration %}{{ strftime_now('%Y')|length }}"
        "{{ documents is none }}{{ {'b': 1}|tojson(indent=2) }}"
    )
    with ChatTemplate(source, source="t", special_texts={"bos_token": "<s>"}) as template:
        found = template.render(HI, tools=[{"name": "f"}], variables={"thinking": "no"})
    assert found == '<s>fno{"a": "<é"}1body4True{\n  "b": 1\n}'


def test_blocks_leave_no_white_space_behind() -> None:
    assert render("  {% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"


def test_a_refusal_of_the_template_reaches_the_client() -> None:
    source = "{% if messages|length < 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(
        InvalidRequestError, match=r"template refuses these messages: roles must alternate"
    ) as caught:
        render(source)
    assert caught.value.field == "chat"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[7].content.x }}", r"cannot render these messages \(UndefinedError"),
        ("{{ messages[0].content + 1 }}", r"cannot render these messages \(TypeError"),
        ("{{ 'x' * messages|length * 10**10 }}", r"ran out of resources \(MemoryError\)"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"resources \(RecursionError\)"),
        ("{% for a in range(9999) %}{{ 'x' * 99 }}{% endfor %}", r"more than 100000 characters"),
        ("{% for a in range(10**6) %}{% endfor %}", r"resources \(OverflowError\)"),
        ("{{ ''.__class__.__mro__ }}", r"sandbox forbids \(access to attribute '__class__'"),
        ("{{ messages.append(1) }}", r"sandbox forbids \(access to attribute 'append'"),
        ("{{ cycler.__init__.__globals__ }}", r"sandbox forbids"),
        ("{{ lipsum.__globals__ }}", r"'lipsum' is undefined"),
        ("{{ '{0.__class__.x}'.format(messages) }}", r"sandbox forbids"),
    ],
)
def test_what_fails_while_rendering_is_one_request_refused(source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        render(source)


def test_the_attr_filter_is_no_way_out_of_the_sandbox() -> None:
    assert render("<{{ ''|attr('__class__')|attr('__mro__') }}>") == "<>"


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        # One call into C that no interpreter limit can stop.
        "{% set n = messages|length + 9 %}{{ n ** (n ** n) }}",
    ],
)
def test_an_endless_template_is_stopped_and_the_next_render_works(loop: str) -> None:
    source = "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}fine"
    with ChatTemplate(source, source="t", timeout_s=0.3) as template:
        with pytest.raises(
            InvalidRequestError, match=r"took longer than 0.3 s with these messages"
        ):
            template.render([{"role": "user", "content": "loop"}])
        assert template.render(HI) == "fine"


def test_one_worker_serves_many_renders() -> None:
    with ChatTemplate("{{ messages|length }}", source="t") as template:
        worker = template._worker
        assert {template.render(HI * count) for count in range(1, 40)} == set(
            map(str, range(1, 40))
        )
        assert template._worker is worker


def test_a_worker_that_died_between_renders_is_replaced() -> None:
    with ChatTemplate("ok", source="t") as template:
        assert template._worker is not None
        template._worker.kill()
        template._worker.wait()
        assert template.render(HI) == "ok"


def test_large_messages_pass_through_the_pipe() -> None:
    content = "x日" * 700_000
    with ChatTemplate("{{ messages[0].content }}", source="t") as template:
        assert template.render([{"role": "user", "content": content}]) == content


def test_messages_must_be_plain_data() -> None:
    with (
        ChatTemplate("ok", source="t") as template,
        pytest.raises(InvalidRequestError, match=r"cannot be written as JSON .* send plain text"),
    ):
        template.render([{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", r"template of t.jinja does not compile \(line 1: Expected an expression"),
        ("{% nonsense %}", r"does not compile \(line 1: Encountered unknown tag 'nonsense'"),
        # Jinja computes constants while it compiles.
        ("{{ 10 ** (10 ** 10) }}", r"does not compile \(it took too long\)"),
    ],
)
def test_a_template_that_does_not_compile_is_a_launch_error(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ChatTemplate(source, source="t.jinja", timeout_s=0.3)


def test_a_worker_that_cannot_be_started_is_a_launch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/none/python")
    with pytest.raises(TokenizerError, match=r"cannot be started \(No such file or directory\)"):
        ChatTemplate("ok", source="t")


def test_closing_ends_the_process() -> None:
    template = ChatTemplate("ok", source="t")
    worker = template._worker
    assert isinstance(worker, subprocess.Popen)
    template.close()
    assert worker.returncode is not None
    template.close()
    with pytest.raises(RuntimeError, match="this ChatTemplate is closed"):
        template.render(HI)


def real_templates(assets: Callable[[str], Path]) -> dict[str, str]:
    directory = assets("llama-cpp-vocabs") / "templates"
    return {path.name: path.read_text("utf-8") for path in sorted(directory.glob("*.jinja"))}


@pytest.mark.slow
def test_real_templates_render_or_refuse_in_their_own_words(
    assets: Callable[[str], Path],
) -> None:
    """Rendered in this process: these are known, and a worker each would only take time."""
    found = real_templates(assets)
    assert len(found) == 70
    rendered = {}
    for name, source in found.items():
        template = make_environment().from_string(source)
        context: dict[str, Any] = {
            "messages": HI,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
        }
        if "tool_use" in name:
            context["tools"] = [WEATHER]
        if "firefunction" in name:
            context |= {"functions": "[]", "datetime": "today"}
        with contextlib.suppress(RefusedError):
            rendered[name] = template.render(**context)
    assert len(rendered) >= 68
    assert all("Hi" in text for text in rendered.values())


@pytest.mark.slow
def test_real_templates_render_as_transformers_renders_them(assets: Callable[[str], Path]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": "Be brief."}, *HI]
    context = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    compared = 0
    for name, source in real_templates(assets).items():
        tools: list[Any] | None = [WEATHER] if "tool_use" in name else None
        try:
            expected = render_jinja_template([messages], tools, None, source, **context)[0][0]
        # The comparison is only over templates that transformers renders, whatever it raises.
        except Exception:
            continue
        ours = make_environment().from_string(source)
        assert ours.render(messages=messages, tools=tools, documents=None, **context) == expected
        compared += 1
    assert compared >= 60
