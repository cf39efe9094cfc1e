"""What each family makes of a ``config.json``, and which options it refuses, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import ModelConfig, RopeScaling
from jaxserve.models.presets import preset
from jaxserve.models.registry import CLASSES, model_config

TINY = Path(__file__).parents[1] / "golden" / "tiny"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")


def hf(family: str, **changes: Any) -> dict[str, Any]:
    """The published spelling of a tiny config; a change to ``...`` removes the key."""
    values = json.loads((TINY / family / "config.json").read_text("utf-8")) | changes
    return {key: value for key, value in values.items() if value is not ...}


def refused(family: str, **changes: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        model_config(hf(family, **changes))
    return str(caught.value)


def malformed(family: str, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_config(hf(family, **changes))
    assert not isinstance(caught.value, UnsupportedModelError)
    return str(caught.value)


# --- What is read -----------------------------------------------------------------------------


def test_llama_reads_its_config():
    assert model_config(hf("llama")) == ModelConfig(
        architecture="llama",
        vocab_size=320,
        embed=64,
        layers=4,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=96,
        context_tokens=512,
        rms_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_context_tokens=64,
        ),
        windows=(0, 0, 0, 0),
        tie_embeddings=True,
        attention_scale=0.25,
        eos_token_ids=(2,),
    )


def test_gemma3_reads_its_config():
    assert model_config(hf("gemma3")) == ModelConfig(
        architecture="gemma3",
        vocab_size=320,
        embed=64,
        layers=6,
        q_heads=4,
        kv_heads=1,
        head_dim=32,
        ffn=64,
        context_tokens=512,
        rms_eps=1e-6,
        rope_theta=1e6,
        local_rope_theta=1e4,
        windows=(16, 16, 16, 16, 16, 0),
        tie_embeddings=True,
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        activation="gelu_tanh",
        embed_scale=8.0,
        attention_scale=40**-0.5,
        eos_token_ids=(1,),
    )


def test_gemma3_reads_linear_scaling_layer_types_and_the_logit_softcap():
    config = model_config(
        hf(
            "gemma3",
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            layer_types=["full_attention"] * 2 + ["sliding_attention"] * 4,
            final_logit_softcapping=30.0,
        )
    )
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert config.windows == (0, 0, 16, 16, 16, 16)
    assert config.logit_softcap == 30.0


def test_gemma3_keeps_a_window_as_long_as_the_context():
    """It tells which layers have the local rope base."""
    assert model_config(hf("gemma3", sliding_window=512)).windows == (512,) * 5 + (0,)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_applies_to_all_layers_unless_it_never_hides_a_token(family):
    assert model_config(hf(family, sliding_window=16)).windows == (16,) * 3
    assert model_config(hf(family, sliding_window=512)).windows == (0,) * 3
    assert model_config(hf(family, sliding_window=None)).windows == (0,) * 3


def test_a_window_that_is_not_mentioned_is_the_familys_default():
    context = {"max_position_embeddings": 32768, "sliding_window": ...}
    assert model_config(hf("mistral", **context)).windows == (4096,) * 3
    assert model_config(hf("phi3", **context)).windows == (0,) * 3


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows_are_off_or_on_the_upper_layers(family):
    on = {"sliding_window": 32, "max_window_layers": 2, "num_hidden_layers": 4}
    assert model_config(hf(family, use_sliding_window=False, **on)).windows == (0, 0, 0, 0)
    assert model_config(hf(family, use_sliding_window=True, **on)).windows == (0, 0, 32, 32)
    types = ["sliding_attention", "full_attention"] * 2
    stated = model_config(hf(family, use_sliding_window=True, layer_types=types, **on))
    assert stated.windows == (32, 0, 32, 0)


def test_families_differ_where_their_papers_do():
    features = {
        family: (config.qkv_bias, config.qk_norm, config.post_norms)
        for family in FAMILIES
        if (config := model_config(hf(family)))
    }
    assert features == {
        "llama": (False, False, False),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (False, True, False),
        "phi3": (False, False, False),
        "gemma3": (False, True, True),
    }


def test_head_dim_follows_from_the_width_when_it_is_not_stated():
    assert model_config(hf("llama", head_dim=...)).head_dim == 16
    assert model_config(hf("llama", head_dim=None)).head_dim == 16
    assert model_config(hf("llama", head_dim=32)).head_dim == 32


def test_key_value_heads_default_to_query_heads():
    assert model_config(hf("llama", num_key_value_heads=...)).kv_heads == 4


@pytest.mark.parametrize(("stated", "expected"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_end_tokens_may_be_one_or_several_or_none(stated, expected):
    assert model_config(hf("llama", eos_token_id=stated)).eos_token_ids == expected


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_rope_type_has_two_spellings(key):
    config = model_config(hf("llama", rope_scaling={key: "linear", "factor": 4.0}))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_a_config_without_rope_keys_has_the_published_bases():
    assert model_config(hf("llama", rope_theta=..., rope_scaling=...)).rope_theta == 10_000.0
    gemma = model_config(hf("gemma3", rope_theta=..., rope_local_base_freq=...))
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1_000_000.0, 10_000.0)


@pytest.mark.parametrize(("class_name", "family"), [(c, f) for c, (f, _) in CLASSES.items()])
def test_the_model_type_decides_where_no_class_is_named(class_name, family):
    assert model_config(hf(family, architectures=...)).architecture == family
    assert model_config(hf(family, model_type=...)).architecture == family
    assert hf(family)["architectures"] == [class_name]


# --- What is refused --------------------------------------------------------------------------


def test_another_architecture_is_refused_with_the_list_of_supported_ones():
    message = refused("llama", architectures=["MixtralForCausalLM"])
    assert "names the architecture 'MixtralForCausalLM', which is not implemented" in message
    assert "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM" in message


def test_another_head_on_a_supported_model_is_refused():
    """A reward model has model_type llama too, and no tokens to give."""
    message = refused("llama", architectures=["LlamaForSequenceClassification"])
    assert "'LlamaForSequenceClassification'" in message


def test_an_unknown_model_type_is_refused_when_no_class_is_named():
    assert "names the model_type 'mamba'" in refused("llama", architectures=[], model_type="mamba")
    assert "names the model_type None" in refused("llama", architectures=..., model_type=...)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", "mrope"])
def test_a_rope_type_that_is_not_implemented_is_refused_by_name(family, kind):
    message = refused(family, rope_scaling={"rope_type": kind, "factor": 4.0})
    assert f"{family}: rope_type {kind!r} is not implemented" in message
    assert "supported: default, linear, llama3" in message


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("mistral", "hidden_act", "relu"),
        ("qwen2", "hidden_act", "gelu"),
        ("qwen3", "hidden_act", "gelu"),
        ("qwen3", "attention_bias", True),
        ("phi3", "hidden_act", "gelu"),
        ("phi3", "attention_bias", True),
        ("gemma3", "hidden_activation", "gelu"),
        ("gemma3", "attention_bias", True),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(family, key, value):
    message = refused(family, **{key: value})
    assert f"{family}: {key} = {value!r} is not implemented; supported: " in message


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "logit_scale", 0.5),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("qwen3", "num_experts", 128),
    ],
)
def test_an_option_that_would_change_the_answers_is_refused_by_name(family, key, value):
    message = refused(family, **{key: value})
    assert f"{family}: the option {key} = {value!r} is not implemented" in message
    assert model_config(hf(family, **{key: None})) == model_config(hf(family))


def test_a_long_value_is_cut_short_in_the_message():
    message = refused("llama", clip_qkv={"modules": list(range(100))})
    assert "..." in message
    assert len(message) < 250


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_parameters"])
def test_partly_rotated_heads_are_refused(key):
    part = {"partial_rotary_factor": 0.5, "rope_theta": 1e4}
    message = refused("phi3", **{key: 0.5 if key == "partial_rotary_factor" else part})
    assert "phi3: partial_rotary_factor = 0.5 is not implemented" in message


def test_rope_per_layer_type_is_refused_where_it_is_not_implemented():
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    message = refused("qwen3", rope_parameters=nested)
    assert "per layer type (full_attention, sliding_attention) are not implemented" in message


def test_an_unknown_layer_type_is_refused():
    types = ["chunked_attention"] * 3
    assert "layer type 'chunked_attention' is not implemented" in refused(
        "qwen3", layer_types=types
    )


def test_scaled_local_layers_are_refused():
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    message = refused("gemma3", rope_parameters={"sliding_attention": scaled})
    assert "rope_parameters scale the sliding_attention layers (linear)" in message


# --- What makes no sense ----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps", "num_hidden_layers"])
def test_a_missing_key_is_named(key):
    assert f"config.json has no {key!r}, which llama needs" in malformed("llama", **{key: ...})


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True])
def test_a_size_must_be_a_positive_integer(value):
    message = malformed("llama", hidden_size=value)
    assert f"hidden_size must be an integer of at least 1, got {value!r}" in message


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1e-5"])
def test_a_number_must_be_positive_and_finite(value):
    message = malformed("llama", rms_norm_eps=value)
    assert f"rms_norm_eps of llama must be a positive number, got {value!r}" in message


def test_a_flag_must_be_true_or_false():
    message = malformed("llama", tie_word_embeddings="yes")
    assert "tie_word_embeddings must be true or false, got 'yes'" in message


def test_token_ids_must_be_integers():
    assert "eos_token_id must be a token id or a list of them" in malformed(
        "llama", eos_token_id=[1, "</s>"]
    )


def test_rope_options_must_be_an_object():
    assert "must be an object, got 'linear'" in malformed("llama", rope_scaling="linear")


def test_rope_scaling_needs_its_numbers():
    message = malformed("llama", rope_scaling={"rope_type": "linear"})
    assert "rope scaling's factor of llama must be a positive number, got None" in message


def test_layer_types_must_name_every_layer():
    message = malformed("qwen3", layer_types=["full_attention"])
    assert "layer_types must be a list of 3 kinds, got ['full_attention']" in message


def test_an_uneven_width_needs_a_head_dim():
    message = malformed("llama", hidden_size=66, head_dim=...)
    assert "hidden_size 66 is not a multiple of num_attention_heads 4" in message


def test_a_rope_factor_below_one_is_refused():
    with pytest.raises(CheckpointError, match=r"factor must be at least 1, got 0.5"):
        RopeScaling(kind="linear", factor=0.5)


def test_rope_scaling_bounds_must_be_in_order():
    with pytest.raises(CheckpointError, match="low_freq_factor < high_freq_factor, got 4 and 4"):
        RopeScaling(kind="llama3", factor=8.0, low_freq_factor=4.0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ffn": 0}, "llama: ffn must be at least 1, got 0"),
        ({"q_heads": 5}, "5 query heads cannot share 2 key/value heads evenly"),
        ({"head_dim": 15}, "rope rotates pairs, and head_dim 15 is odd"),
        ({"windows": (0,)}, "1 attention windows are given for 2 layers"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(changes, text):
    with pytest.raises(CheckpointError, match=text):
        replace(preset("tiny-llama"), **changes)


# --- What follows from it ---------------------------------------------------------------------


def test_a_config_can_be_a_static_argument():
    assert hash(preset("gemma-3-270m")) == hash(preset("gemma-3-270m"))
