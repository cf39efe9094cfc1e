"""Every family of kernels and its implementations, for whoever lets people choose among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pallas_kernels import grouped_matmul, paged_attention, quantized_matmul

FAMILIES: Mapping[str, Iterable[str]] = {
    "paged_attention": paged_attention.IMPLEMENTATIONS,
    "append": paged_attention.APPENDS,
    "rope_append": paged_attention.ROPE_APPENDS,
    "rotation": paged_attention.ROTATIONS,
    "quantized_matmul": quantized_matmul.IMPLEMENTATIONS,
    "feed_forward": quantized_matmul.FEED_FORWARDS,
    "best_product": quantized_matmul.BEST_IMPLEMENTATIONS,
    "grouped_matmul": grouped_matmul.IMPLEMENTATIONS,
}
"""As ``dispatch`` names them, with the names of their implementations, best first."""


def parse_choices(text: str) -> dict[str, str]:
    """Reads ``FAMILY=NAME,...``; ``auto`` and nothing choose nothing.

    Raises:
        ValueError: A part is not of this form, names what there is not, or says it again.
    """
    chosen: dict[str, str] = {}
    for part in text.split(",") if text not in ("", "auto") else ():
        family, _, name = part.strip().partition("=")
        if family not in FAMILIES:
            raise ValueError(
                f"{part!r} chooses for no family; give FAMILY=NAME with a family of "
                f"{', '.join(FAMILIES)}"
            )
        if name not in (names := list(FAMILIES[family])):
            raise ValueError(f"{part!r} names no implementation; {family} has {', '.join(names)}")
        if family in chosen:
            raise ValueError(f"{family} is chosen for twice; name one implementation of it")
        chosen[family] = name
    return chosen
