"""Writing grammars down: rules in Lark, in the dialect of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

ITEM_SEPARATOR, KEY_SEPARATOR = ", ?", ": ?"
"""Patterns. White space as templates write it, or none: weak models never leave a free choice."""
SPACING = {
    "whitespace_flexible": False,
    "item_separator": ITEM_SEPARATOR,
    "key_separator": KEY_SEPARATOR,
}


class Rules:
    """Collects the rules of one grammar."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """Begins with none; texts among ``special_tokens`` are written as the token."""
        self._rules: list[str] = []
        self._ids = special_tokens
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def __str__(self) -> str:
        return "\n".join(self._rules) + "\n"

    def add(self, name: str, *pieces: str) -> str:
        """Adds a rule of all pieces that are not empty; returns its name."""
        self._rules.append(f"{name}: {joined(*pieces)}")
        return name

    def is_token(self, text: str) -> bool:
        """Whether a text is one special token."""
        return text in self._ids

    def text(self, text: str) -> str:
        """Writes a literal; special tokens in it are tokens."""
        pieces = self._special.split(text) if self._ids else [text]
        return joined(
            *(
                f"<[{self._ids[piece]}]>" if piece in self._ids else dumps(piece)
                for piece in pieces
                if piece
            )
        )

    def up_to(self, name: str, mark: str, *, line: str = "", beginnings: Sequence[str] = ()) -> str:
        """Adds text that ends with the first ``mark``, and the mark; returns what stands for it.

        Args:
            name: of the rule, in small letters.
            mark: a marker that is a token, or letters.
            line: letters that belong to the mark, in front of it.
            beginnings: patterns, none of which the text begins with.
        """
        if self.is_token(mark):
            body = self.without(name.upper(), mark, ending=line, beginnings=beginnings)
            return joined(body, self.text(mark))
        # With a line in front, the first mark may be another one, which readers take.
        earlier = [f"(?s:.*){pattern(mark)}(?s:.)"] if line else []
        self.add(f"{name}[lazy]", _text_of(line + mark, [*earlier, *beginnings]))
        return name

    def without(
        self, name: str, mark: str, *, ending: str = "", beginnings: Sequence[str] = ()
    ) -> str:
        """Adds text in which ``mark`` does not stand; returns what stands for it.

        Not even in letters where the marker is a token: whoever reads the text sees no difference.

        Args:
            name: of the terminal, in capitals.
            mark: a text.
            ending: what the text ends with.
            beginnings: patterns, none of which the text begins with.
        """
        return self.add(name, _text_of(ending, [f"(?s:.*){pattern(mark)}", *beginnings]))


def _text_of(ending: str, beginnings: Sequence[str]) -> str:
    """Writes text that ends in a way and begins in none of some."""
    refused = (f"~/{each}(?s:.*)/" for each in beginnings)
    return " & ".join((f"/(?s:.*){pattern(ending)}/", *refused))


def joined(*pieces: str) -> str:
    """Writes one behind the other those that are not empty."""
    return " ".join(filter(None, pieces))


def as_json(schema: Mapping[str, Any]) -> str:
    """Writes JSON that obeys a schema."""
    return f"%json {dumps({**schema, 'x-guidance': SPACING})}"


def dumps(value: Any) -> str:
    """Writes JSON, and Lark's string literals, which are the same."""
    return json.dumps(value, ensure_ascii=False)


def pattern(text: str) -> str:
    """Writes a literal inside a regular expression between slashes."""
    # Not re.escape: an escaped angle bracket is a word's edge in llguidance.
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", r"\n")
