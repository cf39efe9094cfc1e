"""Scales of input channels: folding changes nothing, and the search errs less."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import calibration
from jaxserve.calibration import SEARCHED, Found, folded, search_scales
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Model, Params
from jaxserve.models.layers import rms_norm
from jaxserve.models.presets import preset

TINY = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3")
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 48)).astype(np.int32)


def floats(config: ModelConfig) -> Params:
    return Model(config).init(jax.random.key(1), jnp.float32, stacked=True)


def made_up_scales(config: ModelConfig) -> list[Found]:
    """Far from one, and for ``w_o`` those of a value alike in its group of queries."""
    rng = np.random.default_rng(2)

    def drawn(*shape: int) -> np.ndarray:
        return np.exp(rng.standard_normal(shape)).astype(np.float32)

    of_values = drawn(config.kv_heads, 1, config.head_dim)
    w_o = np.broadcast_to(of_values, (config.kv_heads, config.group, config.head_dim))
    scales = {
        "w_qkv": drawn(config.embed),
        "w_o": w_o.reshape(config.q_heads, config.head_dim),
        "w_gate_up": drawn(config.embed),
        "w_down": drawn(config.ffn),
    }
    return [Found(name, 0.5, 1.0, 1.0, scale) for name, scale in scales.items()]


@pytest.mark.parametrize("name", TINY)
def test_folded_scales_change_no_logit(name: str, dense_logits: Any) -> None:
    config = preset(name)
    params, model = floats(config), Model(config)
    assert isinstance(params.layers, dict)
    found = made_up_scales(config)
    layers = [
        folded(
            {key: np.asarray(stack[number]) for key, stack in params.layers.items()},
            found,
            offset=config.norm_offset,
        )
        for number in range(config.layers)
    ]
    changed = Params(params.ends, jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers))
    assert not np.allclose(changed.layers["w_qkv"], params.layers["w_qkv"])  # pyright: ignore
    expected = dense_logits(model, params, TOKENS)
    np.testing.assert_allclose(dense_logits(model, changed, TOKENS), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_search_sees_what_the_model_computes(
    name: str, dense_logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's answers, taken through the norm and the head, are the model's logits."""
    config = preset(name)
    params, model = floats(config), Model(config)
    answers: list[Any] = []
    watch = calibration._WatchedModel.watch

    def remembered(self: Any, *arguments: Any) -> Any:
        out = watch(self, *arguments)
        jax.debug.callback(lambda x: answers.append(np.asarray(x)), out[0])
        return out

    monkeypatch.setattr(calibration._WatchedModel, "watch", remembered)
    formats: dict[str, str] = dict.fromkeys(SEARCHED, "int8/row")
    assert len(list(search_scales(config, params, formats, TOKENS))) == config.layers
    jax.effects_barrier()
    hidden = rms_norm(
        jnp.asarray(answers[-1]),
        params.ends["final_norm"],
        eps=config.rms_eps,
        offset=config.norm_offset,
    )
    expected = dense_logits(model, params, TOKENS)
    np.testing.assert_allclose(model.logits(params, hidden), expected, rtol=1e-3, atol=1e-3)


def test_the_search_lowers_the_error_where_some_channels_are_loud() -> None:
    """One channel of a norm is 30 times the others; searched, its weights are rounded finer."""
    config = preset("tiny-llama")
    params = floats(config)
    assert isinstance(params.layers, dict)
    params.layers["attn_norm"] = params.layers["attn_norm"].at[:, 5].set(30.0)
    formats = dict.fromkeys(SEARCHED, "int4") | {"w_o": "int8/row"}
    for found in search_scales(config, params, formats, TOKENS):
        assert [one.weight for one in found] == list(SEARCHED)
        for one in found:
            assert one.error <= one.plain_error
        qkv = found[0]
        assert qkv.exponent > 0
        assert qkv.error < 0.7 * qkv.plain_error
        assert qkv.scale.argmax() == 5
