from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.weights.reading import ByteFile
from jaxserve.weights.safetensors import SafetensorsCheckpoint
from tests.weights.reexport import INDEX_FILE, write_checkpoint

TENSORS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.arange(40, dtype=np.float16).reshape(8, 5),
    "c": np.arange(6).astype(ml_dtypes.bfloat16),
}
CONFIG = {"model_type": "llama", "auto_map": {"AutoModel": "evil.py"}}


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_what_the_safetensors_library_wrote_is_read_back(shards: int, tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path, CONFIG, TENSORS, shards=shards))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    assert checkpoint.config["model_type"] == "llama"
    for name, values in TENSORS.items():
        assert checkpoint.shape(name) == values.shape
        assert checkpoint.dtype(name) == values.dtype
        np.testing.assert_array_equal(checkpoint.read(name), values)
    checkpoint.close()
    checkpoint.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_box_is_that_box_of_the_whole(tmp_path: Path, data: st.DataObject) -> None:
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path, CONFIG, TENSORS))
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    shape = TENSORS[name].shape
    parts = [data.draw(st.slices(length)) for length in shape[: data.draw(st.integers(0, 3))]]
    index = tuple(slice(part.start, part.stop) for part in parts)
    np.testing.assert_array_equal(checkpoint.read(name, index), TENSORS[name][index])
    checkpoint.close()


def test_a_slice_reads_only_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path, CONFIG, TENSORS))
    counts: list[int] = []
    original = ByteFile.read_into

    def counted(self: ByteFile, target: memoryview, offset: int) -> None:
        counts.append(len(target))
        original(self, target, offset)

    monkeypatch.setattr(ByteFile, "read_into", counted)
    checkpoint.read("b", (slice(2, 4),))
    assert counts == [2 * 5 * 2]  # Two whole rows are one piece.
    counts.clear()
    checkpoint.read("b", (slice(2, 4), slice(1, 3)))
    assert counts == [2 * 2, 2 * 2]  # Columns are a piece a row.


def test_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, {"a": TENSORS["a"]})
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    assert sorted(SafetensorsCheckpoint(tmp_path).names()) == ["a", "b"]


def test_the_digest_sees_weights_config_and_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, TENSORS)
    digests = {SafetensorsCheckpoint(tmp_path).digest()}
    (tmp_path / "tokenizer.json").write_text("{}")
    digests.add(SafetensorsCheckpoint(tmp_path).digest())
    (tmp_path / "config.json").write_text("{}")
    digests.add(SafetensorsCheckpoint(tmp_path).digest())
    save_file(TENSORS | {"c": TENSORS["c"] + TENSORS["c"]}, tmp_path / "model.safetensors")
    digests.add(SafetensorsCheckpoint(tmp_path).digest())
    assert len(digests) == 4
    (tmp_path / "README.md").write_text("words")
    assert SafetensorsCheckpoint(tmp_path).digest() in digests


def write_raw(directory: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file put together by hand."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = struct.pack("<Q", len(raw) if length is None else length)
    (directory / "model.safetensors").write_bytes(head + raw + data)
    return directory


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", None, r"is corrupt: 0 bytes that are not JSON"),
        (b"[]", b"", None, r"a JSON object is expected"),
        (b"{}", b"", 2**40, r"its header claims 1099511627776 bytes; the file has 10"),
        (b"[" * 100_000, b"", None, r"100000 bytes that are not JSON"),
        ({"t": {"dtype": "F32"}}, b"", None, r"the entry of 't' must have dtype, shape and"),
        ({"t": entry(shape=(-2,))}, bytes(8), None, r"the entry of 't' must have dtype, shape"),
        ({"t": entry(offsets=(0, True))}, bytes(8), None, r"the entry of 't' must have dtype"),
        ({"t": entry("Q9")}, bytes(8), None, r"stores 't' as Q9; supported are F32, F16, BF16"),
        ({"t": entry(shape=(3,))}, bytes(8), None, r"type F32 needs 12 bytes and has 8"),
        ({"t": entry()}, bytes(7), None, r"'t' ends at data byte 8 and the file has 7"),
        (
            {"t": entry(), "u": entry(offsets=(4, 12))},
            bytes(12),
            None,
            r"tensors 't' and 'u' overlap at byte 4",
        ),
    ],
    ids=str,
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    header: Any, data: bytes, length: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsCheckpoint(write_raw(tmp_path, header, data, length))
    assert "model.safetensors" in str(caught.value)


def test_a_file_too_short_for_its_length_field(tmp_path: Path) -> None:
    write_raw(tmp_path, b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0\0")
    with pytest.raises(CheckpointError, match=r"has 2 bytes and a safetensors file has at least 8"):
        SafetensorsCheckpoint(tmp_path)


def test_a_dtype_that_models_do_not_have_is_named_when_it_is_read(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_raw(tmp_path, {"t": entry("I64", (1,))}, bytes(8)))
    with pytest.raises(UnsupportedModelError, match=r"stores 't' as I64; supported are F32"):
        checkpoint.read("t")


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path, CONFIG, TENSORS))
    with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head.weight'; the checkpoint is"):
        checkpoint.shape("lm_head.weight")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config.json; fetch the whole checkpoint"):
        SafetensorsCheckpoint(tmp_path)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: Is a directory"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, r"has no usable weight_map"),
        ({"weight_map": {"a": 3}}, r"has no usable weight_map"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"names the file '../x.safetensors'; only"),
        ({"weight_map": {"a": "none.safetensors"}}, r"names none.safetensors, which is missing"),
        ({"weight_map": {"z": "model.safetensors"}}, r"holds 'z' and it does not"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_is_named(
    index: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, CONFIG, TENSORS)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"both hold 'a'; remove the one"):
        SafetensorsCheckpoint(tmp_path)


def test_every_cut_of_a_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    raw = (write_checkpoint(tmp_path, CONFIG, TENSORS) / "model.safetensors").read_bytes()
    for size in range(0, len(raw), 5):
        (tmp_path / "model.safetensors").write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            SafetensorsCheckpoint(tmp_path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    raw = (write_checkpoint(tmp_path, CONFIG, TENSORS) / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    random = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        mutated = bytearray(raw)
        at = int(random.integers(0, 8 + header_bytes))
        mutated[at] = int(random.integers(0, 256))
        (tmp_path / "model.safetensors").write_bytes(mutated)
        try:
            checkpoint = SafetensorsCheckpoint(tmp_path)
            for name in checkpoint.names():
                checkpoint.read(name)
            checkpoint.close()
        except CheckpointError:
            refused += 1
    assert refused > 100
