"""A tokenizer for models with random weights: one token per byte, and the three ChatML marks.

It lets ``dummy:NAME`` models take and give text, so that everything but the meaning can be tried.
"""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxserve.frontend.tokenizer import Tokenizer

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Builds it: ids 0 to 2 are the marks, then the 256 bytes."""
    marks = [END, START, STOP]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate([*marks, *alphabet])}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return Tokenizer(
        fast,
        source="the built-in byte tokenizer",
        bos_id=vocab[START],
        eos_ids=[vocab[STOP], vocab[END]],
        chat_template=TEMPLATE,
        special_texts={"bos_token": START, "eos_token": STOP},
    )
