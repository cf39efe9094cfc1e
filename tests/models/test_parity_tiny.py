"""Tiny random checkpoints of every architecture against what transformers computed from them.

Config, loader and decoder are under test together, from the files on; how the answers were
recorded stands beside them in ``tests/golden``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.decoder import Model, Params
from jaxserve.models.registry import model_config
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_params

TINY = Path(__file__).parents[1] / "golden" / "tiny"
NAMES = ("llama", "llama2", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
NAMES += ("mixtral", "qwen2_moe", "qwen3_moe")

# Of the spread of the logits. Both sides compute in float32 and sum in different orders; the
# largest difference seen is 2.4e-5, in gemma3.
TOLERANCE = 1e-4


def load(name: str, one_device: Callable[..., Params]) -> tuple[Model, Params]:
    checkpoint = open_checkpoint(TINY / name)
    model = Model(model_config(checkpoint.config))
    params = load_params(
        model,
        checkpoint,
        dtype=jnp.float32,
        stacked=True,
        shardings=one_device(model, jnp.float32, True),
    )
    checkpoint.close()
    return model, params


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, one_device, dense_logits):
    """One pass over a prompt and its recorded continuation shows both.

    If every recorded token is the likeliest after those before it, greedy decoding gives them.
    """
    model, params = load(name, one_device)
    recorded = np.load(TINY / name / "reference.npz")
    for number in range(3):
        prompt, greedy = recorded[f"prompt_{number}"], recorded[f"greedy_{number}"]
        expected, gaps = recorded[f"logits_{number}"], recorded[f"gaps_{number}"]
        # Padded to one length, which is one program; what follows cannot be seen.
        tokens = np.zeros(160, np.int32)
        tokens[: len(prompt) + len(greedy)] = [*prompt, *greedy]

        logits = dense_logits(model, params, tokens)

        seen = logits[len(prompt) - len(expected) : len(prompt)]
        tolerance = TOLERANCE * expected.std()
        np.testing.assert_allclose(seen, expected, rtol=0, atol=tolerance)
        assert gaps.min() > 2 * tolerance, "the recording has a tie; choose another prompt"
        answers = logits[len(prompt) - 1 : len(prompt) - 1 + len(greedy)].argmax(-1)
        np.testing.assert_array_equal(answers, greedy)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_spellings_of_a_config_mean_the_same(name):
    """``rope_theta`` beside ``rope_scaling`` until transformers 4, ``rope_parameters`` since 5."""
    old: dict[str, Any] = json.loads((TINY / name / "config.json").read_text("utf-8"))
    new: dict[str, Any] = json.loads((TINY / name / "config_v5.json").read_text("utf-8"))
    assert ("rope_parameters" in new, "rope_parameters" in old) == (True, False)
    assert model_config(old) == model_config(new)
