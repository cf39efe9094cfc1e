"""What ``inference.GRPCInferenceService`` tells of server and model."""

from __future__ import annotations

from typing import Any

from jaxserve.frontend.grpc.kserve_convert import OUTPUTS, VERSION
from jaxserve.frontend.grpc.kserve_options import LISTS, READERS
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.third_party.triton import grpc_service_pb2 as pb
from jaxserve.third_party.triton import model_config_pb2

PLATFORM = "jaxserve"
EXTENSIONS = ("model_configuration", "parameters")
"""Of Triton's extensions to the protocol, those that are spoken here."""


def server_metadata(info: ModelInfo) -> pb.ServerMetadataResponse:
    """Writes the facts of the server."""
    return pb.ServerMetadataResponse(
        name=PLATFORM, version=info.server_version, extensions=EXTENSIONS
    )


def model_metadata(info: ModelInfo) -> pb.ModelMetadataResponse:
    """Writes names, types and shapes of what goes in and out."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=info.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[
            tensor(name=name, datatype=datatype, shape=[-1 if name in LISTS else 1])
            for name, (datatype, _) in READERS.items()
        ],
        outputs=[
            tensor(name=name, datatype=datatype, shape=[-1]) for name, datatype in OUTPUTS.items()
        ],
    )


def model_config(info: ModelInfo) -> model_config_pb2.ModelConfig:
    """Writes the same as Triton's own configuration has it."""
    metadata = model_metadata(info)
    return model_config_pb2.ModelConfig(
        name=info.name,
        platform=PLATFORM,
        backend=PLATFORM,
        input=[
            model_config_pb2.ModelInput(
                name=tensor.name,
                data_type=_type(tensor.datatype),
                dims=tensor.shape,
                optional=tensor.name != "text_input",
            )
            for tensor in metadata.inputs
        ],
        output=[
            model_config_pb2.ModelOutput(
                name=tensor.name, data_type=_type(tensor.datatype), dims=tensor.shape
            )
            for tensor in metadata.outputs
        ],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=True),
    )


def _type(datatype: str) -> Any:
    name = "STRING" if datatype == "BYTES" else datatype
    return model_config_pb2.DataType.Value(f"TYPE_{name}")
