"""The tensors of Open Inference Protocol v2 as plain Python values, and back.

A tensor comes as raw little-endian bytes beside its description, as Triton's clients send it, or
as a typed list inside, as other clients of the protocol do. Answers are raw, as Triton's are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError
from jaxserve.third_party.triton import grpc_service_pb2 as pb

Value = bool | int | float | bytes

_TYPES = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("b", "int_contents"),
    "INT16": ("h", "int_contents"),
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT8": ("B", "uint_contents"),
    "UINT16": ("H", "uint_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
    "FP16": ("e", ""),
    "FP32": ("f", "fp32_contents"),
    "FP64": ("d", "fp64_contents"),
    "BYTES": ("", "bytes_contents"),
}
"""How ``struct`` calls a type, and the list of ``InferTensorContents`` that it stands in."""


def read_inputs(request: pb.ModelInferRequest) -> dict[str, list[Value]]:
    """Returns the elements of every input by name, flat.

    Raises:
        InvalidRequestError: an input is there twice, or is not what it says of itself.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequestError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; send one "
            "for each, or none",
            field="raw_input_contents",
        )
    values: dict[str, list[Value]] = {}
    for number, tensor in enumerate(request.inputs):
        if tensor.name in values:
            raise _refuse(tensor, "is there twice; send it once")
        if "shared_memory_region" in tensor.parameters:
            raise _refuse(tensor, "lies in shared memory, which is not supported; send its bytes")
        values[tensor.name] = _read(tensor, raw[number] if raw else None)
    return values


def _read(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[Value]:
    if tensor.datatype not in _TYPES:
        raise _refuse(tensor, f"has type {tensor.datatype!r}; known are {', '.join(_TYPES)}")
    code, name = _TYPES[tensor.datatype]
    if raw is None:
        values = list(getattr(tensor.contents, name)) if name else []
    else:
        values = _unpack_numbers(tensor, code, raw) if code else _unpack_bytes(tensor, raw)
    if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) != len(values):
        raise _refuse(
            tensor, f"has {len(values)} elements and the shape {list(tensor.shape)}; make them fit"
        )
    return values


def _unpack_numbers(
    tensor: pb.ModelInferRequest.InferInputTensor, code: str, raw: bytes
) -> list[Value]:
    size = struct.calcsize(f"<{code}")
    if len(raw) % size:
        raise _refuse(tensor, f"has {len(raw)} bytes, which is no multiple of {size}")
    return list(struct.unpack(f"<{len(raw) // size}{code}", raw))


def _unpack_bytes(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes) -> list[Value]:
    values: list[Value] = []
    place = 0
    while place < len(raw):
        start = place + 4
        end = start + int.from_bytes(raw[place:start], "little")
        if end > len(raw) or start > len(raw):
            raise _refuse(tensor, "ends within an element; send each with its length before it")
        values.append(raw[start:end])
        place = end
    return values


def _refuse(tensor: pb.ModelInferRequest.InferInputTensor, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"input {tensor.name!r} {problem}", field=tensor.name)


def add_output(
    response: pb.ModelInferResponse, name: str, datatype: str, values: Sequence[Value]
) -> None:
    """Appends a one-dimensional tensor to an answer."""
    response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    code, _ = _TYPES[datatype]
    if code:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{code}", *values))
        return
    texts = [value for value in values if isinstance(value, bytes)]
    response.raw_output_contents.append(
        b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    )
