"""A tokenizer as the zip of files that gateways build theirs from.

Written from the ``Tokenizer`` in use and not copied from a checkpoint: GGUF files have no such
files, and an operator may have replaced the chat template.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence

from jaxserve.frontend.tokenizer import Tokenizer

CHUNK_BYTES = 64 * 1024
"""Of one message of the stream; what other servers of this protocol send."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest time that a zip can hold. The same tokenizer is the same bytes on every replica."""


def bundle_tokenizer(
    tokenizer: Tokenizer, chat_template: str | None, end_ids: Sequence[int]
) -> bytes:
    """Returns the zip; takes up to a second for large vocabularies.

    Args:
        tokenizer: of the model.
        chat_template: the one in use; None leaves it out.
        end_ids: the tokens that end an answer.
    """
    named = dict(tokenizer.special_texts)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if chat_template is not None:
        config["chat_template"] = chat_template
    files = {
        "tokenizer.json": tokenizer.fast.to_str(),
        "tokenizer_config.json": json.dumps(config),
        "special_tokens_map.json": json.dumps(named),
        "generation_config.json": json.dumps({"eos_token_id": list(end_ids)}),
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), text, zipfile.ZIP_DEFLATED)
    return packed.getvalue()
