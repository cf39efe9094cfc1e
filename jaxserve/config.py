"""What the operator asked for (``ServeConfig``) and the sizes that follow from the machine.

Two types, so that nothing is patched afterwards: a ``ServeConfig`` may say None ("choose for me"),
a ``LaunchPlan`` (in ``resolve.py``, where the model is known) may not. Flags, fields and JSON keys
have the same names. Environment variables are read in ``cli/`` only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short names of ``kv_dtype``, which becomes the long one."""
KV_DTYPES = (*DTYPES, "int8", "fp8", "int4")
STEP_OVERLAPS = ("auto", "on", "off")
READY_WITHS = ("auto", "first", "all")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("auto", "none", "int8", "int4", "fp8", "w8a8", "awq", "gptq")
PAGE_TOKENS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that can be asked for at launch. Checked as a whole; all problems are listed."""

    model: str = "smollm2"
    """A path, a hub id (``owner/name``), an alias, or ``dummy:NAME`` with random weights."""
    served_name: str | None = None
    """The name that requests use; None is derived from ``model``."""
    mesh: str = "1x1"
    """DATAxTENSOR, or ``data=1,tensor=1``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cpu:N`` (N simulated devices) or ``cuda``."""
    dtype: str = "auto"
    """Of weights and activations. auto: bfloat16 where it is fast, else float32."""
    quantization: str = "auto"
    """Of weight matrices: ``none``; ``int8``, ``int4`` and ``fp8`` round to it, ``w8a8`` to int8
    with a scale a row, so that activations may be rounded, too; ``auto`` rounds nothing and leaves
    weights as the checkpoint stores them (AWQ, GPTQ, compressed-tensors, GGUF); ``awq`` and
    ``gptq`` do too, and refuse a checkpoint of another tool."""
    kv_dtype: str = "auto"
    """Of cached keys and values. auto: as dtype. Half the bytes hold twice the tokens. int8, fp8
    and int4 keep a scale for each token and head, and are not exact: answers may part from those
    of floats. fp32, bf16 and fp16 are taken for float32, bfloat16 and float16."""
    kernels: str = "auto"
    """Which implementation computes what: ``FAMILY=NAME``, several with commas between them. auto:
    the best that takes the device, the shapes and the dtypes. A launch says what it has."""
    load_format: str = "auto"
    """``dummy`` takes the checkpoint's config with random weights."""
    seed: int = 0
    """Of random weights."""
    context_tokens: int | None = None
    """Prompt and answer together at most; None is the model's own window. Small saves table
    space; large needs pages for at least one such sequence."""
    max_rows: int = 64
    """Sequences computed together. Small wastes bandwidth; large makes every step longer."""
    step_tokens: int | None = None
    """Prompt tokens of one step; None is 256 on a CPU and 512 elsewhere. Small: prompts take long.
    Large: running answers stutter meanwhile."""
    page_tokens: int | None = None
    """Tokens in one page; None is 32 on a CPU and 64 elsewhere, as many as a GPU's kernel takes at
    once. Small wastes table space; large the tail of every sequence."""
    kv_memory_fraction: float | None = None
    """Share of the memory free after weights and temporaries that becomes pages. None is 0.9, and
    on a CPU at most the lesser of 2 GiB and a quarter of free memory."""
    kv_memory_bytes: int | None = None
    """Bytes of pages per device; overrides the fraction."""
    prefix_cache: bool = True
    """Share pages between requests that start alike."""
    prompt_logprobs: bool = True
    """Compile the programs that score prompts."""
    embeddings: bool = False
    """Compile the programs that embed prompts, for ``/v1/embeddings`` and ``Embed``."""
    max_waiting_requests: int = 1024
    """More are refused with RESOURCE_EXHAUSTED."""
    max_waiting_tokens: int = 1_048_576
    """Prompt tokens of all waiting requests; more are refused with RESOURCE_EXHAUSTED."""
    watchdog_s: float = 60.0
    """No finished step for so long while work waits: NOT_SERVING, then exit code 1."""
    step_overlap: str = "auto"
    """``on`` dispatches a step before the one before it is read: the device never waits for
    Python, and a new request waits for a step more. auto: on, but off on a CPU by itself, where
    both are the same processor."""
    ready_with: str = "auto"
    """``all`` compiles every program before ready. ``first`` compiles a few that every step can be
    made of, and the others beside the first requests, whose steps compute more padding meanwhile.
    auto: first on a CPU, but all with several hosts and with ``--executables``."""
    strict_compile: bool = False
    """Raise when anything is compiled after ready that is no program of ``ready_with`` (for tests).
    """
    chat_template: Path | None = None
    """A Jinja file instead of the model's own template."""
    offline: bool = False
    """Never ask a model hub."""
    assets_dir: Path
    """Where ``make assets`` puts pinned weights."""
    cache_dir: Path
    """Compiled programs and page counts are remembered here."""
    executables: Path | None = None
    """A directory that ``jaxserve compile`` has written: its programs are loaded, and nothing is
    compiled. It is refused when anything differs that they depend on. Trust it like the package:
    loading a program runs code."""

    def __post_init__(self) -> None:
        """Refuses what cannot work, all problems together."""
        if problems := [*self._of_another_type()]:
            raise ConfigError("; ".join(problems))
        object.__setattr__(self, "kv_dtype", DTYPE_ALIASES.get(self.kv_dtype, self.kv_dtype))
        if problems := [text for ok, text in self._checks() if not ok]:
            raise ConfigError("; ".join(problems))

    def _of_another_type(self) -> Iterator[str]:
        for name, kinds in _field_types().items():
            value = getattr(self, name)
            # True is an int to Python and to nobody else; an int is a float to everybody else.
            meant = (*kinds, int) if float in kinds else kinds
            if not isinstance(value, meant) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
                yield f"{name} is {value!r}; give {wanted}"

    def _checks(self) -> list[tuple[bool, str]]:
        return [
            (bool(self.model), "model is empty; give a path, a hub id, an alias or dummy:NAME"),
            (
                self.dtype in DTYPES,
                f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}",
            ),
            (
                self.kv_dtype in KV_DTYPES,
                f"kv_dtype is {self.kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}",
            ),
            (
                self.quantization in QUANTIZATIONS,
                f"quantization is {self.quantization!r}; choose one of {', '.join(QUANTIZATIONS)}",
            ),
            (
                self.step_overlap in STEP_OVERLAPS,
                f"step_overlap is {self.step_overlap!r}; choose one of {', '.join(STEP_OVERLAPS)}",
            ),
            (
                self.ready_with in READY_WITHS,
                f"ready_with is {self.ready_with!r}; choose one of {', '.join(READY_WITHS)}",
            ),
            (
                self.ready_with != "first" or self.executables is None,
                "ready_with is 'first' and executables is given, whose programs must all be there "
                "at launch; leave one of them out",
            ),
            (
                self.load_format in LOAD_FORMATS,
                f"load_format is {self.load_format!r}; choose one of {', '.join(LOAD_FORMATS)}",
            ),
            (
                self.context_tokens is None or self.context_tokens >= 2,
                f"context_tokens is {self.context_tokens}; at least 2 are needed",
            ),
            (1 <= self.max_rows <= 4096, f"max_rows is {self.max_rows}; choose 1 to 4096"),
            (
                self.step_tokens is None or 16 <= self.step_tokens <= 65_536,
                f"step_tokens is {self.step_tokens}; choose 16 to 65536",
            ),
            (
                self.page_tokens in (None, *PAGE_TOKENS),
                f"page_tokens is {self.page_tokens}; choose one of "
                f"{', '.join(map(str, PAGE_TOKENS))}",
            ),
            (
                self.kv_memory_fraction is None or 0 < self.kv_memory_fraction <= 1,
                f"kv_memory_fraction is {self.kv_memory_fraction}; choose above 0, at most 1",
            ),
            (
                self.kv_memory_bytes is None or self.kv_memory_bytes > 0,
                f"kv_memory_bytes is {self.kv_memory_bytes}; give a number of bytes above 0",
            ),
            (
                self.max_waiting_requests >= 1,
                f"max_waiting_requests is {self.max_waiting_requests}; at least 1",
            ),
            (
                self.max_waiting_tokens >= 1,
                f"max_waiting_tokens is {self.max_waiting_tokens}; at least 1",
            ),
            (self.watchdog_s > 0, f"watchdog_s is {self.watchdog_s:g}; give seconds above 0"),
        ]


_TYPE_NAMES = {
    type(None): "None",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a Path",
}


@cache
def _field_types() -> dict[str, tuple[type, ...]]:
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(ServeConfig).items()}


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """The hosts that share one mesh, and this one's place among them."""

    hosts: int = 1
    """Hosts that share the mesh; each runs this command."""
    host_id: int = 0
    """This host's number, from 0; host 0 schedules and serves."""
    coordinator: str = ""
    """HOST:PORT of host 0, as the other hosts reach it. The port has to be free there."""
    join_timeout_s: float = 120.0
    """How long to wait for every host to be there. Small fails early; large lets hosts boot."""
    host_timeout_s: float = 6.0
    """A host from which nothing comes for so long is lost, and the group ends. Small takes a busy
    host for a dead one; large keeps clients waiting for an answer that cannot come."""
    secret: bytes = field(default=b"", repr=False)
    """Known to every host of the group, and to nobody else."""

    def __post_init__(self) -> None:
        """Refuses what cannot work, all problems together."""
        problems = [text for ok, text in self._checks() if not ok]
        if problems:
            raise ConfigError("; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        host, _, port = self.coordinator.rpartition(":")
        written = _is_name(host) and port.isdecimal() and 0 < int(port) < 65536
        return [
            (1 <= self.hosts <= 1024, f"hosts is {self.hosts}; choose 1 to 1024"),
            (
                0 <= self.host_id < max(1, self.hosts),
                f"host_id is {self.host_id}; with --hosts {self.hosts} choose 0 to "
                f"{max(1, self.hosts) - 1}",
            ),
            (
                bool(self.coordinator) or self.hosts == 1,
                f"coordinator is empty; with --hosts {self.hosts} give HOST:PORT of host 0",
            ),
            (
                not self.coordinator or written,
                f"coordinator is {self.coordinator!r}; write HOST:PORT, such as 10.0.0.1:8476",
            ),
            (
                not is_unspecified(host.strip("[]")),
                f"coordinator is {self.coordinator!r}, which no other host can reach; give an "
                "address of host 0",
            ),
            (
                self.join_timeout_s > 0,
                f"join_timeout_s is {self.join_timeout_s:g}; give seconds above 0",
            ),
            (
                self.host_timeout_s > 0,
                f"host_timeout_s is {self.host_timeout_s:g}; give seconds above 0",
            ),
        ]

    @property
    def is_local(self) -> bool:
        """Whether the coordinator's address reaches this machine only."""
        return is_loopback(self.coordinator_address[0])

    @property
    def coordinator_address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine only."""
    address = _ip_address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_unspecified(host: str) -> bool:
    """Whether it stands for every address of a machine, and so for none that others reach."""
    address = _ip_address(host)
    return address is not None and address.is_unspecified


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_name(host: str) -> bool:
    """Whether it can be looked up at all."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def decode_buckets(max_rows: int, smallest: int) -> tuple[int, ...]:
    """Row counts that get a decode program: factors of 4 while small, then two for each doubling.

    A step costs what its bucket costs, and with doublings alone a quarter of it would be padding.

    >>> decode_buckets(64, 1)
    (1, 4, 16, 24, 32, 48, 64)
    >>> decode_buckets(10, 1)
    (1, 4, 10)
    """
    buckets: list[int] = []
    size = smallest
    while size < max_rows:
        buckets.append(size)
        if size < 16:
            size *= 4
        else:
            power_of_two = size.bit_count() == 1
            size = size * 3 // 2 if power_of_two else size * 4 // 3
    return (*buckets, max_rows)


PROMPT_LINES = 16
"""Prompts of one step, in each data shard, at most: lines of a prefill call. Each costs a place in
the head; more prompts wait for the next step."""


def prefill_buckets(step_tokens: int) -> tuple[tuple[int, int], ...]:
    """(lines, tokens of all of them) that get a prefill program: powers of two.

    >>> prefill_buckets(256)
    ((16, 16), (16, 64), (16, 128), (16, 256))
    """
    sizes = [size for size in (16, 64, 128, 256, 512, 1024, 2048) if size < step_tokens]
    return tuple((PROMPT_LINES, size) for size in (*sizes, step_tokens))


def score_buckets(prefill: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """(1, tokens) that get a program which scores a prompt: one small, one large.

    >>> score_buckets(prefill_buckets(512))
    ((1, 64), (1, 512))
    """
    sizes = [tokens for _, tokens in prefill]
    small = next((tokens for tokens in sizes if tokens >= 64), sizes[-1])
    return tuple((1, tokens) for tokens in sorted({small, sizes[-1]}))
