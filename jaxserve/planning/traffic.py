"""What the sequences of a plan look like. Without jax, so that ``--help`` can say the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.errors import ConfigError

PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 256
"""Of a typical sequence, unless others are given."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A typical sequence."""

    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Of the whole sequence, which is what its last step reads."""
        return self.prompt_tokens + self.output_tokens


def typical(prompt_tokens: int | None, output_tokens: int | None, context_tokens: int) -> Traffic:
    """Returns a typical sequence; what is not given is shortened to fit the context.

    Raises:
        ConfigError: what is given does not fit.
    """
    prompt = min(PROMPT_TOKENS, context_tokens // 2) if prompt_tokens is None else prompt_tokens
    left = max(1, context_tokens - prompt)
    output = min(OUTPUT_TOKENS, left) if output_tokens is None else output_tokens
    if prompt < 1 or output < 1 or prompt + output > context_tokens:
        raise ConfigError(
            f"a prompt of {prompt} and an answer of {output} tokens are no sequence within "
            f"{context_tokens} tokens of context; change --prompt-tokens, --output-tokens or "
            "--context-tokens"
        )
    return Traffic(prompt_tokens=prompt, output_tokens=output)
