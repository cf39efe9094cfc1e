"""What a checkpoint's ``quantization_config`` says, for the tools whose files are read.

AWQ's is that of AutoAWQ, GPTQ's that of AutoGPTQ and GPTQModel, and compressed-tensors' that of
llm-compressor. Whatever is said there that would change the numbers is understood or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxserve.errors import UnsupportedModelError

if TYPE_CHECKING:  # Reading a tokenizer needs no JAX.
    from pallas_kernels.quantized_matmul import Format, Kind

type Method = Literal["awq", "gptq", "compressed-tensors"]
SUPPORTED = (
    "AWQ with 4 bits (version gemm), GPTQ with 4 or 8 bits (format gptq or gptq_v2), and "
    "compressed-tensors' pack-quantized with 4 or 8 bits, int-quantized with 8 and float-quantized "
    "with 8"
)
GROUP_OF_A_ROW = 128
"""Columns of int8 that share a scale where the file has one for a row, and floats multiply them."""
_SAME_PER_MODULE = "modules that are quantized alike, or not at all"


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of a checkpoint are quantized."""

    method: Method
    kind: Kind
    """What they are held as."""
    bits: int
    group: int | None
    """Columns that share a scale; None: all of a row."""
    is_packed: bool = True
    """Several values in an int32; compressed-tensors alone also stores them one by one."""
    zero_shift: int = 0
    """Added to a stored zero point: GPTQ's first format stores one less."""
    has_zeros: bool = True
    """Zero points are stored; without them the middle of the range stands for zero."""
    has_order: bool = False
    """Columns of a group need not be neighbours, and a tensor says which is in which."""
    rounds_activations: bool = False
    """The tool's own kernels multiply by activations of as few bits."""

    @property
    def format(self) -> Format:
        """Of a layer whose columns are in order."""
        from pallas_kernels.quantized_matmul import Spec

        return Spec(self.kind, self.held_group).name

    @property
    def held_group(self) -> int | None:
        """``group``, but where activations must stay as they are: one scale for a row of int8
        allows them to be rounded, and repeated ones do not."""
        is_one = self.kind == "int8" and self.group is None
        return GROUP_OF_A_ROW if is_one and not self.rounds_activations else self.group


def scheme_of(source: str, config: Mapping[str, Any]) -> Scheme | None:
    """Reads a model's config; None when its weights are plain numbers.

    Args:
        source: of the config, for messages.
        config: a ``config.json``.

    Raises:
        UnsupportedModelError: it is quantized in a way that is not read.
    """
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    read = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}.get(str(method))
    if read is None:
        raise _unsupported(source, f"quant_method is {method!r}")
    return read(source, said)


def _awq(source: str, said: Mapping[str, Any]) -> Scheme:
    bits = said.get("bits", said.get("w_bit"))
    if bits != 4:
        raise _unsupported(source, f"AWQ's bits are {bits!r}")
    version = str(said.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unsupported(source, f"AWQ's version is {version!r}")
    if not said.get("zero_point", True):
        raise _unsupported(source, "AWQ's zero_point is false")
    return Scheme(
        "awq", "int4", 4, _group(source, said.get("group_size", said.get("q_group_size")))
    )


def _gptq(source: str, said: Mapping[str, Any]) -> Scheme:
    bits = said.get("bits")
    if bits not in (4, 8):
        raise _unsupported(source, f"GPTQ's bits are {bits!r}")
    layout = str(said.get("checkpoint_format", said.get("format", "gptq"))).lower()
    if layout not in ("gptq", "gptq_v2") or said.get("is_marlin_format"):
        raise _unsupported(source, f"GPTQ's checkpoint_format is {layout!r}")
    # "-:" leaves modules out, which their tensors show; anything else quantizes them otherwise.
    dynamic = said.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise _unsupported(source, f"GPTQ's dynamic is {dynamic!r}", _SAME_PER_MODULE)
    if changed := [key for key in dynamic if not str(key).startswith("-:")]:
        raise _unsupported(source, f"GPTQ's dynamic has {changed[0]!r}", _SAME_PER_MODULE)
    return Scheme(
        "gptq",
        "int4" if bits == 4 else "int8",
        bits,
        _group(source, said.get("group_size")),
        zero_shift=1 if layout == "gptq" else 0,
        has_order=bool(said.get("desc_act")),
    )


def _compressed(source: str, said: Mapping[str, Any]) -> Scheme:
    for key in ("sparsity_config", "kv_cache_scheme", "transform_config"):
        value = said.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise _unsupported(source, f"compressed-tensors' {key} is set")
    said_groups = said.get("config_groups")
    groups = list(said_groups.values()) if isinstance(said_groups, Mapping) else []
    if len(groups) != 1:
        raise _unsupported(
            source, f"compressed-tensors' config_groups are {len(groups)}", _SAME_PER_MODULE
        )
    if not isinstance(groups[0], Mapping) or not isinstance(groups[0].get("weights"), Mapping):
        raise _unsupported(
            source, "compressed-tensors' config_groups do not say how weights are quantized"
        )
    layout = str(groups[0].get("format") or said.get("format"))
    weights = groups[0]["weights"]
    bits, number = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy")
    what = f"compressed-tensors' {layout} has {number}{bits} weights by {strategy}"
    is_packed = layout == "pack-quantized"
    known = {
        "pack-quantized": number == "int" and bits in (4, 8),
        "int-quantized": number == "int" and bits == 8,
        "float-quantized": number == "float" and bits == 8,
        "naive-quantized": bits == 8,
    }
    strategies = ("tensor", "channel", "group")
    if not known.get(layout) or strategy not in strategies or weights.get("dynamic"):
        raise _unsupported(source, what, f"{SUPPORTED}, by tensor, channel or group")
    if weights.get("actorder") in (True, "group", "dynamic"):
        raise _unsupported(source, f"{what} with actorder {weights['actorder']!r}")
    symmetric = bool(weights.get("symmetric", True))
    if not symmetric and not (is_packed and bits == 4):
        raise _unsupported(source, f"{what} that are not symmetric")
    kind = "fp8" if number == "float" else ("int4" if bits == 4 else "int8")
    group = _group(source, weights.get("group_size")) if strategy == "group" else None
    return Scheme(
        "compressed-tensors",
        kind,
        bits,
        group,
        is_packed=is_packed,
        has_zeros=not symmetric,
        rounds_activations=bool(groups[0].get("input_activations")),
    )


def _group(source: str, size: object) -> int | None:
    if size in (-1, None):
        return None
    if type(size) is not int or size <= 0 or size % 32:
        raise _unsupported(source, f"group_size is {size!r}", "-1 and multiples of 32")
    return size


def _unsupported(source: str, what: str, supported: str = SUPPORTED) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source} is quantized in a way that is not implemented: {what}; supported: {supported}"
    )
