"""Files to windows of tokens: equally long, and each of one text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.frontend.tokenizer import Tokenizer


@dataclass(frozen=True)
class Windows:
    """What is scored."""

    prompts: list[list[int]]
    """Token ids of each window, behind the model's start token where it has one."""
    start_tokens: int
    """In front of each window; they are not scored."""
    text_bytes: int
    left_out_tokens: int
    """Behind the last window of each text, or beyond the most that were wanted."""

    @property
    def first_scored(self) -> int:
        """Index in a prompt of the first token that is scored: something stands before it."""
        return max(1, self.start_tokens)

    @property
    def scored_each(self) -> int:
        """Tokens of a window that are scored."""
        return len(self.prompts[0]) - self.first_scored


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Reads files of UTF-8.

    Raises:
        ConfigError: one is not there, empty, named twice, or not UTF-8.
    """
    texts = dict[str, str]()
    for path in paths:
        if str(path) in texts:
            raise ConfigError(f"--text {path} is given twice; give it once")
        try:
            text = path.read_bytes().decode()
        except OSError as error:
            raise ConfigError(f"--text {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--text {path} is not UTF-8 at byte {error.start:,}; convert it, for example with "
                "iconv"
            ) from error
        if not text.strip():
            raise ConfigError(f"--text {path} is empty; give a file with text")
        texts[str(path)] = text
    return texts


def cut(
    texts: Mapping[str, str], tokenizer: Tokenizer, window: int, most_windows: int | None = None
) -> Windows:
    """Cuts every text into windows of so many tokens.

    Args:
        texts: by name.
        tokenizer: of the model.
        window: tokens of a window, not counting a start token.
        most_windows: of each text; None takes all.

    Raises:
        ConfigError: a text is too short for one.
    """
    start = start_tokens(tokenizer)
    prompts, text_bytes, left_out = list[list[int]](), 0, 0
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < window:
            raise ConfigError(
                f"{name} has {len(ids):,} tokens and a window needs {window:,}; give a longer "
                "text, or a smaller --window"
            )
        count = min(len(ids) // window, most_windows or len(ids))
        prompts += [start + ids[n * window : (n + 1) * window] for n in range(count)]
        text_bytes += len(text.encode())
        left_out += len(ids) - count * window
    return Windows(prompts, len(start), text_bytes, left_out)


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns what the tokenizer puts in front of a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    places = range(len(whole) - len(plain) + 1)
    first = next((at for at in places if whole[at : at + len(plain)] == plain), 0)
    return whole[:first]
