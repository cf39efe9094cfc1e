"""Built-in configs against the published numbers of the models they name."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from jaxserve.errors import UnsupportedModelError
from jaxserve.models.decoder import Model
from jaxserve.models.presets import PRESETS, preset
from jaxserve.models.registry import weight_sources

PUBLISHED_PARAMS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-3-270m": 268_098_176,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_a_preset_has_as_many_weights_as_the_model_it_names(name):
    assert preset(name).params == PUBLISHED_PARAMS[name]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("stacked", [True, False])
def test_the_weights_of_a_model_add_up_to_its_parameter_count(name, stacked):
    shapes = jax.tree.leaves(Model(preset(name)).abstract(jnp.bfloat16, stacked=stacked))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == preset(name).params


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_has_a_source_of_its_shape(name):
    config = preset(name)
    abstract, sources = Model(config).abstract(jnp.float32, stacked=False), weight_sources(config)
    assert isinstance(abstract.layers, tuple)
    for weights, described in ((abstract.ends, sources.ends), (abstract.layers[0], sources.layer)):
        assert weights.keys() == described.keys()
        for key, source in described.items():
            together = list(source.parts[0].shape)
            together[source.axis] = sum(part.shape[source.axis] for part in source.parts)
            assert weights[key].shape == tuple(together)


def test_an_unknown_preset_is_refused_with_the_list_of_names():
    with pytest.raises(UnsupportedModelError, match=r"no built-in model 'gpt-5'.*smollm2-135m"):
        preset("gpt-5")


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
def test_tiny_presets_have_room_for_bytes_and_special_tokens(name):
    config = preset(name)
    assert config.vocab_size >= 512
    assert all(256 <= token < config.vocab_size for token in config.eos_token_ids)
