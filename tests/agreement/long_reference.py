"""A tiny llama for prompts of 131,072 tokens, and its last token's logits in plain numpy.

Nothing of the service is imported: the weights are drawn here, and what a llama computes is written
out anew. Queries go in blocks, so that memory stays bounded. Weights of queries and keys are large:
the softmax over 100,000 random keys would else be their mean, which hardly depends on any of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 2, 64, 4, 2, 16, 96, 320
CONTEXT_TOKENS = 131_072
THETA, EPSILON = 500_000.0, 1e-5
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPSILON,
    "rope_theta": THETA,
    "rope_scaling": SCALING,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
BLOCK_SCORES = 2**21
"""Scores of one head that are in memory at once: 8 MiB."""

type Weights = dict[str, np.ndarray]


class Answer(NamedTuple):
    """After the last token of a prompt."""

    logprobs: np.ndarray
    """Of every token of the vocabulary."""
    attention: np.ndarray
    """``[HEADS, T]``: how the last layer's last query weighs every token."""


def draw_weights(seed: int = 0) -> Weights:
    """Draws every parameter, under the names that checkpoints have."""
    rng = np.random.default_rng(seed)

    def matrix(out: int, columns: int, size: float) -> np.ndarray:
        return (rng.standard_normal((out, columns)) * size / columns**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(EMBED)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, EMBED, 2.0), "model.norm.weight": norm()}
    for layer in range(LAYERS):
        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in (
                ("input_layernorm", norm()),
                ("self_attn.q_proj", matrix(HEADS * HEAD_DIM, EMBED, 2.0)),
                ("self_attn.k_proj", matrix(KV_HEADS * HEAD_DIM, EMBED, 2.0)),
                ("self_attn.v_proj", matrix(KV_HEADS * HEAD_DIM, EMBED, 1.5)),
                ("self_attn.o_proj", matrix(EMBED, HEADS * HEAD_DIM, 1.5)),
                ("post_attention_layernorm", norm()),
                ("mlp.gate_proj", matrix(FFN, EMBED, 1.0)),
                ("mlp.up_proj", matrix(FFN, EMBED, 1.0)),
                ("mlp.down_proj", matrix(EMBED, FFN, 1.0)),
            )
        }
    return weights


def write_checkpoint(weights: Weights, directory: Path) -> None:
    """Writes config and weights; a tokenizer is the caller's business."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def answer(weights: Weights, tokens: np.ndarray, kv_dtype: str = "float32") -> Answer:
    """Computes what follows a prompt, in float32, but for the angles.

    Args:
        weights: Of ``draw_weights``.
        tokens: The prompt.
        kv_dtype: What keys and values are rounded to before anything looks at them.
    """
    rope = _angles(len(tokens))
    hidden = weights["model.embed_tokens.weight"][tokens]
    attention = np.empty(0)
    for layer in range(LAYERS):
        its = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): value
            for name, value in weights.items()
        }
        normed = _norm(hidden, its["input_layernorm"])
        k = _rotate(_heads(normed, its["self_attn.k_proj"]), rope)
        v = _heads(normed, its["self_attn.v_proj"])
        k = rounded(k, kv_dtype, is_turned=kv_dtype in ("int8", "int4"))
        v = rounded(v, kv_dtype, is_turned=kv_dtype == "int4")
        if layer == LAYERS - 1:  # Of the last layer only the last query is needed.
            hidden, normed = hidden[-1:], normed[-1:]
        q = _rotate(_heads(normed, its["self_attn.q_proj"]), rope[:, -len(normed) :])
        attended, attention = _attend(q, k, v)
        hidden = hidden + attended @ its["self_attn.o_proj"].T
        normed = _norm(hidden, its["post_attention_layernorm"])
        gate = normed @ its["mlp.gate_proj"].T
        up = normed @ its["mlp.up_proj"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ its["mlp.down_proj"].T
    logits = _norm(hidden, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    exact = logits[-1].astype(np.float64)
    exact -= exact.max()
    return Answer(exact - np.log(np.exp(exact).sum()), attention)


def rounded(x: np.ndarray, kv_dtype: str, *, is_turned: bool) -> np.ndarray:
    """What a cell of a page stands for: numbers with a bfloat16 scale for each token and head.

    Some are turned by a Walsh-Hadamard matrix first, and back here.
    """
    if kv_dtype == "float32":
        return x
    turn = np.eye(HEAD_DIM, dtype=np.float32)
    if is_turned:
        turn = np.ones((1, 1), np.float32)
        while len(turn) < HEAD_DIM:
            turn = np.kron(np.array([[1, 1], [1, -1]], np.float32), turn)
        turn /= np.float32(HEAD_DIM**0.5)
    x = x @ turn
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    if kv_dtype != "int4":  # There the sign of the largest number is the scale's.
        extreme = np.abs(extreme)
    most = {"int8": 127, "fp8": 448, "int4": -8}[kv_dtype]
    scale = (extreme / np.float32(most)).astype(ml_dtypes.bfloat16).astype(np.float32)
    if kv_dtype == "fp8":
        numbers = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        numbers = np.clip(np.rint(x / scale), -8 if most < 0 else -127, 7 if most < 0 else 127)
    return np.ascontiguousarray(numbers * scale @ turn.T)


def _heads(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A projection, head by head: ``[N, T, HEAD_DIM]``."""
    return np.ascontiguousarray((x @ matrix.T).reshape(len(x), -1, HEAD_DIM).swapaxes(0, 1))


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(EPSILON)) * weight


def _angles(tokens: int) -> np.ndarray:
    """Cosines and sines ``[2, T, HEAD_DIM / 2]``, slow pairs turned more slowly still."""
    speeds = THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    original = SCALING["original_max_position_embeddings"]
    low, high = SCALING["low_freq_factor"], SCALING["high_freq_factor"]
    turns = original * speeds / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    speeds = keep * speeds + (1 - keep) * speeds / SCALING["factor"]
    angles = np.arange(tokens)[:, None] * speeds
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def _rotate(x: np.ndarray, rope: np.ndarray) -> np.ndarray:
    """Turns the pairs, which are halves of a head apart."""
    cos, sin = rope
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention ``[T, HEADS * HEAD_DIM]`` of the last queries, and the weights of the last one."""
    queries, keys = q.shape[1], k.shape[1]
    block = min(queries, max(1, BLOCK_SCORES // keys))
    room = np.empty(block * keys, np.float32)  # One for all: fresh memory costs more than sums.
    out = np.empty((queries, HEADS, HEAD_DIM), np.float32)
    last = np.empty((HEADS, keys), np.float32)
    scaled = q * np.float32(HEAD_DIM**-0.5)
    for head in range(HEADS):
        its_k, its_v = k[head // (HEADS // KV_HEADS)], v[head // (HEADS // KV_HEADS)]
        for begin in range(0, queries, block):
            end = min(begin + block, queries)
            place, seen = keys - queries + begin, keys - queries + end
            scores = room[: (end - begin) * seen].reshape(end - begin, seen)
            np.matmul(scaled[head, begin:end], its_k[:seen].T, out=scores)
            # Only the square at the end has keys that come after a query.
            scores[:, place:][np.triu_indices(end - begin, 1)] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            total = scores.sum(axis=1, keepdims=True)
            out[begin:end, head] = scores @ its_v[:seen] / total
            if end == queries:
                last[head] = scores[-1] / total[-1]
    return out.reshape(queries, -1), last
