"""A GGUF file seen as a checkpoint: Hugging Face names, layouts and conventions.

Undoes what the conversion to GGUF did: names, the row order of Q and K in the llama architecture,
and Gemma 3's norm weights, which are stored as ``1 + w``. Parsing of the container is in
``gguf_file.py``, the config in ``gguf_config.py``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights.gguf_blocks import BLOCKS, GROUP
from jaxserve.weights.gguf_config import config_from_metadata
from jaxserve.weights.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from jaxserve.weights.reading import ByteFile, Index, read_spans, resolve_index

if TYPE_CHECKING:  # Reading a tokenizer needs no JAX.
    from pallas_kernels.quantized_matmul import Format

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
)
SUPPORTED_TYPES = (*(t.name for t in _PLAIN), *sorted(t.name for t in _QUANTIZED))

PIECE_VALUES = 1 << 20
"""Values dequantized at a time; a few MiB, so that the copies stay in the processor's cache."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_BLOCK = {**_BLOCK, "ffn_up": "mlp.gate_up_proj"}
_QWEN_MOE_BLOCK = {
    **_BLOCK,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_BLOCK = {
    **_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_BLOCKS = {
    # By model_type, since Mixtral is a llama here.
    "gemma3_text": _GEMMA3_BLOCK,
    "phi3": _PHI3_BLOCK,
    "mixtral": _MIXTRAL_BLOCK,
    "qwen2_moe": _QWEN_MOE_BLOCK,
    "qwen3_moe": _QWEN_MOE_BLOCK,
}
"""A name with ``{}`` is that of each expert, whose tensors are one in the file."""
_ROWS = "shared_expert_gate.weight"
"""A matrix of one row, which the conversion may have made a vector."""
_CONFIG_TENSORS = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)
"""Tensors that are really configuration; ``gguf_config.py`` has read them."""
_PERMUTED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")


class GgufCheckpoint:
    """One GGUF file. Tensors are read and dequantized one at a time, on demand."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        """Reads the header and checks that every tensor has a place and a known type."""
        self.source = os.fspath(path)
        self._header = read_gguf_header(path)
        if not self._header.tensors:
            raise CheckpointError(
                f"{self.source} holds a vocabulary only and no tensors; give the file with weights"
            )
        self._architecture = self._header.metadata.get("general.architecture")
        self._file = ByteFile(path)
        try:
            self.config: dict[str, Any] = config_from_metadata(
                self.source,
                self._header.metadata,
                frozenset(self._header.tensors),
                self._read_small,
            )
            self._tensors = self._map_names()
        except CheckpointError:
            self._file.close()
            raise

    def names(self) -> list[str]:
        """Returns the tensor names, in Hugging Face's naming."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that ``read`` gives, ``[out, in]`` for a matrix."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the dtype that ``read`` gives; float32 for quantized tensors."""
        return _PLAIN.get(self._tensor(name).type, np.dtype(np.float32))

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads one tensor, or a box of it, dequantized.

        Only the rows that the box touches are read. Arithmetic is float32.
        """
        tensor = self._tensor(name)
        spans = resolve_index(name, tensor.shape, index)
        return self._undo_norm(tensor, self._in_order(tensor, spans, self._read_box))

    def stored_format(self, name: str) -> Format | None:
        """Returns the format of the tensor's blocks; None for one that ``Quantized`` has not."""
        blocks = BLOCKS.get(self._tensor(name).type)
        return None if blocks is None else blocks.format

    def stored_as(self, name: str) -> str | None:
        """Returns the type of the tensor's blocks, such as ``Q6_K``; None for plain numbers."""
        kind = self._tensor(name).type
        return kind.name if kind in _QUANTIZED else None

    def says_nothing(self, name: str) -> bool:
        """Returns False: no tool adds tensors."""
        return False

    def read_order(self, name: str) -> None:
        """Returns None: columns are in order."""

    def read_stored(self, name: str, array: str, index: Index) -> np.ndarray:
        """Reads a box of one array of the tensor's blocks; see ``Checkpoint``.

        Raises:
            CheckpointError: the file ended early, or a scale or minimum is not finite in float16.
        """
        tensor = self._tensor(name)
        blocks = BLOCKS[tensor.type]
        entries, size = blocks.entries(array), blocks.size
        count = tensor.shape[-1] // (blocks.groups * GROUP)
        spans = resolve_index(name, (*tensor.shape[:-1], count * entries), index)

        def read_box(tensor: GgufTensor, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
            start, stop = spans[-1]
            first, last = start // entries, -(-stop // entries)
            packed_shape = (*tensor.shape[:-1], count * size)
            packed_spans = (*spans[:-1], (first * size, last * size))
            packed = self._read_packed(tensor, packed_shape, packed_spans)
            box = packed.reshape(*packed.shape[:-1], last - first, size)
            taken = blocks.take(box, array).reshape(*packed.shape[:-1], -1)
            if array != "values":
                self._check_finite(tensor, array, blocks.stored(box, array), taken)
            return taken[..., start - first * entries : stop - first * entries]

        return self._in_order(tensor, spans, read_box)

    def _check_finite(
        self, tensor: GgufTensor, array: str, stored: np.ndarray, made: np.ndarray
    ) -> None:
        """Refuses scales or minima that would make every answer NaN, and says what helps.

        Args:
            tensor: of which they are.
            array: ``scale`` or ``minimum``.
            stored: the float16 of each block.
            made: what they came to, with the blocks' other factors.
        """
        if not (finite := np.isfinite(stored)).all():
            raise CheckpointError(
                f"{self.source}: {tensor.name!r} has a block whose {array} is {stored[~finite][0]},"
                " so the file is damaged; fetch it again, or convert the model again"
            )
        if not np.isfinite(made).all():
            raise CheckpointError(
                f"{self.source}: {tensor.name!r} has a block whose {array} is beyond float16, "
                f"which ends at {np.finfo(np.float16).max:g}; give --quantization none"
            )

    def _in_order(
        self,
        tensor: GgufTensor,
        spans: tuple[tuple[int, int], ...],
        read_box: Callable[[GgufTensor, tuple[tuple[int, int], ...]], np.ndarray],
    ) -> np.ndarray:
        """Reads a box with its rows in Hugging Face's order."""
        rows = self._row_order(tensor)
        if rows is None:
            return read_box(tensor, spans)
        wanted = rows[slice(*spans[0])]
        if wanted.size == 0:
            return read_box(tensor, spans)
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return read_box(tensor, ((low, high), *spans[1:]))[wanted - low]

    def tokenizer_files(self) -> TokenizerSource:
        """Returns the metadata that says something about tokens."""
        return gguf_tokenizer(self._header)

    def digest(self) -> str:
        """Hashes the file: SHA-256, hex. Reads all of it."""
        with open(self.source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _tensor(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}; it is incomplete or of another "
                "architecture than its metadata says"
            ) from None

    def _map_names(self) -> dict[str, GgufTensor]:
        blocks = _BLOCKS.get(self.config["model_type"], _BLOCK)
        mapped = {}
        for tensor in self._header.tensors.values():
            if tensor.name in _CONFIG_TENSORS:
                continue
            name = _TOP.get(tensor.name) or _block_name(tensor.name, blocks)
            if name is not None and name.endswith(_ROWS) and len(tensor.shape) == 1:
                tensor = replace(tensor, shape=(1, *tensor.shape))
            if name is None:
                raise UnsupportedModelError(
                    f"{self.source} holds the tensor {tensor.name!r}, which the "
                    f"{self._architecture!r} architecture here has no place for"
                )
            if tensor.type not in _PLAIN and tensor.type not in _QUANTIZED:
                raise UnsupportedModelError(
                    f"{self.source} stores {tensor.name!r} as {tensor.type.name}; supported are "
                    f"{', '.join(SUPPORTED_TYPES)}: quantize it to one of these"
                )
            mapped |= self._by_expert(name, tensor) if "{}" in name else {name: tensor}
        return mapped

    def _by_expert(self, name: str, tensor: GgufTensor) -> dict[str, GgufTensor]:
        """Each expert's part of a tensor ``[E, out, in]``, which lie one behind the other."""
        if len(tensor.shape) != 3:
            raise CheckpointError(
                f"{self.source}: {tensor.name!r} has shape {list(tensor.shape)}; experts are "
                "stored as [experts, out, in]: convert it again"
            )
        experts, *shape = tensor.shape
        size = tensor.nbytes // experts
        return {
            name.format(number): replace(
                tensor, shape=tuple(shape), offset=tensor.offset + number * size, nbytes=size
            )
            for number in range(experts)
        }

    def _read_small(self, gguf_name: str) -> np.ndarray | None:
        tensor = self._header.tensors.get(gguf_name)
        if tensor is None:
            return None
        if tensor.type not in _PLAIN:
            raise UnsupportedModelError(
                f"{self.source} stores {gguf_name!r} as {tensor.type.name}; it must be F32"
            )
        spans = resolve_index(gguf_name, tensor.shape, None)
        return self._read_box(tensor, spans).astype(np.float32)

    def _row_order(self, tensor: GgufTensor) -> np.ndarray | None:
        """Returns the stored row of each Hugging Face row, or None when they are the same.

        The conversion of llama models interleaves the two halves of every Q and K head, because
        llama.cpp rotates neighbouring values; half-split rope needs them back.
        """
        if self._architecture != "llama" or not _PERMUTED.fullmatch(tensor.name):
            return None
        key = "num_attention_heads" if ".attn_q." in tensor.name else "num_key_value_heads"
        heads, rows = self.config[key], tensor.shape[0]
        if rows % (2 * heads):
            raise CheckpointError(
                f"{self.source}: {tensor.name!r} has {rows} rows, not a multiple of 2 x {heads} "
                "heads; convert it again"
            )
        order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
        return order.swapaxes(1, 2).reshape(-1)

    def _undo_norm(self, tensor: GgufTensor, values: np.ndarray) -> np.ndarray:
        if self._architecture == "gemma3" and tensor.name.endswith("norm.weight"):
            return values - values.dtype.type(1)
        return values

    def _read_box(self, tensor: GgufTensor, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
        if tensor.type in _PLAIN:
            return read_spans(self._file, tensor.offset, tensor.shape, _PLAIN[tensor.type], spans)
        out = np.empty([stop - start for start, stop in spans], np.float32)
        if out.size == 0:
            return out
        # Rows are whole numbers of groups, so rows are chosen before dequantizing, columns after.
        # A piece at a time, because dequantizing makes several copies of what it is given.
        group, group_bytes = GGML_QUANT_SIZES[tensor.type]
        packed_shape = (*tensor.shape[:-1], tensor.shape[-1] // group * group_bytes)
        packed_spans = (*spans[:-1], (0, packed_shape[-1]))
        if len(spans) == 1:
            packed = self._read_packed(tensor, packed_shape, packed_spans)
            out[:] = dequantize(packed, tensor.type)[slice(*spans[0])]
            return out
        step = max(1, PIECE_VALUES // math.prod(tensor.shape[1:]))
        first, last = spans[0]
        for low in range(first, last, step):
            high = min(low + step, last)
            packed = self._read_packed(tensor, packed_shape, ((low, high), *packed_spans[1:]))
            values = dequantize(packed, tensor.type)
            out[low - first : high - first] = values[..., slice(*spans[-1])]
        return out

    def _read_packed(
        self, tensor: GgufTensor, shape: tuple[int, ...], spans: tuple[tuple[int, int], ...]
    ) -> np.ndarray:
        return read_spans(self._file, tensor.offset, shape, np.dtype(np.uint8), spans)


def gguf_tokenizer(header: GgufHeader) -> TokenizerSource:
    """Returns the part of the metadata that a tokenizer is built from.

    Works for vocabulary-only files too. The architecture is part of it because Phi-3's tokenizer
    has a rule that GGUF has no key for.
    """
    return TokenizerSource(
        source=header.path,
        gguf={
            key: value
            for key, value in header.metadata.items()
            if key.startswith("tokenizer.") or key == "general.architecture"
        },
    )


def _block_name(name: str, blocks: dict[str, str]) -> str | None:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in blocks:
        return None
    return f"model.layers.{match[1]}.{blocks[match[2]]}.{match[3]}"
