from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.weights.gguf import GgufCheckpoint
from jaxserve.weights.gguf_file import read_gguf_header
from tests.weights.gguf_writing import (
    BYTE_VOCABULARY,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    common,
    interleave,
    llama_tensors,
    to_llama_gguf,
    write_gguf,
    write_tiny_llama,
)

QUANTIZED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
QUERY = "model.layers.0.self_attn.q_proj.weight"


def one_tensor(path: Path, values: np.ndarray, kind: Kind | None = None) -> GgufCheckpoint:
    """A llama file whose only tensor is the embedding."""
    types = {} if kind is None else {"token_embd.weight": kind}
    write_gguf(path, "llama", common("llama"), {"token_embd.weight": values}, types)
    return GgufCheckpoint(path)


def test_every_tensor_comes_back_as_it_was_before_the_conversion(tmp_path: Path) -> None:
    path, tensors = write_tiny_llama(tmp_path / "m.gguf")
    checkpoint = GgufCheckpoint(path)
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, values in tensors.items():
        assert checkpoint.shape(name) == values.shape
        assert checkpoint.dtype(name) == np.float32
        np.testing.assert_array_equal(checkpoint.read(name), values)
    checkpoint.close()


def test_biases_of_q_and_k_are_put_back_in_order_too(tmp_path: Path) -> None:
    tensors = llama_tensors()
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    converted = to_llama_gguf(tensors)
    converted["blk.0.attn_q.bias"] = interleave(bias, HEADS)
    path = write_gguf(tmp_path / "m.gguf", "llama", common("llama"), converted)
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.config["attention_bias"] is True
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), bias)


def test_other_architectures_keep_the_rows_of_q_and_k(tmp_path: Path) -> None:
    rows = np.arange(HEADS * HEAD_DIM * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN)
    tensors = {
        "token_embd.weight": np.ones((48, HIDDEN), np.float32),
        "blk.0.attn_q.weight": rows,
        "blk.0.attn_q_norm.weight": np.full(HEAD_DIM, 3, np.float32),
    }
    path = write_gguf(tmp_path / "m.gguf", "qwen3", common("qwen3"), tensors)
    checkpoint = GgufCheckpoint(path)
    np.testing.assert_array_equal(checkpoint.read(QUERY), rows)
    assert (checkpoint.read("model.layers.0.self_attn.q_norm.weight") == 3).all()


def test_gemma_norms_lose_the_one_that_the_conversion_added(tmp_path: Path) -> None:
    norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm"]
    tensors: dict[str, np.ndarray] = {
        f"blk.0.{norm}.weight": np.full(HIDDEN, 1.25 + number, np.float32)
        for number, norm in enumerate(norms)
    }
    tensors["token_embd.weight"] = np.ones((48, HIDDEN), np.float32)
    metadata = common("gemma3") | {"gemma3.attention.sliding_window": 16}
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", "gemma3", metadata, tensors))
    found = {name: float(checkpoint.read(name).flat[0]) for name in checkpoint.names()}
    prefix = "model.layers.0."
    assert found == {
        prefix + "input_layernorm.weight": 0.25,
        prefix + "post_attention_layernorm.weight": 1.25,
        prefix + "pre_feedforward_layernorm.weight": 2.25,
        prefix + "post_feedforward_layernorm.weight": 3.25,
        prefix + "self_attn.q_norm.weight": 4.25,
        "model.embed_tokens.weight": 1.0,
    }


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_tensors_read_like_the_gguf_package_reads_them(name: str, tmp_path: Path) -> None:
    kind = Kind[name]
    group, group_bytes = gguf.GGML_QUANT_SIZES[kind]
    # The top bit of every byte is clear, which keeps the float16 scales finite and positive.
    raw = np.random.default_rng(1).integers(0, 64, (48, 2 * group_bytes), np.uint8)
    checkpoint = one_tensor(tmp_path / "m.gguf", raw, kind)
    assert checkpoint.shape("model.embed_tokens.weight") == (48, 2 * group)
    assert checkpoint.dtype("model.embed_tokens.weight") == np.float32
    whole = checkpoint.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(whole, dequantize(raw, kind))
    part = checkpoint.read("model.embed_tokens.weight", (slice(5, 9), slice(3, group + 1)))
    np.testing.assert_array_equal(part, whole[5:9, 3 : group + 1])
    assert checkpoint.read("model.embed_tokens.weight", (slice(9, 5),)).shape == (0, 2 * group)


def test_q4_1_is_scale_times_nibble_plus_minimum(tmp_path: Path) -> None:
    """One group worked out by hand: low nibbles first, then high ones."""
    scale, minimum = np.float16(0.5), np.float16(-2)
    nibbles = np.arange(16, dtype=np.uint8) | (np.arange(16, dtype=np.uint8)[::-1] << 4)
    raw = np.concatenate([np.array([scale, minimum]).view(np.uint8), nibbles])[None]
    checkpoint = one_tensor(tmp_path / "m.gguf", raw, Kind.Q4_1)
    expected = np.concatenate([np.arange(16), np.arange(16)[::-1]]) * 0.5 - 2
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight")[0], expected)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F16, np.float16), (Kind.BF16, ml_dtypes.bfloat16)]
)
def test_half_precision_stays_half_precision(kind: Kind, dtype: type, tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 64).reshape(2, 32).astype(dtype)
    checkpoint = one_tensor(tmp_path / "m.gguf", values.view(np.uint8), kind)
    assert checkpoint.dtype("model.embed_tokens.weight") == dtype
    read = checkpoint.read("model.embed_tokens.weight")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_box_of_a_tensor_is_that_box_of_the_whole(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        write_tiny_llama(path)
    checkpoint = GgufCheckpoint(path)
    name = data.draw(st.sampled_from(checkpoint.names()))
    shape = checkpoint.shape(name)
    axes = data.draw(st.integers(0, len(shape)))
    index = tuple(data.draw(st.slices(length)) for length in shape[:axes])
    index = tuple(slice(part.start, part.stop) for part in index)
    np.testing.assert_array_equal(checkpoint.read(name, index), checkpoint.read(name)[index])
    checkpoint.close()


def test_stepped_slices_and_too_many_axes_are_the_callers_mistake(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(write_tiny_llama(tmp_path / "m.gguf")[0])
    with pytest.raises(ValueError, match=r"slices of model.norm.weight must have step 1, got 2"):
        checkpoint.read("model.norm.weight", (slice(0, 4, 2),))
    with pytest.raises(ValueError, match=r"model.norm.weight has 1 axes and the index has 2"):
        checkpoint.read("model.norm.weight", (slice(0, 4), slice(0, 1)))


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(write_tiny_llama(tmp_path / "m.gguf")[0])
    with pytest.raises(CheckpointError, match=r"m\.gguf has no tensor 'lm_head.weight'"):
        checkpoint.read("lm_head.weight")


def test_an_unknown_storage_type_is_named_with_the_tensor(tmp_path: Path) -> None:
    raw = np.zeros((48, gguf.GGML_QUANT_SIZES[Kind.TQ1_0][1]), np.uint8)
    with pytest.raises(
        UnsupportedModelError, match=r"stores 'token_embd.weight' as TQ1_0; supported are F32, F16"
    ):
        one_tensor(tmp_path / "m.gguf", raw, Kind.TQ1_0)


def test_a_tensor_without_a_place_is_refused_instead_of_ignored(tmp_path: Path) -> None:
    tensors = to_llama_gguf(llama_tensors()) | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", common("llama"), tensors)
    with pytest.raises(UnsupportedModelError, match=r"'blk.0.attn_sinks.weight', which the 'llama"):
        GgufCheckpoint(path)


def test_rows_that_are_no_whole_heads_are_refused(tmp_path: Path) -> None:
    tensors = to_llama_gguf(llama_tensors()) | {
        "blk.0.attn_k.weight": np.ones((KV_HEADS * 2 + 1, HIDDEN), np.float32)
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", common("llama"), tensors)
    with pytest.raises(CheckpointError, match=r"has 5 rows, not a multiple of 2 x 2 heads"):
        GgufCheckpoint(path).read("model.layers.0.self_attn.k_proj.weight")


def test_a_vocabulary_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", "llama", common("llama") | BYTE_VOCABULARY, {})
    with pytest.raises(CheckpointError, match=r"v\.gguf holds a vocabulary only and no tensors"):
        GgufCheckpoint(path)


def test_the_digest_is_of_the_files_bytes(tmp_path: Path) -> None:
    path, _ = write_tiny_llama(tmp_path / "m.gguf")
    before = GgufCheckpoint(path).digest()
    assert len(before) == 64
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert GgufCheckpoint(path).digest() != before


def test_phi3_fused_projections_keep_their_fused_names(tmp_path: Path) -> None:
    fused = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    tensors = {
        "token_embd.weight": np.ones((48, HIDDEN), np.float32),
        "blk.1.attn_qkv.weight": np.ones((fused, HIDDEN), np.float32),
        "blk.1.ffn_up.weight": np.ones((2 * FFN, HIDDEN), np.float32),
    }
    path = write_gguf(tmp_path / "m.gguf", "phi3", common("phi3"), tensors)
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.shape("model.layers.1.self_attn.qkv_proj.weight") == (fused, HIDDEN)
    assert checkpoint.shape("model.layers.1.mlp.gate_up_proj.weight") == (2 * FFN, HIDDEN)


def test_smollm2_is_what_its_package_says(assets: Callable[[str], Path]) -> None:
    checkpoint = GgufCheckpoint(assets("smollm2"))
    names = checkpoint.names()
    assert len(names) == 272
    assert sum(int(np.prod(checkpoint.shape(name))) for name in names) == 134_515_008
    assert checkpoint.shape("model.embed_tokens.weight") == (49_152, 576)
    config = checkpoint.config
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["rope_theta"] == 100_000.0
    assert config["rms_norm_eps"] == 1e-5
    assert checkpoint.digest().startswith("b179c9523d0e6a0f")
    # Hugging Face row 64 + 10 is value 10 of head 1; interleaved, value 10 comes at 2 * 10, and the
    # value that it is rotated with at 2 * 10 + 1.
    tensor = read_gguf_header(assets("smollm2")).tensors["blk.0.attn_q.weight"]
    packed = np.fromfile(assets("smollm2"), np.uint8, tensor.nbytes, offset=tensor.offset)
    rows = dequantize(packed.reshape(576, -1), tensor.type)
    np.testing.assert_array_equal(checkpoint.read(QUERY)[64 + 10], rows[64 + 20])
    np.testing.assert_array_equal(checkpoint.read(QUERY)[64 + 32 + 10], rows[64 + 21])


def test_gemma3_is_what_its_package_says(assets: Callable[[str], Path]) -> None:
    checkpoint = GgufCheckpoint(assets("gemma3"))
    assert len(checkpoint.names()) == 236
    total = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    assert total == 268_098_176
    config = checkpoint.config
    assert config["model_type"] == "gemma3_text"
    assert config["head_dim"] == config["query_pre_attn_scalar"] == 256
    assert config["layer_types"].count("full_attention") == 3
    norm = checkpoint.read("model.norm.weight")
    tensor = read_gguf_header(assets("gemma3")).tensors["output_norm.weight"]
    stored = np.fromfile(assets("gemma3"), np.float32, 640, offset=tensor.offset)
    np.testing.assert_array_equal(norm + 1, stored)
