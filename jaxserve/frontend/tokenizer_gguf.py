"""Rebuilds a tokenizer from GGUF metadata with the ``tokenizers`` library.

GGUF stores the vocabulary and the merges but only the *name* of the pre-tokenizer, so the rules
behind the names are listed here. They are llama.cpp's, and its published test vectors check them.
Tokenizers that come as files, and everything done with a finished tokenizer, are left to
``tokenizer.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from jaxserve.errors import TokenizerError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    + r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}{_CASED_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}{_CASED_TAIL}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merges are applied."""

    regex: str | None = None
    """None is GPT-2's own, which ``ByteLevel`` carries."""
    digits: bool = False
    """Every digit is cut off first."""
    nfc: bool = False
    """Text is brought to Unicode's composed form first."""
    ignore_merges: bool = False
    """A whole piece that is in the vocabulary is one token, merges or not."""
    adds_bos: bool = False
    """Whether the start token is added when the file does not say."""


_GPT2_RULE = PreTokenizer()
_DIGITS_RULE = PreTokenizer(digits=True)
_LLAMA3_RULE = PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True)
_QWEN2_RULE = PreTokenizer(_QWEN2, nfc=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
    "codeshell": _DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "pixtral": _LLAMA3_RULE,
    "falcon3": _LLAMA3_RULE,
    "dbrx": PreTokenizer(_LLAMA3),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "megrez": _QWEN2_RULE,
    "qwen35": PreTokenizer(_QWEN35),
    "tekken": PreTokenizer(_TEKKEN, ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer(_GPT4O),
    "llama4": PreTokenizer(_GPT4O),
}
"""By ``tokenizer.ggml.pre``. dbrx is Phi-4's and gpt-4o Phi-4-mini's."""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
SPACE_MARK = "\u2581"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class Vocabulary:
    """The checked contents of the ``tokenizer.ggml.*`` keys."""

    source: str
    values: Mapping[str, Any]
    tokens: Sequence[str]
    types: Sequence[int]

    @classmethod
    def read(cls, source: str, values: Mapping[str, Any]) -> Vocabulary:
        """Checks that tokens and their types are there and match."""
        tokens = values.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise TokenizerError(
                f"{source} has no tokenizer (no tokenizer.ggml.tokens in its metadata); "
                "convert it again with its tokenizer, or name one with --tokenizer"
            )
        types = values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        if not isinstance(types, list) or len(types) != len(tokens):
            raise TokenizerError(
                f"{source} has {len(tokens)} tokens and another number of token types; "
                "convert it again"
            )
        if len(set(tokens)) != len(tokens):
            raise TokenizerError(f"{source} has the same token twice; convert it again")
        return cls(source, values, tokens, types)

    def token_id(self, key: str) -> int | None:
        """Returns ``tokenizer.ggml.{key}_token_id``, checked; None when it is not there."""
        number = self.values.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise TokenizerError(
                f"{self.source}: tokenizer.ggml.{key}_token_id is {number!r}; this vocabulary has "
                f"ids 0 to {len(self.tokens) - 1}"
            )
        return number

    def flag(self, key: str, default: bool) -> bool:
        """Returns ``tokenizer.ggml.{key}``."""
        return bool(self.values.get(f"tokenizer.ggml.{key}", default))


def build_from_gguf(source: str, values: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Raises:
        TokenizerError: no tokenizer, an unknown kind or pre-tokenizer, or a damaged vocabulary.
    """
    vocabulary = Vocabulary.read(source, values)
    kind = values.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = _build_byte_level(vocabulary)
    elif kind == "llama":
        tokenizer, adds_bos = _build_sentencepiece(vocabulary)
    else:
        raise TokenizerError(
            f"{source} has a tokenizer of kind {kind!r}; supported are 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece)"
        )
    _add_special(tokenizer, vocabulary)
    _add_template(tokenizer, vocabulary, adds_bos=adds_bos)
    return tokenizer


def _build_byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.values.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{vocabulary.source} asks for the pre-tokenizer {name!r} (tokenizer.ggml.pre); known "
            f"are {', '.join(sorted(PRE_TOKENIZERS))}: guessing would give wrong tokens"
        )
    rule = PRE_TOKENIZERS[name]
    pairs = vocabulary.values.get("tokenizer.ggml.merges")
    if not isinstance(pairs, list):
        raise TokenizerError(
            f"{vocabulary.source} has no tokenizer.ggml.merges; convert it again with its tokenizer"
        )
    # The first character may itself be a space, so the separator is looked for after it.
    merges = [(pair[:cut], pair[cut + 1 :]) for pair in pairs if (cut := pair.find(" ", 1)) > 0]
    tokenizer = _bpe(vocabulary, merges, ignore_merges=rule.ignore_merges)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if rule.digits:
        steps.append(pre.Digits(individual_digits=True))
    if rule.regex:
        steps.append(pre.Split(Regex(rule.regex), behavior="isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=rule.regex is None))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.adds_bos


def _build_sentencepiece(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    scores = vocabulary.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise TokenizerError(
            f"{vocabulary.source} has {len(vocabulary.tokens)} tokens and no score for each "
            "(tokenizer.ggml.scores); convert it again"
        )
    unknown = vocabulary.token_id("unknown")
    tokenizer = _bpe(
        vocabulary,
        list(_merges_from_scores(vocabulary.tokens, scores)),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    to_marks = normalizers.Replace(" ", SPACE_MARK)
    steps: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), to_marks])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = to_marks
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float]
) -> Iterable[tuple[str, str]]:
    """Returns the merges that make BPE choose what SentencePiece's scores would.

    Every way to split a token into two tokens is a merge; the best score comes first, then the
    longer left part, as the converters of the ``transformers`` library order them.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    found = [
        (-score, -cut, cut - len(token), ids[token[:cut]], token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    found.sort(key=lambda merge: merge[:4])
    return ((left, right) for *_, left, right in found)


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        return Tokenizer(models.BPE(vocab=ids, merges=merges, **options))
    except Exception as error:  # The library raises bare Exception for an inconsistent vocabulary.
        raise TokenizerError(
            f"{vocabulary.source} has merges that do not fit its vocabulary ({error}); "
            "convert it again"
        ) from error


def _add_special(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    # Phi-3 swallows the white space after its markers; GGUF has no place to say so.
    strips = vocabulary.values.get("general.architecture") == "phi3"
    special, plain = [], []
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if not text or kind not in (_CONTROL, _USER, _UNKNOWN):
            continue
        token = AddedToken(
            text,
            normalized=False,
            special=kind != _USER,
            rstrip=strips and text not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        (plain if kind == _USER else special).append(token)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_template(tokenizer: Tokenizer, vocabulary: Vocabulary, *, adds_bos: bool) -> None:
    template, ids = ["$A"], []
    bos, eos = vocabulary.token_id("bos"), vocabulary.token_id("eos")
    if bos is not None and vocabulary.flag("add_bos_token", adds_bos):
        template.insert(0, vocabulary.tokens[bos])
        ids.append((vocabulary.tokens[bos], bos))
    if eos is not None and vocabulary.flag("add_eos_token", False):
        template.append(vocabulary.tokens[eos])
        ids.append((vocabulary.tokens[eos], eos))
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=ids
        )
