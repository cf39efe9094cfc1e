"""OpenAI's own client against a gateway, in the clients' environment; prints JSON for the test."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def ask(url: str, model: str, prompt: str) -> dict[str, Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0)
    said: dict[str, Any] = {"models": [item.id for item in client.models.list().data]}
    chat: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 12,
        "temperature": 0.0,
    }
    whole = client.chat.completions.create(**chat)
    said["chat"] = [
        whole.choices[0].message.content,
        whole.choices[0].finish_reason,
        whole.usage and whole.usage.prompt_tokens,
        whole.usage and whole.usage.completion_tokens,
    ]
    text, usage = "", None
    for chunk in client.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    said["streamed"] = [text, usage and usage.completion_tokens]
    plain = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0.0)
    said["completion"] = [plain.choices[0].text, plain.choices[0].finish_reason]
    choices = client.chat.completions.create(
        **{**chat, "temperature": 1.0}, n=2, seed=5, logprobs=True, top_logprobs=2
    )
    said["choices"] = [len(choices.choices), bool(choices.choices[0].logprobs)]
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"enum": ["red", "blue"]}},
    }
    obeying = client.chat.completions.create(**{**chat, "response_format": schema})
    said["schema"] = obeying.choices[0].message.content
    try:
        client.chat.completions.create(**{**chat, "max_tokens": 10_000})
    except openai.APIStatusError as error:
        said["refused"] = error.status_code
    leaving = client.chat.completions.create(
        **{**chat, "max_tokens": 200, "temperature": 1.0},
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(leaving))
    leaving.close()
    return said


if __name__ == "__main__":
    print(json.dumps(ask(*sys.argv[1:])))
