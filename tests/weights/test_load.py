"""Loading weights: what goes where, one shard at a time, and what is said when it does not fit.

The checkpoint is a dictionary whose every value is different, so that a wrong row, part or layer
shows. Real files are read in ``tests/models``.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve.errors import CheckpointError
from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import PRESETS, preset
from jaxserve.models.registry import model_config, weight_sources
from jaxserve.weights import load
from jaxserve.weights.load import load_params, random_params
from jaxserve.weights.reading import ByteFile, Index
from jaxserve.weights.safetensors import SafetensorsCheckpoint
from tests.weights.reexport import write_checkpoint

LAYER_1 = "model.layers.1."


class DictCheckpoint:
    """Tensors in memory; remembers how many values each reading gave."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.source = "checkpoint-in-memory"
        self.config: dict[str, Any] = {}
        self.tensors = tensors
        self.sizes_read: list[int] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name].dtype

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        values = self.tensors[name][index or ()].copy()
        self.sizes_read.append(values.size)
        return values

    def stored_format(self, name: str) -> None:
        """Plain numbers."""

    def stored_as(self, name: str) -> None:
        """Plain numbers."""

    def says_nothing(self, name: str) -> bool:
        return False

    def read_order(self, name: str) -> None:
        """Plain numbers."""

    def read_stored(self, name: str, array: str, index: Index) -> np.ndarray:
        raise AssertionError("nothing is stored quantized")

    def tokenizer_files(self) -> Any:
        raise AssertionError("weights need no tokenizer")

    def digest(self) -> str:
        raise AssertionError("weights need no digest")

    def close(self) -> None:
        raise AssertionError("the caller closes the checkpoint")


def checkpoint_for(model: Model) -> DictCheckpoint:
    """Every tensor that the model needs, filled with numbers that never repeat."""
    sources, tensors, start = weight_sources(model.config), {}, 0
    for source in (*sources.ends.values(), *sources.layer.values()):
        for part in source.parts:
            for layer in range(model.config.layers):
                name, shape = part.name.format(layer=layer), part.stored_shape
                if name not in tensors:
                    size = int(np.prod(shape))
                    tensors[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
                    start += size
    return DictCheckpoint(tensors)


def first_device(model: Model, stacked: bool) -> Params:
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, model.abstract(jnp.float32, stacked=stacked))


def over_tensor_axis(model: Model, stacked: bool, devices: int) -> Params:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    split = {"kv_heads", "q_heads", "ffn", "vocab"}
    return jax.tree.map(
        lambda axes: NamedSharding(
            mesh, PartitionSpec(*("tensor" if word in split else None for word in axes))
        ),
        model.logical_axes(stacked=stacked),
        is_leaf=lambda leaf: isinstance(leaf, tuple) and not isinstance(leaf[0], dict),
    )


def load_tiny(name: str, *, stacked: bool = False, shardings: Params | None = None) -> Params:
    model = Model(preset(name))
    return load_params(
        model,
        checkpoint_for(model),
        dtype=jnp.float32,
        stacked=stacked,
        shardings=shardings or first_device(model, stacked),
    )


def layer_of(params: Params, number: int) -> dict[str, Any]:
    assert isinstance(params.layers, tuple)
    return params.layers[number]


def test_each_projection_lands_in_its_place():
    model = Model(preset("tiny-qwen2"))
    stored = checkpoint_for(model).tensors
    weights = layer_of(load_tiny("tiny-qwen2"), 1)

    attention, mlp = LAYER_1 + "self_attn.", LAYER_1 + "mlp."
    for head in range(4):
        group, place = divmod(head, 2)
        rows = slice(head * 16, head * 16 + 16)
        q = stored[attention + "q_proj.weight"][rows]
        np.testing.assert_array_equal(weights["w_qkv"][group, place], q)
        bias = stored[attention + "q_proj.bias"][rows]
        np.testing.assert_array_equal(weights["b_qkv"][group, place], bias)
    for group in range(2):
        rows = slice(group * 16, group * 16 + 16)
        for place, part in ((2, "k_proj"), (3, "v_proj")):
            kv = stored[f"{attention}{part}.weight"][rows]
            np.testing.assert_array_equal(weights["w_qkv"][group, place], kv)
    o = stored[attention + "o_proj.weight"]
    np.testing.assert_array_equal(weights["w_o"], o.reshape(64, 4, 16))
    np.testing.assert_array_equal(weights["w_gate_up"][0], stored[mlp + "gate_proj.weight"])
    np.testing.assert_array_equal(weights["w_gate_up"][1], stored[mlp + "up_proj.weight"])
    np.testing.assert_array_equal(weights["w_down"], stored[mlp + "down_proj.weight"])


def test_norms_land_in_their_places_under_gemmas_names():
    model = Model(preset("tiny-gemma3"))
    stored, weights = checkpoint_for(model).tensors, layer_of(load_tiny("tiny-gemma3"), 1)
    for ours, theirs in (
        ("attn_norm", "input_layernorm"),
        ("post_attn_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffn_norm", "post_feedforward_layernorm"),
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
    ):
        np.testing.assert_array_equal(weights[ours], stored[f"{LAYER_1}{theirs}.weight"])


def test_fused_projections_are_cut_where_the_parts_meet():
    """Phi-3's rows are all queries, all keys, all values; gate, then up."""
    model = Model(preset("tiny-phi3"))
    stored, weights = checkpoint_for(model).tensors, layer_of(load_tiny("tiny-phi3"), 1)
    qkv = stored[LAYER_1 + "self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(weights["w_qkv"][1, 0], qkv[32:48])
    np.testing.assert_array_equal(weights["w_qkv"][1, 2], qkv[64 + 16 : 64 + 32])
    np.testing.assert_array_equal(weights["w_qkv"][1, 3], qkv[96 + 16 :])
    gate_up = stored[LAYER_1 + "mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(weights["w_gate_up"][1], gate_up[128:])


def test_an_untied_head_is_loaded_and_a_tied_one_is_not():
    assert load_tiny("tiny-phi3").ends.keys() == {"embed", "final_norm", "head"}
    assert load_tiny("tiny-llama").ends.keys() == {"embed", "final_norm"}


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-phi3", "tiny-gemma3"])
def test_stacked_weights_are_the_unrolled_ones_in_order(name):
    stacked, unrolled = load_tiny(name, stacked=True), load_tiny(name)
    expected = jax.tree.map(lambda *layers: np.stack(layers), *unrolled.layers)
    jax.tree.map(np.testing.assert_array_equal, stacked.layers, expected)


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-phi3"])
@pytest.mark.parametrize("stacked", [True, False])
def test_shards_together_are_the_whole_and_each_is_only_its_part(name, stacked):
    model = Model(preset(name))
    whole = load_tiny(name, stacked=stacked)
    parts = load_tiny(name, stacked=stacked, shardings=over_tensor_axis(model, stacked, 2))

    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    layers = parts.layers if isinstance(parts.layers, dict) else parts.layers[0]
    for key in ("w_qkv", "w_o", "w_gate_up", "w_down"):
        assert layers[key].addressable_shards[0].data.size == layers[key].size // 2


def test_a_shard_reads_only_its_own_bytes():
    """Two devices read each split tensor once between them, and each whole tensor once."""
    model = Model(preset("tiny-qwen2"))
    checkpoint = checkpoint_for(model)
    load_params(
        model,
        checkpoint,
        dtype=jnp.float32,
        stacked=False,
        shardings=over_tensor_axis(model, False, 2),
    )
    assert sum(checkpoint.sizes_read) == sum(t.size for t in checkpoint.tensors.values())


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_shard_is_read_from_its_own_byte_ranges_of_the_file(
    devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Positioned reads of a real file: as many bytes as the shard has, and none of them twice."""
    config = PRESETS["tiny-llama"] | {"num_key_value_heads": 4}
    model = Model(model_config(config), devices)
    tensors = {
        name: values.astype(ml_dtypes.bfloat16)
        for name, values in checkpoint_for(model).tensors.items()
    }
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path, config, tensors, shards=2))
    ranges: list[tuple[str, int, int]] = []
    shards: list[tuple[int, int, int]] = []
    read_into, place = ByteFile.read_into, load.place

    def recorded_read(file: ByteFile, target: memoryview, offset: int) -> None:
        ranges.append((file.path, offset, offset + len(target)))
        read_into(file, target, offset)

    def recorded_place(read: Callable[[Index], np.ndarray], shape: Any, *rest: Any) -> jax.Array:
        def recorded(index: Index) -> np.ndarray:
            before = len(ranges)
            part = read(index)
            own = sum(stop - start for _, start, stop in ranges[before:])
            shards.append((part.nbytes, own, int(np.prod(shape)) * part.itemsize))
            return part

        return place(recorded, shape, *rest)

    monkeypatch.setattr(ByteFile, "read_into", recorded_read)
    monkeypatch.setattr(load, "place", recorded_place)
    params = load_params(
        model,
        checkpoint,
        dtype=jnp.bfloat16,
        stacked=True,
        shardings=over_tensor_axis(model, True, devices),
    )

    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]
    assert len(split) == (0 if devices == 1 else 5)
    assert all(bytes_read == part_bytes for part_bytes, bytes_read, _ in shards)
    whole = [part_bytes == weight_bytes for part_bytes, _, weight_bytes in shards]
    assert sum(whole) == len(jax.tree.leaves(params)) - len(split)
    ranges.sort()
    for (file, _, stop), (next_file, start, _) in itertools.pairwise(ranges):
        assert file != next_file or stop <= start, "no byte is read twice"
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(stop - start for _, start, stop in ranges) == stored


def test_values_are_rounded_to_the_dtype_once():
    model = Model(preset("tiny-llama"))
    checkpoint = checkpoint_for(model)
    name = LAYER_1 + "mlp.down_proj.weight"
    params = load_params(
        model,
        checkpoint,
        dtype=jnp.bfloat16,
        stacked=False,
        shardings=first_device(model, False),
    )
    expected = checkpoint.tensors[name].astype(ml_dtypes.bfloat16)
    assert layer_of(params, 1)["w_down"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer_of(params, 1)["w_down"], expected)


def test_large_tensors_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(load, "PIECE_VALUES", 1000)
    model = Model(preset("tiny-qwen2"))
    checkpoint = checkpoint_for(model)
    params = load_params(
        model, checkpoint, dtype=jnp.float32, stacked=True, shardings=first_device(model, True)
    )
    # One group of heads is 2 x 16 rows of 64 values: the smallest piece that qkv comes in.
    assert max(checkpoint.sizes_read) == 2 * 16 * 64
    expected = checkpoint.tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params.ends["embed"], expected)
    jax.tree.map(np.testing.assert_array_equal, params, load_tiny("tiny-qwen2", stacked=True))


def test_the_hosts_peak_is_the_model_and_one_tensor():
    """Numpy's memory is traced: what JAX holds is not in it, so the peak is the tensor's."""
    model = Model(preset("tiny-llama"))
    checkpoint, shardings = checkpoint_for(model), first_device(model, False)
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    tracemalloc.start()
    params = load_params(model, checkpoint, dtype=jnp.float32, stacked=False, shardings=shardings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total
    # The weight, the piece that was read for it, and a megabyte for tracing shapes; on a CPU an
    # array may keep the numpy memory it came in, so all of the model can be in it as well.
    assert peak < total + 2 * largest + 2**20


@pytest.mark.parametrize("stacked", [True, False])
def test_progress_ends_at_the_models_size(stacked):
    model, seen = Model(preset("tiny-llama")), []
    for make in (
        lambda **kwargs: load_params(model, checkpoint_for(model), **kwargs),
        lambda **kwargs: random_params(model, seed=0, **kwargs),
    ):
        seen.clear()
        make(
            dtype=jnp.bfloat16,
            stacked=stacked,
            shardings=first_device(model, stacked),
            progress=lambda done, total: seen.append((done, total)),
        )
        size = 2 * model.config.params
        assert seen[-1] == (size, size)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def broken(change: Callable[[dict[str, np.ndarray]], Any], name: str = "tiny-llama") -> str:
    model = Model(preset(name))
    checkpoint = checkpoint_for(model)
    change(checkpoint.tensors)
    with pytest.raises(CheckpointError) as caught:
        load_params(
            model,
            checkpoint,
            dtype=jnp.float32,
            stacked=False,
            shardings=first_device(model, False),
        )
    assert checkpoint.sizes_read == []
    assert str(caught.value).startswith("checkpoint-in-memory does not fit its config. ")
    return str(caught.value)


def test_a_missing_tensor_is_named_with_its_shape():
    name = LAYER_1 + "self_attn.k_proj.weight"
    assert f"1 of 20 tensors are missing: {name} [32, 64]." in broken(lambda t: t.pop(name))


def test_a_wrong_shape_is_named_with_the_right_one():
    name = LAYER_1 + "mlp.down_proj.weight"
    message = broken(lambda t: t.update({name: np.zeros((64, 100), np.float32)}))
    assert f"{name} has shape [64, 100], expected [64, 128]" in message


def test_a_fused_tensor_of_the_wrong_shape_is_named_once():
    name = LAYER_1 + "self_attn.qkv_proj.weight"
    message = broken(lambda t: t.update({name: np.zeros((64, 64), np.float32)}), "tiny-phi3")
    assert f"1 tensors are misshapen: {name} has shape [64, 64], expected [128, 64]." in message


def test_a_tensor_without_a_place_is_an_error_and_not_ignored():
    """Biases that the config does not mention would change every answer."""
    name = LAYER_1 + "self_attn.q_proj.bias"
    message = broken(lambda t: t.update({name: np.zeros(64, np.float32)}))
    assert "1 tensors have no place in the model, and leaving them out would change" in message
    assert name in message


def test_a_layer_too_many_is_an_error():
    name = "model.layers.2.mlp.down_proj.weight"
    assert name in broken(lambda t: t.update({name: np.zeros((64, 128), np.float32)}))


def test_all_problems_are_told_together_and_long_lists_are_cut():
    message = broken(lambda t: (t.clear(), t.update(extra=np.zeros(1, np.float32))))
    assert "20 of 20 tensors are missing: model.embed_tokens.weight [512, 64]; " in message
    assert " and 16 more. " in message
    assert "1 tensors have no place in the model" in message


def test_tensors_that_follow_from_the_config_are_passed_over():
    model = Model(preset("tiny-llama"))
    checkpoint = checkpoint_for(model)
    checkpoint.tensors |= {
        LAYER_1 + "self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        "lm_head.weight": checkpoint.tensors["model.embed_tokens.weight"],
    }
    load_params(
        model, checkpoint, dtype=jnp.float32, stacked=False, shardings=first_device(model, False)
    )


@pytest.mark.parametrize("stacked", [True, False])
def test_random_weights_do_not_depend_on_the_mesh(stacked):
    """One model on every mesh, so that meshes can be compared without a checkpoint."""
    model = Model(preset("tiny-qwen2"))
    one, two = (
        random_params(model, seed=5, dtype=jnp.float32, stacked=stacked, shardings=shardings)
        for shardings in (first_device(model, stacked), over_tensor_axis(model, stacked, 2))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    direct = model.init(jax.random.key(5), jnp.float32, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, one, direct)


def test_random_weights_differ_by_seed_layer_and_weight():
    model = Model(preset("tiny-llama"))
    shardings = first_device(model, False)
    five, six = (
        random_params(model, seed=seed, dtype=jnp.float32, stacked=False, shardings=shardings)
        for seed in (5, 6)
    )
    matrices = [
        np.asarray(layer_of(params, layer)[key]).ravel()
        for params in (five, six)
        for layer in (0, 1)
        for key in ("w_qkv", "w_o", "w_gate_up", "w_down")
    ]
    for i, one in enumerate(matrices):
        assert abs(one.mean()) < 0.1 * one.std()
        for other in matrices[:i]:
            size = min(one.size, other.size)
            assert abs(np.corrcoef(one[:size], other[:size])[0, 1]) < 0.1
