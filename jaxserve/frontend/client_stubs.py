"""The connection of a client: channel settings, and the three services on one channel."""

from __future__ import annotations

from typing import Any

from jaxserve.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
CHANNEL_OPTIONS = [
    # A score with many alternatives is larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # Not below the server's least ping interval, which would have the client sent away.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class Stubs:
    """The three services on one channel, blocking or not as the channel is."""

    def __init__(self, channel: Any) -> None:
        """Typed loosely: the generated classes describe both kinds of channel at once."""
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.model: Any = model_pb2_grpc.ModelServiceStub(channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(channel)
