"""What is asked of a `transformers` model: logits, greedy tokens and how near they came to a tie.

Everything here takes a loaded model and token ids. Where the model comes from (`pretrained`,
`tiny`) and how the answers are laid out in files (the same two) is decided elsewhere.

Every recorded number comes from one plain forward pass without a cache, in float32, with eager
attention. The cached decode loop only proposes the tokens, and is checked against that pass.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel

PROJECTION_SEED = 20260101
PROJECTION_COUNT = 64


@dataclass(frozen=True)
class Continuation:
    """One prompt's greedy continuation; row i belongs to the i-th generated token."""

    prompt_logits: npt.NDArray[np.float32]  # [prompt, vocab]: what follows each prompt token
    tokens: npt.NDArray[np.int32]
    runners_up: npt.NDArray[np.int32]
    gaps: npt.NDArray[np.float32]  # logit of the token minus logit of its runner-up


def plain_logits(model: PreTrainedModel, tokens: Sequence[int], keep: int) -> torch.Tensor:
    """The logits after each of the last `keep` tokens, from one pass without a cache."""
    with torch.inference_mode():
        ids = torch.tensor([list(tokens)])
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]


def greedy_tokens(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most likely tokens after the prompt, one at a time; no token ends it."""
    tokens: list[int] = []
    with torch.inference_mode():
        step = model(input_ids=torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        while True:
            tokens.append(int(step.logits[0, -1].argmax()))
            if len(tokens) == count:
                return tokens
            ids = torch.tensor([tokens[-1:]])
            step = model(input_ids=ids, past_key_values=step.past_key_values, use_cache=True)


def continue_greedily(
    model: PreTrainedModel, prompt: Sequence[int], count: int, keep: int
) -> Continuation:
    """Continues a prompt by `count` tokens and keeps the logits of its last `keep` positions."""
    tokens = greedy_tokens(model, prompt, count)
    logits = plain_logits(model, [*prompt, *tokens[:-1]], keep + count - 1)
    best = logits[keep - 1 :].topk(2, dim=-1)
    chosen = best.indices[:, 0].tolist()
    gaps = (best.values[:, 0] - best.values[:, 1]).numpy()
    if chosen != tokens:
        at = next(i for i, pair in enumerate(zip(chosen, tokens, strict=True)) if len({*pair}) == 2)
        raise RuntimeError(
            f"cached decoding chose token {tokens[at]} at position {at}, the plain pass "
            f"{chosen[at]} by {gaps[at]:.2e} logits; choose a prompt without such a tie"
        )
    return Continuation(
        prompt_logits=logits[:keep].numpy(),
        tokens=np.array(tokens, np.int32),
        runners_up=best.indices[:, 1].numpy().astype(np.int32),
        gaps=gaps,
    )


def window_nll(model: PreTrainedModel, tokens: Sequence[int]) -> float:
    """Negative log-likelihood in nats of every token but the first, summed in float64."""
    total = 0.0
    with torch.inference_mode():
        hidden = model.base_model(input_ids=torch.tensor([list(tokens)]), use_cache=False)[0][0]
        # In slices, because 1024 positions of a 262,144-entry vocabulary are a gigabyte.
        for start in range(0, len(tokens) - 1, 128):
            targets = torch.tensor(list(tokens[start + 1 : start + 129]))
            logits = model.get_output_embeddings()(hidden[start : start + len(targets)])
            log_probs = logits.log_softmax(dim=-1)
            total -= float(log_probs.gather(1, targets[:, None]).double().sum())
    return total


def projection_signs(vocab: int) -> npt.NDArray[np.float64]:
    """[vocab, 64] of plus and minus ones: bit j of the generator's i-th word signs entry (i, j).

    Raw words of a bit generator, because numpy promises those for ever and no distribution.
    """
    words = np.random.PCG64(PROJECTION_SEED).random_raw(vocab)
    bits = (words[:, None] >> np.arange(PROJECTION_COUNT, dtype=np.uint64)) & np.uint64(1)
    return 1.0 - 2.0 * bits.astype(np.float64)
