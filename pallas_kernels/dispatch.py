"""Picks the first implementation that accepts the arguments, and explains refusals.

Implementations say two different things in two different ways: ``ValueError`` when the arguments
are wrong for anyone, ``NotImplementedError`` when they are fine but this implementation cannot take
them. Dispatch stops at the first and moves on after the second. What the arguments mean, and the
order in which implementations are tried, belongs to the kernel family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

AUTO = "auto"


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
        candidates = implementations
    elif choice in implementations:
        candidates = {choice: implementations[choice]}
    else:
        raise ValueError(
            f"{family} has no implementation {choice!r}; "
            f"choose {AUTO!r} or one of {', '.join(map(repr, implementations))}"
        )
    declined: list[NotImplementedError] = []
    for name, implementation in candidates.items():
        try:
            return implementation(*args, **kwargs)
        except NotImplementedError as reason:
            reason.add_note(f"said by {family} implementation {name!r}")
            declined.append(reason)
    raise ExceptionGroup(
        f"no implementation of {family} accepts these arguments (tried {', '.join(candidates)})",
        declined,
    )
