from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.weights.gguf import GgufCheckpoint
from jaxserve.weights.gguf_file import read_gguf_header
from tests.weights.gguf_writing import write_tiny_llama


def text(value: str) -> bytes:
    """A GGUF string."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(
    metadata: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = b"",
) -> bytes:
    """A GGUF file put together by hand."""
    metadata, tensors = metadata or [], tensors or []
    number = counts or (len(tensors), len(metadata))
    head = magic + struct.pack("<IQQ", version, *number) + b"".join(metadata + tensors)
    return head + bytes(-len(head) % 32) + data


def entry(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """One line of the tensor table."""
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def integer(key: str, value: int) -> bytes:
    """An unsigned 32-bit value."""
    return text(key) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, raw: bytes = b"") -> bytes:
    """An array."""
    return text(key) + struct.pack("<IIQ", 9, kind, count) + raw


DATA = bytes(128)


def test_every_value_type_is_read(tmp_path: Path) -> None:
    values = {
        "u8": (0, "<B", 200), "i8": (1, "<b", -3), "u16": (2, "<H", 60_000), "i16": (3, "<h", -9),
        "u32": (4, "<I", 4_000_000_000), "i32": (5, "<i", -7), "f32": (6, "<f", 0.5),
        "bool": (7, "<?", True), "u64": (10, "<Q", 2**63), "i64": (11, "<q", -(2**62)),
        "f64": (12, "<d", 1e300),
    }  # fmt: skip
    metadata = [
        text(key) + struct.pack("<I", kind) + struct.pack(code, value)
        for key, (kind, code, value) in values.items()
    ]
    metadata.append(text("text") + struct.pack("<I", 8) + text("größe"))
    metadata.append(array("list", 5, 3, struct.pack("<3i", 1, -2, 3)))
    metadata.append(array("words", 8, 2, text("a") + text("")))
    path = tmp_path / "m.gguf"
    path.write_bytes(header(metadata, [entry("t", (4, 2))], data=DATA))
    found = read_gguf_header(path)
    expected = {key: value for key, (_, _, value) in values.items()}
    assert found.metadata == expected | {"text": "größe", "list": [1, -2, 3], "words": ["a", ""]}
    assert found.tensors["t"].shape == (2, 4)
    assert found.tensors["t"].nbytes == 32


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"m\.gguf is empty \(0 bytes\); fetch it again"),
        (b"GG", r"the magic number needs 4 bytes at byte 0 and 2 are left"),
        (header(magic=b"PK\3\4"), r"is not a GGUF file: it starts with b'PK"),
        (header(version=1), r"has GGUF version 1; versions 2 and 3"),
        (header(version=3 << 24), r"version 50331648 \(big-endian\?\)"),
        (header(counts=(2**60, 0)), r"1152921504606846976 tensors are announced at byte 24"),
        (header(counts=(0, 2**60)), r"1152921504606846976 metadata entries are announced"),
        (header([integer("a", 1), integer("a", 2)]), r"metadata key 'a' appears twice"),
        (header([text("a") + struct.pack("<II", 13, 0)]), r"metadata 'a' has unknown type 13"),
        (header([array("a", 8, 2**40)]), r"1099511627776 strings in a are announced"),
        (header([array("a", 8, 1, struct.pack("<Q", 99))]), r"string 0 of a ends at byte 156 and"),
        (header([array("a", 8, 1, struct.pack("<Q", 1) + b"\xff")]), r"string in a is not UTF-8"),
        (header([array("a", 12, 2**40)]), r"1099511627776 values in a are announced"),
        (header([array("a", 9, 1)]), r"'a' is an array of unknown type 9"),
        (header([struct.pack("<Q", 2**50) + bytes(20)]), r"a metadata key needs \d+ bytes"),
        (header([struct.pack("<Q", 1) + b"\xff" + bytes(20)]), r"a metadata key is not UTF-8"),
        (header([integer("general.alignment", 3)]), r"general.alignment is 3; it must be a power"),
        (header(tensors=[entry(shape=())], data=DATA), r"tensor 't' has 0 axes; 1 to 4"),
        (header(tensors=[entry(shape=(1,) * 5)], data=DATA), r"tensor 't' has 5 axes"),
        (header(tensors=[entry(kind=999)], data=DATA), r"tensor 't' has unknown storage type 999"),
        (header(tensors=[entry(kind=3, shape=(31,))], data=DATA), r"Q4_1 needs rows of a positive"),
        (header(tensors=[entry(shape=(0,))], data=DATA), r"shape \[0\]; F32 needs rows"),
        (header(tensors=[entry(offset=5)], data=DATA), r"'t' starts at 5, not a multiple of 32"),
        (header(tensors=[entry(), entry()], data=DATA), r"tensor 't' appears twice"),
        (
            header(tensors=[entry(), entry("u", offset=64)], data=2 * DATA),
            r"tensors 't' \(bytes 96 to 224\) and 'u' \(from 160\) overlap",
        ),
        (
            header(tensors=[entry(shape=(2**62, 2**62))], data=DATA),
            r"tensor 't' needs bytes 96 to \d+ and the file has 224",
        ),
        (
            header(tensors=[entry()], data=DATA[:100]),
            r"tensor 't' needs bytes 64 to 192 and the file has 164; fetch it again",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_what_is_wrong(
    raw: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_gguf_header(path)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf cannot be read: No such file"):
        read_gguf_header(tmp_path / "none.gguf")


def test_every_cut_of_a_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    raw = write_tiny_llama(tmp_path / "whole.gguf")[0].read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, len(raw), 1999), len(raw) - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufCheckpoint(path)


def test_a_file_cut_after_it_was_opened_is_a_checkpoint_error(tmp_path: Path) -> None:
    path, _ = write_tiny_llama(tmp_path / "m.gguf")
    checkpoint = GgufCheckpoint(path)
    # The tensors lie in the order of the header, so the last one is cut.
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(CheckpointError, match=r"m\.gguf ends at byte \d+ but byte \d+ is needed"):
        checkpoint.read(checkpoint.names()[-1])


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """250 seeded mutations of the header: flips, and eight bytes set to extreme lengths."""
    whole, _ = write_tiny_llama(tmp_path / "whole.gguf")
    raw = whole.read_bytes()
    start = min(tensor.offset for tensor in read_gguf_header(whole).tensors.values())
    random = np.random.default_rng(7)
    path = tmp_path / "m.gguf"
    refused = 0
    for _ in range(250):
        mutated = bytearray(raw)
        at = int(random.integers(0, start - 8))
        if random.random() < 0.5:
            mutated[at] ^= 1 << int(random.integers(0, 8))
        else:
            mutated[at : at + 8] = struct.pack("<Q", int(random.choice([0, 1, 2**31, 2**63])))
        path.write_bytes(mutated)
        try:
            checkpoint = GgufCheckpoint(path)
            for name in checkpoint.names():
                checkpoint.read(name, (slice(0, 2),))
            checkpoint.close()
        except CheckpointError:
            refused += 1
    assert refused > 80
