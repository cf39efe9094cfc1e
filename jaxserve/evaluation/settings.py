"""Settings: named combinations of launch flags, and others in free form.

Every setting is the unquantized model but for what it says, so a name says one thing. Which values
a flag takes is this version's own list in ``config``; names of values that are not on it are known
by what they need, and are refused.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from jaxserve.config import DTYPE_ALIASES, DTYPES, KV_DTYPES, PAGE_TOKENS, QUANTIZATIONS
from jaxserve.errors import ConfigError

PLAIN: dict[str, Any] = {"quantization": "none", "kv_dtype": "auto"}
"""Weights as numbers of the launch's dtype, and a cache of the same."""
NAMED: dict[str, dict[str, Any]] = {
    "unquantized": {},
    "float32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"},
    "kv-bf16": {"kv_dtype": "bfloat16"},
    "kv-int8": {"kv_dtype": "int8"},
    "kv-fp8": {"kv_dtype": "fp8"},
    "kv-int4": {"kv_dtype": "int4"},
    "stored": {"quantization": "auto"},
    "int8": {"quantization": "int8"},
    "w8a16": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "int4": {"quantization": "int4"},
    "w4a16": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "awq": {"quantization": "awq"},
    "gptq": {"quantization": "gptq"},
}
"""Flags of each name, beside ``PLAIN``. ``stored`` takes a checkpoint's own quantized weights."""
BASE = "unquantized"
USUAL = (BASE, "kv-int8", "kv-fp8", "kv-int4", "w8a16", "w8a8", "w4a16")
"""Measured when none are named, as far as this version has them."""
CHOICES: dict[str, tuple[Any, ...] | None] = {
    "model": None,
    "dtype": DTYPES,
    "quantization": QUANTIZATIONS,
    "kv_dtype": KV_DTYPES,
    "page_tokens": PAGE_TOKENS,
    "step_tokens": None,
    "seed": None,
}
"""What a setting may say, and the values that there are; None: any."""
NUMBERS = ("page_tokens", "step_tokens", "seed")


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    flags: dict[str, Any]
    """Fields of ``ServeConfig`` in which it differs from the others."""


def parse_settings(text: str) -> list[Setting]:
    """Reads ``NAME,NAME=FLAG:VALUE+FLAG:VALUE,...``; the first is what others are compared with.

    >>> parse_settings("bf16,mine=kv-dtype:int8+page-tokens:16")[1].flags["page_tokens"]
    16

    Raises:
        ConfigError: a name, a flag or a value is not known; the message names those that are.
    """
    settings = [_parse(part.strip()) for part in text.split(",") if part.strip()]
    if not settings:
        raise ConfigError(f"--settings is empty; name some of {', '.join(known_names())}")
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"setting {name!r} is given {names.count(name)} times; give it once")
    return settings


def usual_settings() -> str:
    """Returns those of ``USUAL`` that this version has."""
    return ",".join(name for name in USUAL if name in known_names())


def known_names() -> list[str]:
    """Returns the names whose flags this version knows."""
    return [name for name, flags in NAMED.items() if _problem(flags) is None]


def _parse(text: str) -> Setting:
    name, has_flags, written = text.partition("=")
    if not has_flags:
        if name not in NAMED:
            close = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.6)
            meant = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(
                f"there is no setting {name!r}{meant} Choose from {', '.join(known_names())}, or "
                "write NAME=FLAG:VALUE+FLAG:VALUE"
            )
        flags = NAMED[name]
    else:
        flags = dict(_flag(name, each) for each in written.split("+"))
    if not name:
        raise ConfigError(f"setting {text!r} has no name; write NAME=FLAG:VALUE")
    if (problem := _problem(flags)) is not None:
        raise ConfigError(f"setting {name!r} {problem}")
    return Setting(name, PLAIN | flags)


def _flag(setting: str, text: str) -> tuple[str, Any]:
    flag, colon, value = text.partition(":")
    field = flag.strip().removeprefix("--").replace("-", "_")
    if field not in CHOICES or not colon or not value.strip():
        known = ", ".join(name.replace("_", "-") for name in CHOICES)
        raise ConfigError(
            f"setting {setting!r} says {text!r}; write FLAG:VALUE with a flag of {known}"
        )
    value = value.strip()
    if field not in NUMBERS:
        return field, DTYPE_ALIASES.get(value, value) if field.endswith("dtype") else value
    if not value.isdecimal():
        raise ConfigError(f"setting {setting!r} sets {flag} to {value!r}; give a whole number")
    return field, int(value)


def _problem(flags: dict[str, Any]) -> str | None:
    for field, value in flags.items():
        known = CHOICES[field]
        if known is not None and value not in known:
            return (
                f"needs --{field.replace('_', '-')} {value}, which this version does not know; it "
                f"knows {', '.join(map(str, known))}"
            )
    return None
