"""Makes the peers' copy of the model, in the environment of transformers.

    python -m bench.peers.convert GGUF FOLDER PROMPTS_FILE '["text", ...]'

Writes the weights of the GGUF file, dequantized to bfloat16, as safetensors, and the token ids of
some texts.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(words: list[str]) -> None:
    """Writes both, then checks that the copy still knows a capital."""
    gguf, folder, prompts = (Path(word) for word in words[:3])
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    named = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **named)
    # Without dequantizing, the weights stay packed and cannot be saved.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
        **named,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    if "Paris" not in said:
        raise SystemExit(f"the copy is not the model: {said!r}")
    texts = json.loads(words[3])
    prompts.write_text(json.dumps([tokenizer(text)["input_ids"] for text in texts]))


if __name__ == "__main__":
    main(sys.argv[1:])
