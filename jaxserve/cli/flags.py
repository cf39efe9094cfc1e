"""Flags made from the fields of a config dataclass: names, types, defaults and help are its own.

``max_rows: int = 64`` with its docstring becomes ``--max-rows``; ``prefix_cache: bool``
becomes ``--prefix-cache`` and ``--no-prefix-cache``. So flags and fields cannot drift apart.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from jaxserve.config import (
    DTYPE_ALIASES,
    DTYPES,
    KV_DTYPES,
    LOAD_FORMATS,
    QUANTIZATIONS,
    READY_WITHS,
    STEP_OVERLAPS,
    ServeConfig,
)
from jaxserve.errors import ConfigError

CHOICES = {
    "dtype": DTYPES,
    "quantization": QUANTIZATIONS,
    "kv_dtype": KV_DTYPES,
    "step_overlap": STEP_OVERLAPS,
    "ready_with": READY_WITHS,
    "load_format": LOAD_FORMATS,
}
ALIASES = {"kv_dtype": DTYPE_ALIASES}
"""Values that stand for others."""
NAMES = {"kv_memory_bytes": "kv-memory"}
"""Flags whose name is not the field's."""
OTHER_NAMES = {"kv_memory_fraction": ("--cache-max-entry-count",)}
"""Flags that people know from elsewhere."""
METAVARS = {
    "model": "MODEL",
    "mesh": "DxT",
    "device": "DEVICE",
    "kernels": "FAMILY=NAME",
    "kv_memory_bytes": "BYTES",
    "kv_memory_fraction": "F",
    "served_name": "NAME",
    "host": "ADDRESS",
    "coordinator": "HOST:PORT",
}
MODEL_FLAGS = ("served_name", "load_format", "seed", "chat_template", "offline")
MACHINE_FLAGS = ("mesh", "device", "dtype", "quantization", "kv_dtype", "kernels")
MEMORY_FLAGS = (
    "context_tokens",
    "max_rows",
    "step_tokens",
    "page_tokens",
    "kv_memory_fraction",
    "kv_memory_bytes",
    "prefix_cache",
    "prompt_logprobs",
    "embeddings",
)
LIMIT_FLAGS = (
    "max_waiting_requests",
    "max_waiting_tokens",
    "watchdog_s",
    "step_overlap",
    "ready_with",
    "strict_compile",
)
PLACE_FLAGS = ("assets_dir", "cache_dir")

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_fields(
    parser: argparse.ArgumentParser,
    title: str,
    cls: type,
    names: Iterable[str],
    defaults: dict[str, Any] | None = None,
) -> Any:
    """Adds a group of flags for some fields of a dataclass; returns the group."""
    group = parser.add_argument_group(title)
    for name in names:
        _add_field(group, cls, name, defaults or {})
    return group


def add_engine_flags(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Adds what commands that compute in this process take, besides their own flags."""
    add_model_flags(parser, defaults)
    add_fields(parser, "loading", ServeConfig, ("load_format", "chat_template"))
    machine = add_fields(parser, "machine", ServeConfig, MACHINE_FLAGS)
    add_tensor_alias(machine)
    add_fields(parser, "steps and memory", ServeConfig, MEMORY_FLAGS, defaults)


def add_model_flags(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Adds ``--model`` and where it is looked for."""
    names = ("model", "offline", *PLACE_FLAGS)
    add_fields(parser, "model", ServeConfig, names, defaults)


def add_tensor_alias(group: Any) -> None:
    """Adds ``--tp N``, the name that people know for ``--mesh 1xN``."""
    group.add_argument(
        "--tp",
        action=_StoreMesh,
        type=_positive,
        dest="mesh",
        metavar="N",
        help="the same as --mesh 1xN",
    )


def field_values(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns what was parsed for the fields of a dataclass."""
    parsed = vars(options)
    return {field.name: parsed[field.name] for field in fields(cls) if field.name in parsed}


def server_for(
    options: argparse.Namespace, from_environment: str | None, defaults: dict[str, Any]
) -> str | None:
    """Decides between a server and this process, for commands that can use either.

    Args:
        options: with ``server``, and fields of ``ServeConfig``, which only this process uses.
        from_environment: the server that JAXSERVE_SERVER names; flags win over it.
        defaults: of the fields, where they are not the dataclass's own.

    Raises:
        ConfigError: a server was named together with flags that it would not hear of.
    """
    standard = {field.name: field.default for field in fields(ServeConfig)} | defaults
    parsed = field_values(options, ServeConfig)
    given = [name for name, value in parsed.items() if value != standard[name]]
    if options.server is None:
        return None if given else from_environment
    if not options.server:
        raise ConfigError("--server is empty; write HOST:PORT, or leave it out to compute here")
    if given:
        names = ", ".join(_flag(name) for name in given)
        raise ConfigError(
            f"{names}: a server decides that for itself; leave the flag out, or leave --server out "
            "to compute here"
        )
    return options.server


def parse_bytes(text: str) -> int:
    """Reads a number of bytes, with a unit if need be.

    >>> parse_bytes("2GiB"), parse_bytes("512 MiB"), parse_bytes("1000")
    (2147483648, 536870912, 1000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of bytes; write for example 2GiB, 512MiB or 1073741824"
        )
    return int(float(match[1]) * _UNITS[match[2]])


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Returns the docstring below each field of a dataclass, as one paragraph."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, after in itertools.pairwise(node.body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            text = " ".join(ast.literal_eval(after.value).split()).replace("``", "")
            docs[ast.unparse(field.target)] = text
    return docs


def _add_field(group: Any, cls: type, name: str, defaults: dict[str, Any]) -> None:
    (field,) = (field for field in fields(cls) if field.name == name)
    default = defaults.get(name, field.default)
    assert default is not MISSING, f"{name} needs a default"
    flag = _flag(name)
    text = _help(name, cls)
    if default is not None:
        shown = ("on" if default else "off") if isinstance(default, bool) else default
        text += f" (default: {shown})"
    kind = _plain_type(get_type_hints(cls)[name])
    if kind is bool:
        group.add_argument(
            flag, dest=name, action=argparse.BooleanOptionalAction, default=default, help=text
        )
        return
    read: Callable[[str], Any] = parse_bytes if name == "kv_memory_bytes" else kind
    if name in ALIASES:
        read = _reader(ALIASES[name])
    group.add_argument(
        flag,
        *OTHER_NAMES.get(name, ()),
        dest=name,
        action=_StoreMesh if name == "mesh" else "store",
        type=read,
        default=default,
        choices=CHOICES.get(name),
        metavar=None if name in CHOICES else METAVARS.get(name, _metavar(name, kind)),
        help=text,
    )


def _reader(aliases: dict[str, str]) -> Callable[[str], str]:
    """Reads a value, or what stands for it."""
    return lambda text: aliases.get(text, text)


class _StoreMesh(argparse.Action):
    """Refuses ``--mesh`` and ``--tp`` together, unless they agree."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = getattr(namespace, "meshes", {}) | {option_string: values}
        if len(set(given.values())) > 1:
            mesh, tensor = given["--mesh"], given["--tp"].removeprefix("1x")
            parser.error(
                f"--mesh {mesh} and --tp {tensor} are both given, and --tp {tensor} is --mesh "
                f"1x{tensor}; give one of them"
            )
        namespace.meshes = given
        setattr(namespace, self.dest, values)


def _flag(name: str) -> str:
    return f"--{NAMES.get(name, name.replace('_', '-'))}"


def _help(name: str, cls: type = ServeConfig) -> str:
    text = re.sub(r"\bNone( is)?\b", "if not given,", field_docs(cls)[name].rstrip("."))
    return text.replace("%", "%%")


def _plain_type(hint: Any) -> Any:
    """``int | None`` is read as an int."""
    if get_origin(hint) in (types.UnionType, Union):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint


def _metavar(name: str, kind: Any) -> str:
    if name.endswith("_s"):
        return "SECONDS"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _positive(text: str) -> str:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of devices; write for example 2")
    return f"1x{text}"
