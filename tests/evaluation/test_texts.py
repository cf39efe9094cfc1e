"""Files to windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.texts import cut, read_texts, start_tokens
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights.source import open_source

GOLDEN = Path(__file__).parents[1] / "golden"


def test_every_text_is_cut_by_itself_and_its_tail_left_out() -> None:
    tokenizer = byte_tokenizer()
    windows = cut({"one": "abcdefg", "two": "hijkl"}, tokenizer, 3)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in windows.prompts]
    assert texts == ["abc", "def", "hij"]
    assert (windows.text_bytes, windows.left_out_tokens) == (12, 3)
    assert (windows.first_scored, windows.scored_each) == (1, 2)


def test_no_more_windows_of_a_text_than_wanted() -> None:
    windows = cut({"one": "abcdefg", "two": "hij"}, byte_tokenizer(), 3, most_windows=1)
    assert len(windows.prompts) == 2
    assert windows.left_out_tokens == 4


def asset_tokenizer(path: Path) -> Tokenizer:
    source = open_source(
        str(path), assets_dir=path.parent, offline=True, random_weights=False, seed=0
    )
    files = source.tokenizer()
    assert files is not None
    tokenizer = load_tokenizer(files)
    source.close()
    return tokenizer


@pytest.mark.parametrize(("name", "start"), [("smollm2", []), ("gemma3", [2])])
def test_windows_are_those_that_the_reference_was_recorded_over(
    name: str, start: list[int], assets: Callable[[str], Path]
) -> None:
    """Gemma's start token stands in front of each, so that every token of the text is scored."""
    tokenizer = asset_tokenizer(assets(name))
    assert start_tokens(tokenizer) == start
    text = assets("gpl3").read_text()
    windows = cut({"gpl3": text}, tokenizer, 1024, most_windows=4)
    recorded = np.load(GOLDEN / f"perplexity_{name}.npz")["gpl3_tokens"]
    np.testing.assert_array_equal(windows.prompts, recorded)
    assert windows.scored_each == recorded[0, 1:].size


def test_files_are_read_by_their_paths(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("naïve", "utf-8")
    assert read_texts([path]) == {str(path): "naïve"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty; give a file with text"),
        (b" \n\t", "is empty; give a file with text"),
        (b"ab\xff", "is not UTF-8 at byte 2; convert it"),
    ],
)
def test_a_file_without_text_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_texts([path])
    assert str(caught.value).startswith(f"--text {path} {message}")


def test_a_directory_is_no_text_and_no_file_counts_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_texts([tmp_path])
    (tmp_path / "text").write_text("a")
    with pytest.raises(ConfigError, match="text is given twice; give it once"):
        read_texts([tmp_path / "text", tmp_path / "text"])


def test_a_text_that_is_too_short_says_how_many_tokens_are_needed() -> None:
    with pytest.raises(ConfigError) as caught:
        cut({"one": "a" * 2000, "two": "abc"}, byte_tokenizer(), 1024)
    assert str(caught.value) == (
        "two has 3 tokens and a window needs 1,024; give a longer text, or a smaller --window"
    )
