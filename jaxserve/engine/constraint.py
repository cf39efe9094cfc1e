"""What the engine asks of a grammar: which tokens may come next, and that one has come.

Grammars are compiled by the front end (``frontend/grammar_compiler.py``), on no thread of the
engine. Here they are a ``Constraint``, of which every choice of a request takes a ``Matcher``. A
matcher stands behind the newest *published* token, so a step with constrained rows is read before
the next is planned (``Engine.run_once``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    # Clients import requests, and have no use for arrays.
    import numpy as np


@runtime_checkable
class Matcher(Protocol):
    """Where one choice stands in its grammar. Engine thread only."""

    @property
    def complete(self) -> bool:
        """True when nothing but the end may follow."""
        ...

    @property
    def error(self) -> str:
        """Why it cannot go on; empty while it can."""
        ...

    def fill(self, words: np.ndarray) -> None:
        """Writes which tokens may come next: bit ``t % 32`` of word ``t // 32`` is token ``t``.

        No token may come when the grammar has passed a limit, which ``error`` then says.

        Args:
            words: int32 [ceil(V / 32)], contiguous.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Goes on by a token that was chosen; False when the grammar does not have it."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """A compiled grammar. Shared by requests; never changes."""

    def matcher(self, tokens: Sequence[int] = ()) -> Matcher:
        """Returns a new matcher behind ``tokens``, which the answer begins with."""
        ...


def mask_words(vocab_size: int) -> int:
    """Words of a mask.

    >>> mask_words(49_152), mask_words(259)
    (1536, 9)
    """
    return -(-vocab_size // 32)
