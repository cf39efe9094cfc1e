"""The output items of ``/v1/responses`` while they are made, and the events that tell of them.

    parts of one answer -> reasoning, message and function_call items, one open at a time

Every event has a number; what the items hold in the end is what the events have said.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from jaxserve.frontend.parsing import (
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallEnded,
    ToolCallStarted,
)

Event = dict[str, Any]


class Items:
    """The items of one answer."""

    def __init__(self) -> None:
        """Begins with none."""
        self.done: list[dict[str, Any]] = []
        """In order; the last may still be open."""
        self._open: str = ""
        self._scored: list[Any] = []
        """Log-probabilities of tokens whose text is still held back."""

    def push(self, parts: list[Part], logprobs: list[Any]) -> Iterator[Event]:
        """Takes parts, with the log-probabilities of the tokens that they came with."""
        self._scored += logprobs
        for part in parts:
            scored, self._scored = self._scored, []  # Only content shows them.
            match part:
                case Content(text):
                    yield from self._enter("message")
                    yield from self._text("response.output_text.delta", text, scored)
                case Reasoning(text):
                    yield from self._enter("reasoning")
                    yield from self._text("response.reasoning_text.delta", text, None)
                case ToolCallStarted(_, name):
                    yield from self.close()
                    yield from self._begin(_call(name))
                case ToolCallArguments(_, text):
                    item = self.done[-1]
                    item["arguments"] += text
                    yield self._of_item("response.function_call_arguments.delta", delta=text)
                case ToolCallEnded():
                    yield from self.close()

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Ends the open item, if there is one."""
        kind, self._open = self._open, ""
        if not kind:
            return
        item = self.done[-1]
        item["status"] = status
        if kind == "function_call":
            given = item["arguments"]
            yield self._of_item("response.function_call_arguments.done", arguments=given)
        else:
            part = item["content"][0]
            if kind == "message":
                text = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._of_item("response.output_text.done", content_index=0, **text)
            else:
                yield self._of_item(
                    "response.reasoning_text.done", content_index=0, text=part["text"]
                )
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._of_place("response.output_item.done", item=item)

    def _enter(self, kind: str) -> Iterator[Event]:
        if self._open == kind:
            return
        yield from self.close()
        yield from self._begin(_message() if kind == "message" else _reasoning())
        part = self.done[-1]["content"][0]
        yield self._of_item("response.content_part.added", content_index=0, part={**part})

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self._open = item["type"]
        self.done.append(item)
        shown = {**item, "content": []} if "content" in item else {**item}
        yield self._of_place("response.output_item.added", item=shown)

    def _text(self, event: str, text: str, logprobs: list[Any] | None) -> Iterator[Event]:
        part = self.done[-1]["content"][0]
        part["text"] += text
        more = {}
        if logprobs is not None:
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield self._of_item(event, content_index=0, delta=text, **more)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return self._of_place(kind, item_id=self.done[-1]["id"], **fields)

    def _of_place(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "output_index": len(self.done) - 1, **fields}


def _message() -> dict[str, Any]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [part],
    }


def _reasoning() -> dict[str, Any]:
    return {
        "id": f"rs_{uuid.uuid4().hex}",
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": ""}],
    }


def _call(name: str) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }
