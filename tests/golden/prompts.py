"""The twenty prompts put to the pretrained models: prose, code, digits, many scripts, long texts.

Only the token ids they become are recorded, so a text that differs elsewhere changes no test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Label, text, and the number of tokens to keep (None: all of them).
SHORT: list[tuple[str, str, int | None]] = [
    ("one token", "The", 1),
    ("three tokens", "Once upon a time", 3),
    ("capital", "The capital of France is", None),
    ("arithmetic", "7 + 5 = 12\n8 + 6 = 14\n9 + 4 =", None),
    ("digits", "3.14159265358979323846 2.71828 1,048,576 0x1F 1e-9 2024-02-29", None),
    ("python", "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n", None),
    ("json", '{"name": "Ada", "born": 1815, "fields": ["mathematics",', None),
    ("shell", "#!/bin/sh\nset -eu\nfor file in *.txt; do\n\twc -l", None),
    ("german", "Die Würde des Menschen ist unantastbar. Sie zu achten und zu", None),
    ("french", "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma", None),
    ("chinese and japanese", "床前明月光，疑是地上霜。吾輩は猫である。名前はまだ無い。", None),  # noqa: RUF001
    ("russian, hindi and emoji", "Все счастливые семьи похожи 🙂 सभी मनुष्यों को 👩‍🚀", None),  # noqa: RUF001
    ("spaces and tabs", "a  b   c\t\td\n\n\n    e\r\n  f", None),
]
CHATS = {
    "smollm2": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nExplain photosynthesis in two sentences.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "gemma3": (
        "<start_of_turn>user\nExplain photosynthesis in two sentences.<end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
}
# Label, the text to take from its start, number of tokens. 600 and 1500 pass Gemma's window of 512.
LONG = [
    ("moby dick 100", "moby_dick", 100),
    ("shakespeare 160", "shakespeare", 160),
    ("code 220", "argparse", 220),
    ("licence 300", "gpl3", 300),
    ("code 600", "argparse", 600),
    ("moby dick 1500", "moby_dick", 1500),
]
FULL_LOGITS = ("capital", "moby dick 1500")


def make_prompts(model: str, texts: Mapping[str, str]) -> list[tuple[str, str, int | None]]:
    """Label, text and number of tokens of every prompt for a model."""
    # Ten characters a token is more than any of these texts needs.
    long = [(label, texts[name][: 10 * count], count) for label, name, count in LONG]
    return [*SHORT, ("chat", CHATS[model], None), *long]
