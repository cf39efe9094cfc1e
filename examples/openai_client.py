"""Every route of the HTTP door through the official client: ``pip install openai``, a server, then

    python examples/openai_client.py http://127.0.0.1:8000

prints what each answers. ``/v1/embeddings`` needs a server that was launched with ``--embeddings``.
"""

from __future__ import annotations

import sys
from typing import Any

from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    ask: dict[str, Any] = {"model": model, "temperature": 0}
    france: Any = [{"role": "user", "content": "What is the capital of France?"}]
    print("model:", model)

    chat = client.chat.completions.create(messages=france, max_tokens=24, **ask)
    print("chat:", chat.choices[0].message.content, "|", chat.usage)
    print("stream: ", end="")
    for chunk in client.chat.completions.create(messages=france, max_tokens=24, stream=True, **ask):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    scored = client.chat.completions.create(
        messages=france, max_tokens=2, logprobs=True, top_logprobs=2, **ask
    )
    assert scored.choices[0].logprobs is not None
    for entry in scored.choices[0].logprobs.content or ():
        print("logprobs:", entry.token, entry.logprob, [t.token for t in entry.top_logprobs])

    parsed = client.chat.completions.parse(
        messages=[{"role": "user", "content": "Describe Paris."}], response_format=City,
        max_tokens=100, **ask,
    )  # fmt: skip
    print("schema:", parsed.choices[0].message.parsed)
    for more in ({"guided_regex": r"\d{3}-\d{4}"}, {"guided_choice": ["yes", "no"]}):
        held = client.chat.completions.create(
            messages=france, max_tokens=20, extra_body=more, **ask
        )
        print(f"{next(iter(more))}:", held.choices[0].message.content)

    called = client.chat.completions.create(
        messages=[{"role": "user", "content": "Is it raining in Rome?"}], tools=[WEATHER],
        tool_choice="required", parallel_tool_calls=False, max_tokens=80, **ask,
    ).choices[0]  # fmt: skip
    print("tools:", called.finish_reason, called.message.tool_calls)

    completions = client.completions.create(
        prompt=["The sky is", "Once upon"], max_tokens=8, logprobs=1, echo=True, **ask
    )
    print("completions:", [choice.text for choice in completions.choices])

    response = client.responses.create(input="Say hello.", max_output_tokens=16, **ask)
    print("response:", response.status, repr(response.output_text))
    kinds = [
        event.type
        for event in client.responses.create(
            input="Say hello.", max_output_tokens=4, stream=True, **ask
        )
    ]
    print("response events:", kinds)
    try:
        vectors = client.embeddings.create(model=model, input=["a cat", "a kitten"]).data
        print("embeddings:", len(vectors), "of", len(vectors[0].embedding))
    except BadRequestError as error:
        print("embeddings:", error.message)
    try:
        client.chat.completions.create(messages=france, extra_body={"foo": 1}, **ask)
    except BadRequestError as error:
        print("refused:", error.message)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
