"""KL over chunks of the vocabulary against float64, also where it is smaller than rounding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.decoder import Model
from jaxserve.models.presets import preset
from jaxserve.runner import programs
from jaxserve.runner.divergence import diverge
from jaxserve.runner.programs import StepPrograms

VOCAB, EMBED, PLACES = 512, 64, 7


@pytest.mark.parametrize("chunk", [100, 512], ids=["the last chunk repeats", "one chunk"])
@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0])
def test_kl_is_exact_from_tiny_to_large(
    change: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each logit is one product with 1, which has no rounding: what is tested are the sums.

    A log-probability near 20 is rounded by 1e-6, and so is a difference of ``change`` between two:
    that is a share of 2e-6 / change of a KL, which goes with the difference's square. KL is 4e-9
    at least here, 1/500 of such a rounding.
    """
    monkeypatch.setattr(programs, "SCORE_VOCAB_CHUNK", chunk)
    rng = np.random.default_rng(0)
    head = np.zeros((VOCAB, EMBED), np.float32)
    # One feature to a token; eight tokens share each.
    head[np.arange(VOCAB), np.arange(VOCAB) % EMBED] = 1.0
    hidden = (4 * rng.standard_normal((PLACES, EMBED))).astype(np.float32)
    other = (hidden + change * rng.standard_normal(hidden.shape)).astype(np.float32)
    steps = StepPrograms(Model(preset("tiny-llama")), 4, None, has_native=False)

    kl, same = diverge(steps, steps, *map(jnp.asarray, (head, head, hidden, other)))

    p, q = (log_softmax(x.astype(np.float64) @ head.T) for x in (hidden, other))
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(kl, expected, rtol=1e-5 + 2e-6 / change)
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_of_equals_the_first_token_is_the_likeliest() -> None:
    steps = StepPrograms(Model(preset("tiny-llama")), 4, None, has_native=False)
    flat = jnp.zeros((VOCAB, EMBED), jnp.float32)
    first = flat.at[0, 0].set(1.0)
    last = flat.at[VOCAB - 1, 0].set(1.0)
    hidden = jnp.ones((1, EMBED), jnp.float32)
    assert diverge(steps, steps, flat, first, hidden, hidden)[1].tolist() == [True]
    assert diverge(steps, steps, flat, last, hidden, hidden)[1].tolist() == [False]
