from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from jaxserve.errors import TokenizerError
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.tokenizer_source import TokenizerSource
from jaxserve.weights.gguf import gguf_tokenizer
from jaxserve.weights.gguf_file import read_gguf_header
from tests.weights.gguf_writing import BYTE_VOCABULARY

VECTORS = {
    "gpt-2": 46, "starcoder": 46, "refact": 46, "command-r": 46, "qwen2": 46, "llama-bpe": 46,
    "llama-spm": 46, "phi-3": 46, "qwen35": 50,
}  # fmt: skip
SEPARATOR = "\n__ggml_vocab_test__\n"
SAMPLES = [
    "The quick brown fox.",
    "  leading, trailing \n\n\n\ttabs \t x   y  ",
    "def f(x):\n    return x + 2.8  # 12345 ½ \uff11\uff12\r\n",
    "日本語テキスト 😀🏳️‍🌈 été مرحبا",
    "I'll we'RE it's don\u2019t CamelCaseXMLHttp /path/to//file",
    "a" * 300,
]


def from_gguf(path: Path) -> Tokenizer:
    return load_tokenizer(gguf_tokenizer(read_gguf_header(path)))


@pytest.fixture(scope="module")
def smollm2(assets: Callable[[str], Path]) -> Tokenizer:
    return from_gguf(assets("smollm2"))


@pytest.mark.parametrize("name", VECTORS)
def test_llama_cpp_vectors_are_reproduced(name: str, assets: Callable[[str], Path]) -> None:
    path = assets("llama-cpp-vocabs") / f"ggml-vocab-{name}.gguf"
    tokenizer = from_gguf(path)
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().split("\n")
    cases = list(zip(texts, lines, strict=True))[: VECTORS[name]]
    assert len(cases) == VECTORS[name] >= len(texts) - 1
    for text, line in cases:
        expected = [int(number) for number in line.split()]
        assert tokenizer.encode(text, add_special_tokens=False) == expected, repr(text)


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("qwen2_5", "qwen2"),
        ("qwen3", "qwen2"),
        ("llama3_1", "llama-bpe"),
        ("mistral_nemo", "tekken"),
    ],
)
@pytest.mark.slow
def test_a_rebuilt_tokenizer_equals_the_published_one(
    name: str, pre: str, assets: Callable[[str], Path]
) -> None:
    """The published vocabulary and merges, as GGUF would carry them, against its own JSON."""
    path = assets("tokenizers") / name / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    ids = dict(document["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    added = {token["content"]: 3 if token["special"] else 4 for token in document["added_tokens"]}
    merges = document["model"]["merges"]
    rebuilt = load_tokenizer(
        TokenizerSource(
            source=name,
            gguf={
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": pre,
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [added.get(token, 1) for token in tokens],
                "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
            },
        )
    )
    published = FastTokenizer.from_file(str(path))
    texts = [*SAMPLES, *(template_texts(assets)), "e\u0301 a\u030a", "".join(list(added)[:5])]
    for text in texts:
        expected = published.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text, add_special_tokens=False) == expected, repr(text[:80])


@pytest.mark.slow
def test_gemma3_out_of_gguf_equals_its_published_tokenizer(assets: Callable[[str], Path]) -> None:
    rebuilt = from_gguf(assets("gemma3"))
    assert rebuilt.bos_id == 2
    assert rebuilt.eos_ids == {1, 106}
    published = FastTokenizer.from_file(str(assets("tokenizers") / "gemma3" / "tokenizer.json"))
    for text in [*SAMPLES, *template_texts(assets), "<table>\n<td>x</td> <start_of_turn>user"]:
        expected = published.encode(text).ids
        found = rebuilt.encode(text, add_special_tokens=True)
        assert found == expected, repr(text[:80])
        assert rebuilt.decode(found, skip_special_tokens=True) == published.decode(expected)


def template_texts(assets: Callable[[str], Path]) -> list[str]:
    """Twenty chat templates: code-like text with many special tokens in it."""
    paths = sorted((assets("llama-cpp-vocabs") / "templates").glob("*.jinja"))[:20]
    return [path.read_text("utf-8") for path in paths]


def test_smollm2_cuts_every_digit(smollm2: Tokenizer) -> None:
    """The case that a rebuild without the pre-tokenizer's digit rule gets wrong."""
    digits = smollm2.encode("12345", add_special_tokens=False)
    assert [smollm2.token_text(token) for token in digits] == list("12345")
    for text, pieces in [
        ("\n    2.8", ["\n    ", "2", ".", "8"]),
        ("a½", ["a", "½"]),
    ]:
        ids = smollm2.encode(text, add_special_tokens=False)
        assert [smollm2.token_text(token) for token in ids] == pieces


def test_smollm2_knows_its_control_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49_152
    assert smollm2.bos_id == 1
    assert smollm2.eos_ids == {0, 2}
    assert smollm2.special_ids == set(range(17))
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"


@lru_cache
def missing_bytes(tokenizer: Tokenizer) -> set[int]:
    """Bytes that no token of a vocabulary stands for."""
    tokens = range(tokenizer.vocab_size)
    return set(range(256)) - {raw[0] for t in tokens if len(raw := tokenizer.token_bytes(t)) == 1}


def test_smollm2_has_no_token_for_some_bytes_and_loses_them(smollm2: Tokenizer) -> None:
    """As llama.cpp does: most are control characters and bytes that UTF-8 never has."""
    missing = missing_bytes(smollm2)
    assert len(missing) == 21
    assert 0x16 in missing
    assert not missing & set(range(0x20, 0x7F))
    ids = smollm2.encode("a\x16b", add_special_tokens=False)
    assert smollm2.decode(ids, skip_special_tokens=False) == "ab"


@given(text=st.text())
def test_the_bytes_of_tokens_add_up_to_the_text(smollm2: Tokenizer, text: str) -> None:
    assume(not missing_bytes(smollm2) & set(text.encode()))
    ids = smollm2.encode(text, add_special_tokens=False)
    assert b"".join(map(smollm2.token_bytes, ids)).decode() == text
    assert smollm2.decode(ids, skip_special_tokens=False) == text


@given(ids=st.lists(st.integers(0, 49_151) | st.integers(0, 300)), skip=st.booleans())
def test_any_ids_decode_as_the_library_decodes_them(
    smollm2: Tokenizer, ids: list[int], skip: bool
) -> None:
    expected = smollm2.fast.decode(ids, skip_special_tokens=skip)
    assert smollm2.decode(ids, skip_special_tokens=skip) == expected


@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_byte_fallback_text_decodes_as_the_library_decodes_it(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text, add_special_tokens=True)
    for skip in (True, False):
        expected = spm.fast.decode(ids, skip_special_tokens=skip)
        assert spm.decode(ids, skip_special_tokens=skip) == expected


@pytest.fixture(scope="module")
def spm(assets: Callable[[str], Path]) -> Tokenizer:
    return from_gguf(assets("llama-cpp-vocabs") / "ggml-vocab-llama-spm.gguf")


def test_sentencepiece_adds_its_start_token(spm: Tokenizer) -> None:
    assert spm.encode("hi", add_special_tokens=True)[0] == spm.bos_id == 1
    assert spm.eos_ids == {2}
    assert spm.token_bytes(spm.encode("\x01", add_special_tokens=False)[-1]) == b"\x01"


def test_phi3_swallows_white_space_behind_its_markers(assets: Callable[[str], Path]) -> None:
    phi3 = from_gguf(assets("llama-cpp-vocabs") / "ggml-vocab-phi-3.gguf")
    ids = phi3.encode("<|user|>\n\nHi<|end|>", add_special_tokens=False)
    assert [phi3.token_text(token) for token in ids] == ["<|user|>", " Hi", "<|end|>"]
    assert phi3.eos_ids >= {32_007, 32_000}


def test_ids_outside_the_vocabulary_stand_for_nothing(smollm2: Tokenizer) -> None:
    assert smollm2.token_bytes(10**6) == smollm2.token_bytes(-1) == b""


def test_the_digest_sees_vocabulary_and_template(smollm2: Tokenizer) -> None:
    def digest(**changes: Any) -> str:
        return load_tokenizer(TokenizerSource(source="x", gguf=BYTE_VOCABULARY | changes)).digest

    digests = {
        smollm2.digest,
        digest(),
        digest(**{"tokenizer.chat_template": "x"}),
        digest(**{"tokenizer.ggml.pre": "gpt-2"}),
        digest(**{"tokenizer.ggml.bos_token_id": 1}),
    }
    assert len(digests) == 5
    assert digest() == digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, r"x has no tokenizer \(no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": []}, r"x has no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "a"] + ["b"] * 13}, r"has the same token twice"),
        ({"tokenizer.ggml.token_type": [1]}, r"has 15 tokens and another number of token types"),
        ({"tokenizer.ggml.model": "bert"}, r"kind 'bert'; supported are 'gpt2' \(byte-level BPE\)"),
        ({"tokenizer.ggml.pre": "odd"}, r"pre-tokenizer 'odd' .* known are codeshell, command-r"),
        ({"tokenizer.ggml.pre": None}, r"pre-tokenizer None"),
        ({"tokenizer.ggml.merges": None}, r"has no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a z"]}, r"merges that do not fit its vocabulary"),
        (
            {"tokenizer.ggml.eos_token_id": 15},
            r"eos_token_id is 15; this vocabulary has ids 0 to 14",
        ),
        ({"tokenizer.ggml.model": "llama"}, r"has 15 tokens and no score for each"),
    ],
    ids=str,
)
def test_gguf_metadata_without_a_usable_tokenizer_is_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(TokenizerSource(source="x", gguf=BYTE_VOCABULARY | changes))


def files(**texts: str | dict[str, Any] | None) -> TokenizerSource:
    """A Hugging Face directory's files with a tiny tokenizer; underscores stand for dots."""
    fast = load_tokenizer(TokenizerSource(source="x", gguf=BYTE_VOCABULARY)).fast
    contents: dict[str, Any] = {"tokenizer_json": fast.to_str()} | texts
    return TokenizerSource(
        source="dir",
        files={
            ".".join(name.rsplit("_", 1)): (
                text if isinstance(text, str) else json.dumps(text)
            ).encode()
            for name, text in contents.items()
            if text is not None
        },
    )


def test_end_tokens_come_from_every_file_that_names_some() -> None:
    tokenizer = load_tokenizer(
        files(
            generation_config_json={"eos_token_id": [3, 4]},
            config_json={"eos_token_id": 5},
            tokenizer_config_json={"eos_token": {"content": "a"}, "bos_token": "b"},
        )
    )
    # <|end|> is id 0 and ends an answer wherever it is a control token.
    assert tokenizer.eos_ids == {0, 1, 3, 4, 5}
    assert tokenizer.bos_id == 2
    assert tokenizer.special_texts == {"eos_token": "a", "bos_token": "b"}


def test_a_tokenizer_alone_is_enough() -> None:
    tokenizer = load_tokenizer(files())
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, {0}, None)
    assert tokenizer.encode("ab", add_special_tokens=True) == [11]


def test_padding_and_truncation_in_the_file_are_switched_off() -> None:
    fast = load_tokenizer(files()).fast
    fast.enable_truncation(2)
    fast.enable_padding(length=8)
    tokenizer = load_tokenizer(files(tokenizer_json=fast.to_str()))
    assert tokenizer.encode("abcdj", add_special_tokens=False) == [11, 12, 10]


@pytest.mark.parametrize(
    ("texts", "template"),
    [
        ({"chat_template_jinja": "J", "tokenizer_config_json": {"chat_template": "C"}}, "J"),
        ({"chat_template_json": {"chat_template": "F"}}, "F"),
        ({"tokenizer_config_json": {"chat_template": "C"}}, "C"),
        (
            {
                "tokenizer_config_json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "T"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            "D",
        ),
        ({"tokenizer_config_json": {"chat_template": [{"name": "rag", "template": "R"}]}}, None),
    ],
    ids=str,
)
def test_chat_templates_are_found_where_models_keep_them(
    texts: dict[str, Any], template: str | None
) -> None:
    assert load_tokenizer(files(**texts)).chat_template == template


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"tokenizer_json": None},
            r"dir has no tokenizer.json \(found: no tokenizer file at all\)",
        ),
        ({"tokenizer_json": None, "config_json": {}}, r"no tokenizer.json \(found: config.json\)"),
        ({"tokenizer_json": "{"}, r"dir/tokenizer.json cannot be read"),
        ({"config_json": "{"}, r"dir/config.json is not JSON"),
        ({"config_json": "[]"}, r"dir/config.json must hold a JSON object"),
    ],
    ids=str,
)
def test_files_that_make_no_tokenizer_are_named(texts: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(files(**texts))


def test_a_template_that_is_not_utf8_is_named() -> None:
    source = files()
    broken = TokenizerSource(source="dir", files={**source.files, "chat_template.jinja": b"\xff"})
    with pytest.raises(TokenizerError, match=r"dir/chat_template.jinja is not UTF-8"):
        load_tokenizer(broken)


def test_a_tokenizer_that_cannot_stream_is_refused() -> None:
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    with pytest.raises(
        TokenizerError, match=r"decodes with \['WordPiece'\]; supported are ByteLev"
    ):
        load_tokenizer(files(tokenizer_json=fast.to_str()))


def test_metaspace_drops_the_space_in_front() -> None:
    fast = FastTokenizer(models.BPE({"▁a": 0, "b": 1}, []))
    fast.decoder = decoders.Metaspace()
    tokenizer = load_tokenizer(files(tokenizer_json=fast.to_str()))
    assert tokenizer.decode([0, 1, 0], skip_special_tokens=False) == "ab a"
    assert fast.decode([0, 1, 0]) == "ab a"
