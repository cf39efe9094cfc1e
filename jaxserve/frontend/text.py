"""Text out of tokens that arrive one by one, cut at the first stop string.

    token ids -> bytes -> characters -> stop-string automaton -> text that is safe to send

Bytes wait until they make a character, characters wait while they could still become a stop
string. Nothing here decides when a sequence ends for the engine; the caller does, from ``stopped``.

Not the ``tokenizers`` library's ``DecodeStream``: it decodes its whole buffer again for every token
while the buffer ends in half a character (0.5 to 1.5 ms a token after 4,000 continuation bytes),
and raises for byte-fallback runs that are not UTF-8. Both can come from a model at any time.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable


@runtime_checkable
class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    @property
    def special_ids(self) -> Set[int]:
        """Ids of control tokens."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Whether decoded text loses its first character when that is a space."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for."""
        ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a push has made certain."""

    text: str
    """May be empty: half a character, or what could still become a stop string."""
    stopped: bool
    """A stop string is complete; nothing more will come."""
    tokens: int
    """How many of the pushed tokens were looked at; the last one completed the stop string."""
    stop: str | None = None
    """The stop string that was found."""


class TextAssembler:
    """Turns one choice's tokens into text. Costs a few microseconds a token.

    The stop string that is complete first wins; of several completed by one character, the longest.
    That depends on the text alone, not on how it was cut into tokens.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        kept: Collection[int] = (),
        context: Sequence[int] = (),
    ) -> None:
        """Starts at the beginning of an answer, or behind ``context``.

        Args:
            tokenizer: where bytes come from.
            stop: none of them empty.
            include_stop: keep the stop string at the end of the text.
            skip_special_tokens: leave control tokens out of the text.
            kept: control tokens that stay all the same.
            context: output tokens whose text has been sent already (a resumed answer). Text that
                was held back when they were sent comes with the first push.
        """
        self._token_bytes = tokenizer.token_bytes
        self._skip: Set[int] = frozenset()
        if skip_special_tokens:
            self._skip = tokenizer.special_ids - frozenset(kept) if kept else tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_leading_space
        self._stops = _automaton(tuple(stop)) if stop else None
        self._state = 0
        self._held = ""
        self._include_stop = include_stop
        self.stop: str | None = None
        """The stop string that was found, if any."""
        self.push(context)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop is not None

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Takes the next tokens and returns the text that they make certain."""
        if self.stop is not None:
            return TextDelta("", True, 0, self.stop)
        if self._stops is None:
            raw = b"".join([self._token_bytes(i) for i in token_ids if i not in self._skip])
            return TextDelta(self._characters(raw), False, len(token_ids))
        texts = []
        for count, token_id in enumerate(token_ids, start=1):
            if token_id in self._skip:
                continue
            texts.append(self._scan(self._characters(self._token_bytes(token_id)), self._stops))
            if self.stop is not None:
                return TextDelta("".join(texts), True, count, self.stop)
        return TextDelta("".join(texts), False, len(token_ids))

    def finish(self) -> str:
        """Returns what is still held back; half a character becomes U+FFFD."""
        if self.stop is not None:
            return ""
        rest = self._characters(b"", final=True)
        if self._stops is not None:
            rest = self._scan(rest, self._stops)
        if self.stop is None:
            rest, self._held = rest + self._held, ""
            self._state = 0
        return rest

    def _characters(self, raw: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(raw, final)
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text

    def _scan(self, text: str, stops: StopAutomaton) -> str:
        """Moves the automaton over new text and returns what cannot be part of a stop string."""
        state = self._state
        for position, char in enumerate(text, start=1):
            state = stops.step(state, char)
            found = stops.found[state]
            if found:
                seen = self._held + text[:position]
                self.stop = seen[len(seen) - found :]
                self._held = ""
                return seen if self._include_stop else seen[: len(seen) - found]
        self._state = state
        seen = self._held + text
        safe = len(seen) - stops.depth[state]
        self._held = seen[safe:]
        return seen[:safe]


class StopAutomaton:
    """Finds any of several strings in text that arrives in pieces (Aho and Corasick 1975).

    A state is the longest suffix of the text so far that begins some stop string, so its depth is
    exactly how much has to be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Builds the states; time and space grow with the characters of all stops."""
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        """Characters that a state stands for."""
        self.found = [0]
        """Length of the longest stop string that ends in a state; 0 for none."""
        for stop in stops:
            self._add(stop)
        self._fail = [0] * len(self.depth)
        self._link()

    def step(self, state: int, char: str) -> int:
        """Returns the state after one more character."""
        while True:
            target = self._next[state].get(char)
            if target is not None:
                return target
            if state == 0:
                return 0
            state = self._fail[state]

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            target = self._next[state].get(char)
            if target is None:
                target = len(self.depth)
                self._next[state][char] = target
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.found.append(0)
            state = target
        self.found[state] = len(stop)

    def _link(self) -> None:
        # Breadth first, so that the shorter suffixes that a state falls back to are linked already.
        queue = list(self._next[0].values())
        for state in queue:
            for char, target in self._next[state].items():
                self._fail[target] = self.step(self._fail[state], char)
                self.found[target] = self.found[target] or self.found[self._fail[target]]
                queue.append(target)


@lru_cache(maxsize=16)
def _automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """Shares one automaton among the choices of a request; it is never written once built."""
    return StopAutomaton(stops)
