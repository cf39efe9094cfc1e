"""SmolLM2 and Gemma 3, from their GGUF files, against what transformers recorded in float32.

Attention is dense and there is no cache: this is the model alone. The served path is compared with
the same recordings elsewhere. What the recordings hold is said in ``tests/golden/README.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.decoder import Model, Params
from jaxserve.models.registry import model_config
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.load import load_params
from tests.weights.reexport import Family, reexport

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = (128, 384, 704, 1600)
"""Sequences are padded to one of these, so that four programs serve all of them."""

TOLERANCE = 3e-4
"""Of one logit, whose deviation is 3 to 4. Seen: 4.8e-5 in SmolLM2, 9.0e-5 in Gemma 3."""


@dataclass(frozen=True)
class Loaded:
    model: Model
    params: Params
    forward: Callable[..., Any]
    head: Callable[..., Any]

    def hidden(self, tokens: np.ndarray) -> Any:
        padded = np.zeros(next(n for n in LENGTHS if n >= len(tokens)), np.int32)
        padded[: len(tokens)] = tokens
        return self.forward(self.params, padded)

    def logits(self, hidden: Any, first: int, count: int) -> np.ndarray:
        """Logits after ``count`` tokens from ``first`` on."""
        return np.asarray(self.head(self.params, hidden[first : first + count]))


def load(checkpoint: Checkpoint, one_device: Any, dense_attend: Any) -> Loaded:
    model = Model(model_config(checkpoint.config))
    shardings = one_device(model, jnp.float32, True)
    params = load_params(model, checkpoint, dtype=jnp.float32, stacked=True, shardings=shardings)
    attend = dense_attend(model.config)

    def forward(params: Params, tokens: Any) -> Any:
        positions = jnp.arange(tokens.size, dtype=jnp.int32)[None]
        return model.forward(params, tokens[None], positions, (), attend, tensor_axis=None)[0][0]

    return Loaded(model, params, jax.jit(forward), jax.jit(model.logits))


@lru_cache(maxsize=1)
def pretrained(path: Path, one_device: Any, dense_attend: Any) -> Loaded:
    """The last one stays loaded, because several tests in a row use it."""
    return load(open_checkpoint(path), one_device, dense_attend)


@pytest.fixture(params=["smollm2", "gemma3"], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def projection_signs(vocab: int) -> np.ndarray:
    """[vocab, 64] of +1 and -1 from raw words of a seeded generator, as the recorder made them."""
    words = np.random.PCG64(20260101).random_raw(vocab)
    bits = words[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    return 1.0 - 2.0 * bits.astype(np.float64)


def test_logits_and_greedy_tokens_are_those_of_transformers(name, assets, one_device, dense_attend):
    """One pass over each prompt and its recorded continuation shows both."""
    loaded = pretrained(assets(name), one_device, dense_attend)
    golden = np.load(GOLDEN / f"{name}.npz")
    signs = projection_signs(loaded.model.config.vocab_size)
    ends = np.cumsum(golden["prompt_lengths"])
    prompts = np.split(golden["prompt_tokens"], ends[:-1])
    full = dict(zip(golden["full_prompts"].tolist(), golden["full_logits"], strict=True))
    worst = 0.0
    for number, (prompt, greedy) in enumerate(zip(prompts, golden["greedy_tokens"], strict=True)):
        hidden = loaded.hidden(np.concatenate([prompt, greedy]))
        logits = loaded.logits(hidden, len(prompt) - 1, len(greedy))

        assert logits.argmax(-1).tolist() == greedy.tolist(), f"prompt {number}"
        last = logits[0].astype(np.float64)
        differences = [last[golden["top_ids"][number]] - golden["top_logits"][number]]
        if number in full:
            differences.append(last - full[number])
        worst = max(worst, *(np.abs(difference).max() for difference in differences))
        # The root mean square over 64 signed sums estimates the length of the whole difference.
        length = np.sqrt(np.mean((last @ signs - golden["projections"][number]) ** 2))
        assert length < TOLERANCE * np.sqrt(len(last)), f"prompt {number}"
        peak = last.max()
        logsumexp = peak + np.log(np.exp(last - peak).sum())
        assert abs(logsumexp - golden["logsumexp"][number]) < TOLERANCE
    print(f"{name}: largest logit difference {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize(
    "text",
    [
        "moby_dick",
        "argparse",
        pytest.param("shakespeare", marks=pytest.mark.wide),
        pytest.param("gpl3", marks=pytest.mark.wide),
    ],
)
def test_the_first_window_of_each_text_is_as_likely_as_in_transformers(
    name, text, assets, one_device, dense_attend
):
    """Perplexity over 1024 tokens; the other three windows are left to the longer proofs."""
    loaded = pretrained(assets(name), one_device, dense_attend)
    golden = np.load(GOLDEN / f"perplexity_{name}.npz")
    tokens = golden[f"{text}_tokens"][0]
    hidden, nll = loaded.hidden(tokens), 0.0
    for first in range(0, 1024, 256):
        targets = tokens[first + 1 : first + 257]
        logits = loaded.logits(hidden, first, 256)[: len(targets)].astype(np.float64)
        peak = logits.max(-1)
        logsumexp = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
        nll += float((logsumexp - logits[np.arange(len(targets)), targets]).sum())
    assert nll == pytest.approx(golden[f"{text}_nll"][0], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_smollm2_written_as_another_family_gives_the_same_logits(
    family: Family, assets, one_device, dense_attend
):
    """A window as long as the context, biases of zero, fused projections: the same function."""
    path = assets("smollm2")
    original = pretrained(path, one_device, dense_attend)
    tokens = np.load(GOLDEN / "smollm2.npz")["prompt_tokens"][-100:]
    with tempfile.TemporaryDirectory() as scratch:
        written = open_checkpoint(reexport(open_checkpoint(path), Path(scratch), family))
        other = load(written, one_device, dense_attend)
        written.close()

    assert other.model.config.architecture == family
    np.testing.assert_array_equal(
        other.logits(other.hidden(tokens), 0, 100),
        original.logits(original.hidden(tokens), 0, 100),
    )
