"""Picks the first implementation that accepts the arguments, and explains refusals.

Implementations say two different things in two different ways: ``ValueError`` when the arguments
are wrong for anyone, ``NotImplementedError`` when they are fine but this implementation cannot take
them. Dispatch stops at the first and moves on after the second. What the arguments mean, and the
order in which implementations are tried, belongs to the kernel family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

AUTO = "auto"


@dataclass
class Choices:
    """What was chosen while programs were traced."""

    taken: dict[str, list[str]] = field(default_factory=dict)
    """Implementations of each family, in the order in which they were first taken."""
    declined: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of each family, the reason of every implementation that declined, the first time."""


_choices: ContextVar[Choices | None] = ContextVar("choices", default=None)
_forced: ContextVar[Mapping[str, str]] = ContextVar("forced")


@contextmanager
def recorded() -> Iterator[Choices]:
    """Keeps what ``dispatch`` chooses in here, on this thread."""
    choices = Choices()
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


@contextmanager
def forced(names: Mapping[str, str]) -> Iterator[None]:
    """Takes these implementations, by family, where callers leave the choice to ``dispatch``."""
    token = _forced.set(names)
    try:
        yield
    finally:
        _forced.reset(token)


def dispatch[R](
    family: str,
    implementations: Mapping[str, Callable[..., R]],
    choice: str,
    /,
    *args: object,
    **kwargs: object,
) -> R:
    """Calls the chosen implementation, or the first that accepts the arguments.

    Args:
        family: Name of the kernel family, for messages.
        implementations: Candidates by name, best first.
        choice: One of the names, or ``"auto"`` to try them in order.
        *args: Handed to the implementation.
        **kwargs: Handed to the implementation.

    Returns:
        What the accepting implementation returned.

    Raises:
        ValueError: ``choice`` names no implementation, or the arguments are wrong for any of them.
        ExceptionGroup: Every candidate declined; it holds each one's reason.
    """
    if choice == AUTO:
        choice = _forced.get({}).get(family, AUTO)
    if choice == AUTO:
        candidates = implementations
    elif choice in implementations:
        candidates = {choice: implementations[choice]}
    else:
        raise ValueError(
            f"{family} has no implementation {choice!r}; "
            f"choose {AUTO!r} or one of {', '.join(map(repr, implementations))}"
        )
    declined: list[NotImplementedError] = []
    choices = _choices.get() or Choices()
    for name, implementation in candidates.items():
        try:
            result = implementation(*args, **kwargs)
        except NotImplementedError as reason:
            reason.add_note(f"said by {family} implementation {name!r}")
            declined.append(reason)
            choices.declined.setdefault(family, {}).setdefault(name, str(reason))
        else:
            taken = choices.taken.setdefault(family, [])
            if name not in taken:
                taken.append(name)
            return result
    raise ExceptionGroup(
        f"no implementation of {family} accepts these arguments (tried {', '.join(candidates)})",
        declined,
    )
