"""The vendored contract of Triton: what was kept has the original's names, numbers and types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2 as pb

from jaxserve.third_party.triton import grpc_service_pb2, model_config_pb2

ROOT = Path(__file__).resolve().parents[2]
RECORDED = set(Path(__file__).with_name("triton_fields.txt").read_text().splitlines()[1:])
TRIMMED = ("inference.ModelConfig.", "inference.ModelInput.", "inference.ModelOutput.")


def written(module: Any) -> Iterator[str]:
    file = pb.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        yield from fields(message, f"{file.package}.")
    for enum in file.enum_type:
        for value in enum.value:
            yield f"{file.package}.{enum.name}.{value.name} = {value.number}"
    for service in file.service:
        for method in service.method:
            takes = "stream " * method.client_streaming + method.input_type.lstrip(".")
            gives = "stream " * method.server_streaming + method.output_type.lstrip(".")
            yield f"{file.package}.{service.name}.{method.name} {takes} -> {gives}"


def fields(message: pb.DescriptorProto, prefix: str) -> Iterator[str]:
    name = prefix + message.name
    for field in message.field:
        kind = field.type_name.lstrip(".") or pb.FieldDescriptorProto.Type.Name(field.type)[5:]
        repeated = "repeated " * (field.label == pb.FieldDescriptorProto.LABEL_REPEATED)
        one = ""
        if field.HasField("oneof_index"):
            one = f" oneof {message.oneof_decl[field.oneof_index].name}"
        kind = kind if field.type_name else kind.lower()
        yield f"{name}.{field.name} = {field.number} {repeated}{kind}{one}"
    for nested in message.nested_type:
        yield from fields(nested, f"{name}.")


def test_what_is_vendored_is_what_triton_has() -> None:
    ours = {*written(grpc_service_pb2), *written(model_config_pb2)}

    assert ours <= RECORDED
    left_out = {line for line in RECORDED - ours if not line.startswith(TRIMMED)}
    assert {line.split(" ")[0] for line in left_out} == {
        f"inference.GRPCInferenceService.{name}"
        for name in (
            "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
            "SystemSharedMemoryStatus", "SystemSharedMemoryRegister",
            "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus", "CudaSharedMemoryRegister",
            "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
        )
    }  # fmt: skip


@pytest.mark.parametrize("name", ["grpc_service", "model_config"])
def test_the_licence_stays_with_it(name: str) -> None:
    text = (ROOT / "proto" / "third_party" / "triton" / f"{name}.proto").read_text()
    licence = (ROOT / "jaxserve" / "third_party" / "triton" / "LICENSE").read_text()

    for words in ("NVIDIA CORPORATION", "Redistribution and use in source and binary forms"):
        assert words in text
        assert words in licence
