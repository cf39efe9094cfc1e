"""Writes small GGUF files with the ``gguf`` package's own writer, for the reader's tests.

Tensors are given as Hugging Face has them; what the conversion to GGUF does to them (names, the
interleaved rows of Q and K, Gemma's ``1 + w``) is done here, independently of the reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB, LAYERS = 4, 2, 8, 32, 64, 48, 2
FLOATS = np.random.default_rng(0)


def common(arch: str) -> dict[str, Any]:
    """Returns the metadata that every architecture has."""
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10_000.0,
        f"{arch}.vocab_size": VOCAB,
    }


def llama_tensors() -> dict[str, np.ndarray]:
    """Returns random tensors under Hugging Face's names and in its layout."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": (FFN, HIDDEN),
            prefix + "mlp.up_proj.weight": (FFN, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {name: FLOATS.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Returns the GGUF name of a llama tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of Q or K as the conversion of llama models does."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def to_llama_gguf(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames tensors and interleaves Q and K."""
    out = {}
    for name, values in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            values = interleave(values, HEADS if ".q_proj." in name else KV_HEADS)
        out[gguf_name(name)] = values
    return out


def write_gguf(
    path: Path,
    arch: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a file; tensors in ``types`` are raw bytes of that storage type."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, values in tensors.items():
        kind = (types or {}).get(name)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


BYTE_VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *"abcdefghij", "ab", "cd", "Ġ", "Ġa"],
    "tokenizer.ggml.token_type": [3] + [1] * 14,
    "tokenizer.ggml.merges": ["a b", "c d", "Ġ a"],
    "tokenizer.ggml.eos_token_id": 0,
}
"""A byte-level vocabulary that can be read at a glance."""


def write_tiny_llama(path: Path, **overrides: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """Writes a whole tiny llama with a tokenizer; returns its tensors as Hugging Face has them."""
    tensors = llama_tensors()
    metadata = common("llama") | BYTE_VOCABULARY | overrides
    return write_gguf(path, "llama", metadata, to_llama_gguf(tensors)), tensors
