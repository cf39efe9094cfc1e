"""What a plain float32 pass of transformers says: its greedy answers, and of those of others.

It runs once, after all that is timed, on the weights that everybody has (those of the GGUF file),
dequantized to float32.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load(gguf: Path) -> Any:
    """Returns the model in float32."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    model.generation_config.eos_token_id = None  # Everybody goes past end tokens.
    return model


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Returns the likeliest next tokens, one after another."""
    torch = importlib.import_module("torch")
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def loss(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Returns the summed negative log-likelihood of an answer, in nats."""
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -log_p[range(len(answer)), list(answer)].sum().item()


def main(words: list[str]) -> None:
    """Reads ``{"gguf", "prompts", "count", "answers": {name: [ids, ...]}}``; writes its verdict."""
    told = json.loads(sys.stdin.read())
    model = load(Path(told["gguf"]))
    own = [greedy(model, prompt, told["count"]) for prompt in told["prompts"]]
    losses = {
        name: sum(loss(model, *pair) for pair in zip(told["prompts"], answers, strict=True))
        for name, answers in [("reference", own), *told["answers"].items()]
    }
    Path(words[0]).write_text(json.dumps({"reference": own, "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1:])
