"""Writes tiny checkpoints as AutoAWQ, AutoGPTQ and compressed-tensors publish them.

Written from those tools' public definitions (``WQLinear_GEMM``, ``QuantLinear``,
``pack_to_int32``), one value at a time, and independent of what reads them: each writer also
returns the numbers that its tool says the file stands for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.weights.reexport import write_checkpoint

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 256, 384, 4, 2, 64, 2, 320
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


class Stored(NamedTuple):
    """One linear layer: its tensors by the ends of their names, and the numbers they stand for."""

    tensors: dict[str, np.ndarray]
    numbers: np.ndarray


Write = Callable[[str, np.ndarray], Stored]


def drawn() -> dict[str, np.ndarray]:
    """Float weights of the tiny model, under Hugging Face's names."""
    rng = np.random.default_rng(3)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN), np.float32) / 8,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{prefix}post_attention_layernorm.weight"] = np.ones(HIDDEN, np.float32)
        for name, shape in LINEARS.items():
            spread = rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
            tensors[f"{prefix}{name}.weight"] = spread * rng.uniform(0.5, 2, (1, shape[1]))
    return {name: values.astype(np.float16) for name, values in tensors.items()}


def write(
    directory: Path, quantization_config: dict[str, Any], one: Write
) -> dict[str, np.ndarray]:
    """Writes the tiny model with its linear layers stored by ``one``; returns plain numbers."""
    tensors, plain = {}, {}
    for name, values in drawn().items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = plain[name] = values
            continue
        stored = one(module, values.astype(np.float32))
        tensors |= {f"{module}.{end}": array for end, array in stored.tensors.items()}
        plain[name] = stored.numbers.astype(np.float32)
    config = CONFIG | {"quantization_config": quantization_config}
    write_checkpoint(directory, config, tensors, files=tokenizer_files())
    return plain


def write_plain(directory: Path, plain: dict[str, np.ndarray]) -> Path:
    """Writes the tiny model with plain numbers."""
    return write_checkpoint(directory, CONFIG, plain, files=tokenizer_files())


def tokenizer_files() -> dict[str, str]:
    """A tokenizer with a token for every byte."""
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({text: number + 3 for number, text in enumerate(bytes_of)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}


def asymmetric(
    matrix: np.ndarray, groups: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole numbers ``[out, in]``, scales and zero points ``[out, groups]`` of a matrix."""
    count, most = groups.max() + 1, 2**bits - 1
    scales = np.empty((len(matrix), count), np.float16)
    zeros = np.empty((len(matrix), count), np.int64)
    whole = np.empty(matrix.shape, np.int64)
    for group in range(count):
        part = matrix[:, groups == group]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        scales[:, group] = (high - low) / most
        scale = scales[:, group].astype(np.float32)
        zeros[:, group] = np.clip(np.rint(-low / scale), 0, most)
        rounded = np.rint(part / scale[:, None]) + zeros[:, group, None]
        whole[:, groups == group] = np.clip(rounded, 0, most)
    return whole, scales, zeros


def awq(group: int) -> tuple[dict[str, Any], Write]:
    """AutoAWQ's GEMM version: packed along the outputs, in the order of its kernel."""

    def pack(whole: np.ndarray) -> np.ndarray:
        """``[rows, out]`` to int32 ``[rows, out / 8]``."""
        packed = np.zeros((whole.shape[0], whole.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for place, source in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= whole[:, column * 8 + source].astype(np.uint32) << (place * 4)
        return packed.view(np.int32)

    def one(module: str, matrix: np.ndarray) -> Stored:
        groups = np.arange(matrix.shape[1]) // group
        whole, scales, zeros = asymmetric(matrix, groups, 4)
        tensors = {"qweight": pack(whole.T), "qzeros": pack(zeros.T), "scales": scales.T}
        return Stored(tensors, (whole - zeros[:, groups]) * scales.astype(np.float64)[:, groups])

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return config | {"version": "gemm", "modules_to_not_convert": None}, one


def gptq(
    group: int, *, bits: int = 4, version: int = 1, act_order: bool = False, symmetric: bool = False
) -> tuple[dict[str, Any], Write]:
    """AutoGPTQ's: packed along the inputs, zero points along the outputs.

    With ``act_order`` the columns of a group are those of like importance, wherever they are.
    """
    per = 32 // bits

    def pack(whole: np.ndarray) -> np.ndarray:
        """``[in, out]`` to int32 ``[in / per, out]``."""
        packed = np.zeros((whole.shape[0] // per, whole.shape[1]), np.uint32)
        for row in range(whole.shape[0]):
            packed[row // per] |= whole[row].astype(np.uint32) << (row % per * bits)
        return packed.view(np.int32)

    def one(module: str, matrix: np.ndarray) -> Stored:
        groups = np.arange(matrix.shape[1]) // group
        if act_order:  # Layers that read the same activations have the same order.
            seed = [matrix.shape[1], int(module.split(".")[2]), "o_proj" in module]
            importance = np.random.default_rng(seed).permutation(matrix.shape[1])
            groups = importance // group
        if symmetric:
            zeros = np.full((len(matrix), groups.max() + 1), 2 ** (bits - 1))
            scales = np.empty(zeros.shape, np.float16)
            for number in range(zeros.shape[1]):
                largest = np.abs(matrix[:, groups == number]).max(axis=1)
                scales[:, number] = largest / (2 ** (bits - 1) - 1)
            steps = np.rint(matrix / scales.astype(np.float32)[:, groups])
            whole = np.clip(steps + zeros[:, groups], 0, 2**bits - 1).astype(np.int64)
        else:
            whole, scales, zeros = asymmetric(matrix, groups, bits)
        kept = zeros if version == 2 else (zeros - 1) % 2**bits
        tensors = {
            "qweight": pack(whole.T),
            "qzeros": np.ascontiguousarray(pack(kept).T),
            "scales": scales.T,
            "g_idx": groups.astype(np.int32),
        }
        if module.endswith("q_proj"):
            tensors["bias"] = np.zeros(len(matrix), np.float16)  # As old versions wrote.
        return Stored(tensors, (whole - zeros[:, groups]) * scales.astype(np.float64)[:, groups])

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    config |= {"sym": symmetric, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return config, one


def compressed(
    layout: str, strategy: str, *, bits: int = 8, group: int | None = None, symmetric: bool = True
) -> tuple[dict[str, Any], Write]:
    """llm-compressor's: W4A16 and W8A16 packed, W8A8 in int8 or e4m3 one by one."""
    is_float = layout == "float-quantized"

    def pack(whole: np.ndarray) -> np.ndarray:
        """Signed ``[rows, n]`` to int32 ``[rows, n x bits / 32]``, counted from the least."""
        per = 32 // bits
        packed = np.zeros((whole.shape[0], -(-whole.shape[1] // per)), np.uint32)
        for column in range(whole.shape[1]):
            value = (whole[:, column] + 2 ** (bits - 1)).astype(np.uint32)
            packed[:, column // per] |= value << (column % per * bits)
        return packed.view(np.int32)

    def one(module: str, matrix: np.ndarray) -> Stored:
        width = group or matrix.shape[1]
        groups = np.arange(matrix.shape[1]) // width
        offset = 2 ** (bits - 1)
        if not symmetric:
            whole, scales, zeros = asymmetric(matrix, groups, bits)
            tensors = {
                "weight_packed": pack(whole - offset),
                "weight_scale": scales,
                "weight_zero_point": np.ascontiguousarray(pack((zeros - offset).T).T),
                "weight_shape": np.array(matrix.shape, np.int64),
            }
            factors = scales.astype(np.float64)[:, groups]
            return Stored(tensors, (whole - zeros[:, groups]) * factors)
        largest = np.abs(matrix).reshape(len(matrix), -1, width).max(axis=-1)
        if strategy == "tensor":
            largest = np.full_like(largest, largest.max())
        most = 448 if is_float else offset - 1
        scales = (largest / most).astype(ml_dtypes.bfloat16)
        factors = scales.astype(np.float64)[:, groups]
        steps = np.clip(matrix / factors, -most, most)
        if is_float:
            values = steps.astype(ml_dtypes.float8_e4m3fn)
        else:
            values = np.rint(steps).astype(np.int8)
        kept = scales[:1, 0] if strategy == "tensor" else scales
        tensors = {"weight_scale": kept, "weight": values}
        if layout == "pack-quantized":
            tensors = {"weight_scale": kept, "weight_packed": pack(values.astype(np.int64))}
            tensors["weight_shape"] = np.array(matrix.shape, np.int64)
        return Stored(tensors, values.astype(np.float64) * factors)

    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "float" if is_float else "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }
    activations = None
    if layout != "pack-quantized":
        activations = weights | {"strategy": "token", "dynamic": True}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        },
        "ignore": ["lm_head"],
    }
    return config, one


TOOLS: dict[str, tuple[dict[str, Any], Write]] = {
    "awq": awq(128),
    "awq-64": awq(64),
    "gptq": gptq(128),
    "gptq-v2": gptq(64, version=2),
    "gptq-act-order": gptq(64, act_order=True),
    "gptq-8": gptq(128, bits=8, symmetric=True),
    "gptq-8-asymmetric": gptq(128, bits=8),
    "w4a16": compressed("pack-quantized", "group", bits=4, group=128),
    "w4a16-asymmetric": compressed("pack-quantized", "group", bits=4, group=64, symmetric=False),
    "w8a16": compressed("pack-quantized", "channel"),
    "w8a8": compressed("int-quantized", "channel"),
    "fp8": compressed("float-quantized", "channel"),
    "fp8-tensor": compressed("float-quantized", "tensor"),
}
"""Every kind of file that is read, by name."""
