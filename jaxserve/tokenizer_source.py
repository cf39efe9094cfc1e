"""The raw material of a tokenizer, as plain data.

``weights/`` reads checkpoints and ``frontend/`` builds tokenizers; neither knows the other. This
dataclass is what passes between them. Nothing is parsed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
"""The files of a Hugging Face directory that say something about tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """What a checkpoint knows about its tokenizer: files, or GGUF metadata, never both."""

    source: str
    """Path for messages."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of those of ``TOKENIZER_FILES`` that exist, by name."""
    gguf: Mapping[str, Any] | None = None
    """``tokenizer.*`` and ``general.architecture`` of a GGUF file; None for a directory."""
