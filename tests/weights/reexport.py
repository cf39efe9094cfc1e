"""Writes checkpoints as Hugging Face directories, and SmolLM2 as three other model families.

SmolLM2 is a plain llama, so the same function can be written down as a Mistral (a sliding window
as long as the context), a Qwen2 (biases of zero) or a Phi-3 (fused projections): every loader is
tested on real weights, and every output must equal the original's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.weights.checkpoint import Checkpoint

Family = Literal["llama", "mistral", "qwen2", "phi3"]
INDEX_FILE = "model.safetensors.index.json"


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Writes ``config.json``, safetensors and other text files into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=1), "utf-8")
    for name, text in (files or {}).items():
        (directory / name).write_text(text, "utf-8")
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    if shards == 1:
        save_file(contiguous, directory / "model.safetensors")
        return directory
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(contiguous)[number::shards]
        save_file({name: contiguous[name] for name in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index), "utf-8")
    return directory


def reexport(
    source: Checkpoint,
    directory: Path,
    family: Family,
    *,
    layers: int | None = None,
    shards: int = 1,
) -> Path:
    """Writes a llama checkpoint as another family that computes exactly the same.

    Args:
        source: a llama checkpoint, such as SmolLM2.
        directory: made if needed; gets weights, config and tokenizer.
        family: what the config says it is.
        layers: keep only the first so many (another model then, but a quick one).
        shards: safetensors files.
    """
    kept = source.config["num_hidden_layers"] if layers is None else layers
    config = dict(source.config) | {"num_hidden_layers": kept, "torch_dtype": "float32"}
    tensors = {
        name: source.read(name)
        for name in source.names()
        if (match := re.match(r"model\.layers\.(\d+)\.", name)) is None or int(match[1]) < kept
    }
    match family:
        case "llama":
            pass
        case "mistral":
            _as_mistral(config)
        case "qwen2":
            _as_qwen2(config, tensors)
        case "phi3":
            _as_phi3(config, tensors)
    files = tokenizer_files(source)
    return write_checkpoint(directory, config, tensors, shards=shards, files=files)


def _as_mistral(config: dict[str, Any]) -> None:
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": config["max_position_embeddings"],
    }


def _as_qwen2(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    config |= {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "attention_bias": True,
    }
    for name in list(tensors):
        if re.search(r"\.[qkv]_proj\.weight$", name):
            rows = tensors[name].shape[0]
            tensors[name.replace(".weight", ".bias")] = np.zeros(rows, tensors[name].dtype)


def _as_phi3(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    config |= {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": config["max_position_embeddings"],
        "partial_rotary_factor": 1.0,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        tensors[attention + "qkv_proj.weight"] = np.concatenate(
            _take(tensors, (f"{attention}{part}_proj.weight" for part in "qkv"))
        )
        tensors[mlp + "gate_up_proj.weight"] = np.concatenate(
            _take(tensors, (f"{mlp}{part}_proj.weight" for part in ("gate", "up")))
        )


def _take(tensors: dict[str, np.ndarray], names: Iterable[str]) -> list[np.ndarray]:
    return [tensors.pop(name) for name in names]


def tokenizer_files(source: Checkpoint) -> dict[str, str]:
    """Returns the Hugging Face tokenizer files of a checkpoint."""
    tokenizer = load_tokenizer(source.tokenizer_files())
    settings = {
        **tokenizer.special_texts,
        "chat_template": tokenizer.chat_template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.fast.to_str(),
        "tokenizer_config.json": json.dumps(settings),
        "generation_config.json": json.dumps({"eos_token_id": sorted(tokenizer.eos_ids)}),
    }
