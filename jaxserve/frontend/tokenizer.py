"""Text to token ids and back, and what a tokenizer knows about its special tokens.

Wraps the ``tokenizers`` library. Rebuilding from GGUF metadata is in ``tokenizer_gguf.py``, chat
templates in ``template.py``, text that arrives token by token in ``text.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from jaxserve.errors import InvalidRequestError, TokenizerError
from jaxserve.frontend.tokenizer_gguf import SPACE_MARK, Vocabulary, build_from_gguf
from jaxserve.tokenizer_source import TokenizerSource

END_TEXTS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<eos>",
        "</s>",
    }
)
"""Special tokens that end an answer in every model that has them.

Checkpoints list them unreliably: SmolLM2 names only ``<|im_end|>``, base models only the end of a
document. Only tokens marked as special count.
"""


class Tokenizer:
    """A model's tokenizer. Read-only once built, so safe to share between threads."""

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        source: str,
        bos_id: int | None,
        eos_ids: Iterable[int],
        chat_template: str | None,
        special_texts: Mapping[str, str] | None = None,
    ) -> None:
        """Takes over ``fast``; ``load_tokenizer`` is the usual way here.

        Raises:
            TokenizerError: text cannot be decoded token by token with this tokenizer.
        """
        # Padding and truncation stored in a tokenizer.json would change what a client sent.
        fast.no_padding()
        fast.no_truncation()
        self.fast = fast
        """The library's object, for its streaming decoder."""
        self.source = source
        self.bos_id = bos_id
        self.chat_template = chat_template
        self.special_texts: Mapping[str, str] = dict(special_texts or {})
        """``bos_token``, ``eos_token`` and such, as chat templates name them."""
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        """Control tokens; ``decode`` leaves them out unless asked."""
        ends = {number for number in self.special_ids if added[number].content in END_TEXTS}
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | ends
        """Every id that ends an answer."""
        self._scheme, self.strips_leading_space = _decoding(fast, source)
        # Filled as tokens are met; a dictionary store is atomic, so threads may share it.
        self._token_bytes: dict[int, bytes] = {}
        self.vocab_size = fast.get_vocab_size(with_added_tokens=True)
        """Entries; the model may have more rows (padding) or fewer (tokens it never sees)."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of ``text``.

        The text of a special token is read as that token, as in other engines: chat templates
        depend on it.
        Bytes that the vocabulary has no token for are lost, also as in other engines: SmolLM2 lacks
        21 of 256, which are six control characters and bytes that no assigned character has.

        Args:
            text: any string.
            add_special_tokens: put the model's start token in front, where it has one. Rendered
                chat templates carry their own and are encoded without.

        Raises:
            InvalidRequestError: half a character, which bytes that are not UTF-8 become in Python.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt is not Unicode at character {error.start}; send text that is valid UTF-8",
                field="prompt",
            ) from None
        return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of whole tokens; bytes that are not UTF-8 become U+FFFD.

        The same as the library's own decoding, except that it replaces a whole run of byte tokens
        when one of them is wrong, which text that arrives token by token cannot do.
        """
        skip = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join([self.token_bytes(number) for number in ids if number not in skip])
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for; empty for an id without an entry."""
        raw = self._token_bytes.get(token_id)
        if raw is None:
            raw = self._token_bytes[token_id] = self._find_bytes(token_id)
        return raw

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self.fast.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if self._scheme == "byte_level":
            # A piece with a character outside the alphabet is an added token in plain text.
            table = [_BYTES.get(char, -1) for char in piece]
            return piece.encode() if -1 in table else bytes(table)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes((int(piece[3:5], 16),))
        return piece.replace(SPACE_MARK, " ").encode()

    def token_text(self, token_id: int) -> str:
        """Returns one token as text; half a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides ids, text and prompts."""
        parts = [
            self.fast.to_str(),
            str(self.bos_id),
            str(sorted(self.eos_ids)),
            self.chat_template or "",
            json.dumps(self.special_texts, sort_keys=True),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _decoding(fast: FastTokenizer, source: str) -> tuple[str, bool]:
    """Returns how pieces stand for bytes, and whether a leading space is dropped."""
    state: dict[str, Any] = {}
    if fast.decoder is not None:
        state = json.loads(fast.decoder.__getstate__())
    steps = state.get("decoders", [state])
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return "byte_level", False
    if kinds == ["Metaspace"]:
        return "byte_fallback", steps[0].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return "byte_fallback", "Strip" in kinds
    raise TokenizerError(
        f"{source} has a tokenizer that decodes with {kinds}; supported are ByteLevel, Metaspace, "
        "and ByteFallback with Replace, Fuse and Strip"
    )


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Builds the tokenizer of a checkpoint.

    Raises:
        TokenizerError: it is missing, damaged, or of a kind that is not supported.
    """
    if source.gguf is not None:
        return _from_gguf(source.source, source.gguf)
    return _from_files(source)


def _from_gguf(path: str, values: Mapping[str, Any]) -> Tokenizer:
    fast = build_from_gguf(path, values)
    vocabulary = Vocabulary.read(path, values)
    named = {
        f"{name}_token": vocabulary.tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := vocabulary.token_id(key)) is not None
    }
    ends = (vocabulary.token_id(key) for key in ("eos", "eot", "eom"))
    template = values.get("tokenizer.chat_template")
    return Tokenizer(
        fast,
        source=path,
        bos_id=vocabulary.token_id("bos"),
        eos_ids=[number for number in ends if number is not None],
        chat_template=template if isinstance(template, str) and template else None,
        special_texts=named,
    )


def _from_files(source: TokenizerSource) -> Tokenizer:
    raw = source.files.get("tokenizer.json")
    if raw is None:
        raise TokenizerError(
            f"{source.source} has no tokenizer.json (found: "
            f"{', '.join(sorted(source.files)) or 'no tokenizer file at all'}); put it beside "
            "config.json, or convert tokenizer.model with the transformers library"
        )
    try:
        fast = FastTokenizer.from_buffer(raw)
    except Exception as error:  # The library raises bare Exception for anything malformed.
        raise TokenizerError(
            f"{source.source}/tokenizer.json cannot be read ({error}); fetch it again"
        ) from error
    settings = _json(source, "tokenizer_config.json")
    named = _special_texts({**_json(source, "special_tokens_map.json"), **settings})
    ends = _end_ids(_json(source, "generation_config.json"))
    ends |= _end_ids(_json(source, "config.json"))
    eos = fast.token_to_id(named["eos_token"]) if "eos_token" in named else None
    if eos is not None:
        ends.add(eos)
    bos = fast.token_to_id(named["bos_token"]) if "bos_token" in named else None
    return Tokenizer(
        fast,
        source=source.source,
        bos_id=bos,
        eos_ids=ends,
        chat_template=_chat_template(source, settings),
        special_texts=named,
    )


def _end_ids(settings: Mapping[str, Any]) -> set[int]:
    value = settings.get("eos_token_id")
    items: list[Any] = value if isinstance(value, list) else [value]
    return {item for item in items if type(item) is int and item >= 0}


def _special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Collects ``*_token`` entries, which are strings or objects with ``content``."""
    found = {}
    for key, value in settings.items():
        if key.startswith("add_") or not key.endswith("_token"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _chat_template(source: TokenizerSource, settings: Mapping[str, Any]) -> str | None:
    """Finds the template: its own file first, then the tokenizer's settings."""
    if "chat_template.jinja" in source.files:
        return _text(source, "chat_template.jinja")
    for value in (
        _json(source, "chat_template.json").get("chat_template"),
        settings.get("chat_template"),
    ):
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            # Several named templates; "default" is the one for plain chat.
            named = {
                item.get("name"): item.get("template") for item in value if isinstance(item, dict)
            }
            template = named.get("default")
            if isinstance(template, str):
                return template
    return None


def _text(source: TokenizerSource, name: str) -> str:
    try:
        return source.files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{source.source}/{name} is not UTF-8 ({error.reason}); fetch it again"
        ) from None


def _json(source: TokenizerSource, name: str) -> dict[str, Any]:
    if name not in source.files:
        return {}
    try:
        value = json.loads(_text(source, name))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{source.source}/{name} is not JSON ({str(error)[:80]}); fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{source.source}/{name} must hold a JSON object; fetch it again")
    return value


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's table: every byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in set(printable))
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + number): byte for number, byte in enumerate(rest)})
    return table


_BYTES = _byte_alphabet()
