"""Loads SmolLM2 and Gemma 3 from GGUF into `transformers`, and records what they answer.

The mapping from GGUF to the published parameter names is written out here on its own, so that it
shares no code, and so no mistake, with the loader it is there to check.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.quants import dequantize
from oracle import continue_greedily, projection_signs, window_nll
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedModel

GREEDY_TOKENS = 64
TOP_LOGITS = 32
WINDOW, WINDOWS = 1024, 4

OUTER_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The norm called "ffn_norm" stands before the feed-forward in both, under different names.
LLAMA_NAMES = BLOCK_NAMES | {"ffn_norm": "post_attention_layernorm"}
GEMMA_NAMES = BLOCK_NAMES | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _common_config(reader: GGUFReader) -> dict[str, Any]:
    """The settings both architectures share, from the file's metadata."""
    arch = reader.fields["general.architecture"].contents()

    def value(name: str) -> Any:
        return reader.fields[f"{arch}.{name}"].contents()

    return {
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].contents()),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": value("context_length"),
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    }


def _parameter_name(gguf_name: str, block_names: Mapping[str, str]) -> str:
    stem = gguf_name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return f"model.{OUTER_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{block_names[part]}.weight"


def _halves_from_pairs(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undoes llama.cpp's order of Q and K rows: rotated pairs back to first and second half."""
    per_head = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(per_head.swapaxes(1, 2)).reshape(rows.shape)


def _tensor_value(tensor: ReaderTensor) -> npt.NDArray[np.float32]:
    return np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)


def _fill(model: PreTrainedModel, state: Mapping[str, npt.NDArray[np.float32]]) -> PreTrainedModel:
    """Loads every parameter and insists that none is missing, except the tied head."""
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or missing not in ([], ["lm_head.weight"]):
        raise ValueError(f"parameters missing: {missing}, unexpected: {unexpected}; map them")
    model.tie_weights()
    return model.float().eval()


def load_smollm2(reader: GGUFReader) -> PreTrainedModel:
    """SmolLM2-135M-Instruct as a Llama model in float32."""
    settings = _common_config(reader)
    theta = reader.fields["llama.rope.freq_base"].contents()
    rope = {"rope_type": "default", "rope_theta": theta}
    heads = {
        "attn_q": settings["num_attention_heads"],
        "attn_k": settings["num_key_value_heads"],
    }
    state = {}
    for tensor in reader.tensors:
        value = _tensor_value(tensor)
        part = tensor.name.split(".")[-2]
        if part in heads:
            value = _halves_from_pairs(value, heads[part])
        state[_parameter_name(tensor.name, LLAMA_NAMES)] = value
    return _fill(LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope)), state)


def load_gemma3(reader: GGUFReader) -> PreTrainedModel:
    """Gemma 3 270M (base) in float32; the file leaves its local rope and layer pattern unsaid."""
    head_dim = reader.fields["gemma3.attention.key_length"].contents()
    theta = reader.fields["gemma3.rope.freq_base"].contents()
    config = Gemma3TextConfig(
        **_common_config(reader),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=reader.fields["gemma3.attention.sliding_window"].contents(),
        sliding_window_pattern=6,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    state = {}
    for tensor in reader.tensors:
        # llama.cpp stores the factor itself, the published checkpoint the factor minus one.
        offset = np.float32(1 if "norm" in tensor.name else 0)
        state[_parameter_name(tensor.name, GEMMA_NAMES)] = _tensor_value(tensor) - offset
    return _fill(Gemma3ForCausalLM(config), state)


def record_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], full: Sequence[int], path: Path
) -> None:
    """Writes greedy continuations and last-position logits; all of them for the `full` prompts."""
    runs = [continue_greedily(model, prompt, GREEDY_TOKENS, keep=1) for prompt in prompts]
    logits = np.stack([run.prompt_logits[-1] for run in runs])
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_LOGITS]
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1)
    np.savez_compressed(
        path,
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        greedy_tokens=np.stack([run.tokens for run in runs]),
        greedy_runners_up=np.stack([run.runners_up for run in runs]),
        greedy_gaps=np.stack([run.gaps for run in runs]),
        top_ids=top_ids.astype(np.int32),
        top_logits=np.take_along_axis(logits, top_ids, axis=1),
        logsumexp=peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1)),
        projections=wide @ projection_signs(logits.shape[1]),
        full_prompts=np.array(full, np.int32),
        full_logits=logits[list(full)],
    )


def record_perplexity(
    model: PreTrainedModel, texts: Mapping[str, Sequence[int]], start: Sequence[int], path: Path
) -> None:
    """Writes the windows of each text's first 4096 tokens, begun by `start`, and their NLLs."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, tokens in texts.items():
        split = np.array(tokens[: WINDOW * WINDOWS], np.int32).reshape(WINDOWS, WINDOW)
        windows = np.array([[*start, *window] for window in split], np.int32)
        nll = np.array([window_nll(model, window.tolist()) for window in windows])
        arrays |= {f"{name}_tokens": windows, f"{name}_nll": nll}
        scored = windows[:, 1:].size
        print(f"{path.stem} {name}: perplexity {np.exp(nll.sum() / scored):.3f}", flush=True)
    np.savez_compressed(path, **arrays)
