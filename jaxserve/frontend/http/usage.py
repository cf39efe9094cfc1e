"""Tokens of one HTTP request, counted while its answer comes."""

from __future__ import annotations

from typing import Any

from jaxserve.frontend.text_stream import Delta, Output, Started


class Usage:
    """Counts prompts, each of which may have several choices."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._prompts: dict[int, Started] = {}
        self._output_tokens: dict[tuple[int, int], int] = {}

    def count(self, place: int, output: Output) -> None:
        """Takes what came of the prompt at ``place``."""
        if isinstance(output, Started):
            self._prompts[place] = output
        elif not isinstance(output, Delta):
            self._output_tokens[place, output.choice] = output.output_tokens
        elif not output.prompt:
            made = output.first_index + len(output.token_ids)
            self._output_tokens[place, output.choice] = made

    def shown(self) -> dict[str, Any]:
        """Returns the counts as OpenAI has them."""
        prompt = sum(each.prompt_tokens for each in self._prompts.values())
        completion = sum(self._output_tokens.values())
        cached = sum(each.cached_tokens for each in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
