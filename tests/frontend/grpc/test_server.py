"""The server as operators meet it: port, health, reflection, drain, stop, facts and counters."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from jaxserve.errors import ConfigError, LaunchError
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import admin_pb2, model_pb2
from jaxserve.v1 import generation_pb2 as pb

Code = grpc.StatusCode
Serving = health_pb2.HealthCheckResponse.ServingStatus


def info_of(error) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(info)
    return info


def watch_health(channel, service: str):
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service))


# -- port ------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_with_the_remedy(engine, serving):
    address = serving.start(engine)
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(
        LaunchError, match=rf"cannot listen on 127.0.0.1:{port} \(Address already"
    ) as e:
        serving.start(engine, port=port)

    assert "choose another with --port" in str(e.value)


def test_an_address_of_another_machine_is_refused(engine, serving):
    with pytest.raises(LaunchError, match=r"cannot listen on 192.0.2.1:0 \(Cannot assign"):
        serving.start(engine, host="192.0.2.1")


def test_a_port_is_free_again_after_stop(engine, serving):
    address = serving.start(engine)
    serving.servers.pop().stop(grace_s=0.0)
    engine.draining = False

    assert serving.start(engine, port=int(address.rsplit(":", 1)[1])) == address


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"port": 65_536}, "port must be 0 to 65535, got 65536"),
        ({"host": ""}, "host is empty"),
        ({"max_message_bytes": 0}, "max_message_bytes must be above 0 and below 2 GiB, got 0"),
        ({"max_message_bytes": 10**11}, "below 2 GiB, got 100000000000"),
        ({"stall_timeout_s": -1.0}, r"stall_timeout_s must be above 0 and at most 2e\+06, got -1"),
        ({"keepalive_time_s": float("inf")}, "keepalive_time_s must be above 0 and .*, got inf"),
        ({"grace_s": -1.0}, "grace_s must be at least 0 and .*, got -1"),
        ({"grace_s": float("nan")}, "grace_s must be at least 0 and .*, got nan"),
        ({"port": -1, "grace_s": -1.0}, "port must be 0 to 65535, got -1; grace_s must be"),
    ],
)
def test_a_config_that_cannot_work_says_all_that_is_wrong(fields, text):
    with pytest.raises(ConfigError, match=text):
        ServerConfig(**fields)


def test_the_documented_limits_are_what_grpc_gets():
    options = dict(ServerConfig().channel_options())

    assert options["grpc.so_reuseport"] == 0
    assert options["grpc.max_receive_message_length"] == 4 * 1024 * 1024
    assert options["grpc.keepalive_time_ms"] == 20_000
    assert options["grpc.keepalive_timeout_ms"] == 10_000
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 10_000
    assert options["grpc.max_connection_age_ms"] == 1_800_000
    assert options["grpc.max_connection_age_grace_ms"] == 3_600_000


@pytest.mark.parametrize(
    ("host", "address", "local"),
    [
        ("127.0.0.1", "127.0.0.1:7", True),
        ("localhost", "localhost:7", True),
        ("::1", "[::1]:7", True),
        ("[::1]", "[::1]:7", True),
        ("::", "[::]:7", False),
        ("0.0.0.0", "0.0.0.0:7", False),
        ("example.org", "example.org:7", False),
    ],
)
def test_hosts_are_written_as_grpc_takes_them(host, address, local):
    config = ServerConfig(host=host, port=7)
    assert (config.address, config.is_local) == (address, local)


def test_an_ipv6_address_can_be_listened_on(engine, serving):
    address = serving.start(engine, host="::1")
    assert address.startswith("[::1]:")
    assert serving.stubs(address).model.GetModel(model_pb2.GetModelRequest()).model.name


# -- health and reflection -------------------------------------------------------------------------


FOREIGN = ["vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService"]


@pytest.mark.parametrize("service", ["", "jaxserve.v1.GenerationService", *FOREIGN])
def test_health_follows_the_engine_there_and_back(engine, stubs, service):
    changes = watch_health(stubs.channel, service)
    assert next(changes).status == Serving.SERVING
    engine.report.serving, engine.report.detail = False, "no step finished for 60 s"
    assert next(changes).status == Serving.NOT_SERVING
    detail = stubs.admin.GetHealthDetail(admin_pb2.GetHealthDetailRequest())
    assert (detail.serving, detail.detail) == (False, "no step finished for 60 s")
    engine.report.serving = True
    assert next(changes).status == Serving.SERVING


def test_health_does_not_know_other_names(stubs):
    health: Any = health_pb2_grpc.HealthStub(stubs.channel)
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"))

    assert caught.value.code() is Code.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_services_and_describes_them(stubs, version):
    call = stubs.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed, described = call(
        iter(
            [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(
                    file_containing_symbol="jaxserve.v1.GenerationService"
                ),
            ]
        )
    )
    names = {service.name for service in listed.list_services_response.service}

    assert names >= {
        "jaxserve.v1.GenerationService",
        "jaxserve.v1.ModelService",
        "jaxserve.v1.AdminService",
        "grpc.health.v1.Health",
        *FOREIGN,
    }
    (file,) = described.file_descriptor_response.file_descriptor_proto
    assert b"GenerateRequest" in file


def test_other_machines_are_offered_neither_reflection_nor_administration(engine, serving):
    address = serving.start(engine, host="0.0.0.0").replace("0.0.0.0", "127.0.0.1")
    stubs = serving.stubs(address)
    with pytest.raises(grpc.RpcError) as caught:
        stubs.admin.Drain(admin_pb2.DrainRequest())
    assert caught.value.code() is Code.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as caught:
        test_reflection_lists_services_and_describes_them(stubs, "v1")
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert not engine.draining


# -- facts and counters ----------------------------------------------------------------------------


def test_the_models_facts_are_told(stubs):
    one = stubs.model.GetModel(model_pb2.GetModelRequest()).model
    (listed,) = stubs.model.ListModels(model_pb2.ListModelsRequest()).models

    assert one == listed
    assert (one.name, one.model_digest, one.context_tokens) == ("scripted", "d1", 64)
    assert list(one.eos_token_ids) == [2, 0]


def test_every_counter_of_the_engine_is_told(stubs):
    stats = stubs.model.GetStats(model_pb2.GetStatsRequest(model="scripted"))

    assert stats.pages_total == stats.pages_free + stats.pages_used + stats.pages_cached == 7
    assert dict(stats.requests_finished_total) == {"stop": 3}
    assert dict(stats.phase_seconds_total) == {"plan": 0.5}
    assert stats.model_digest == "d1"
    assert [(shard.rows_running, shard.pages_used) for shard in stats.data_shards] == [
        (1, 2),
        (0, 0),
    ]


def test_counters_can_be_watched(engine, stubs):
    watch = stubs.model.WatchStats(model_pb2.WatchStatsRequest(interval_seconds=0.05))
    assert next(watch).stats.rows_running == 0
    call = stubs.generation.Generate(pb.GenerateRequest(text="x"))
    engine.wait_request()

    assert any(response.stats.rows_running == 1 for response in watch)
    call.cancel()


@pytest.mark.parametrize("interval", [0.0, -1.0, 3601.0, float("nan")])
def test_an_interval_out_of_range_is_refused(stubs, interval):
    with pytest.raises(grpc.RpcError) as caught:
        next(stubs.model.WatchStats(model_pb2.WatchStatsRequest(interval_seconds=interval)))

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "interval_seconds must be 0.05 to 3600, got" in str(caught.value.details())


def test_an_unknown_models_facts_are_not_found(stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.model.GetModel(model_pb2.GetModelRequest(model="other"))

    assert caught.value.code() is Code.NOT_FOUND


def test_a_model_needs_a_name():
    with pytest.raises(ValueError, match=r"ModelInfo\.name is empty"):
        ModelInfo(name="", model_digest="d")


# -- drain and stop --------------------------------------------------------------------------------


def test_drain_refuses_new_requests_and_lets_running_ones_finish(engine, stubs):
    changes = watch_health(stubs.channel, "")
    assert next(changes).status == Serving.SERVING
    call = stubs.generation.Generate(pb.GenerateRequest(text="x", request_id="r"))
    engine.wait_request()
    progress = stubs.admin.Drain(admin_pb2.DrainRequest())
    assert next(changes).status == Serving.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(stubs.generation.Generate(pb.GenerateRequest(text="x")))
    engine.start("r")
    engine.finish("r")

    assert (progress.idle, progress.rows_running) == (False, 1)
    assert caught.value.code() is Code.UNAVAILABLE
    assert info_of(caught.value).reason == "DRAINING"
    assert len(list(call)) == 2
    assert stubs.admin.Drain(admin_pb2.DrainRequest(wait_seconds=5.0)).idle


@pytest.mark.parametrize(
    ("ends_after_s", "wait_s", "is_idle"), [(0.3, 10.0, True), (60.0, 0.2, False)]
)
def test_drain_waits_for_the_engine_and_not_for_calls_alone(
    engine, stubs, monkeypatch, ends_after_s, wait_s, is_idle
):
    """A request that was given up has no call any more, and lives until the next step."""
    began_s = time.monotonic()
    idle = property(lambda engine: time.monotonic() - began_s > ends_after_s)
    monkeypatch.setattr(type(engine), "idle", idle)
    progress = stubs.admin.Drain(admin_pb2.DrainRequest(wait_seconds=wait_s))
    assert progress.idle is is_idle
    assert time.monotonic() - began_s >= min(ends_after_s, wait_s)


def test_drain_refuses_a_wait_out_of_range(stubs):
    with pytest.raises(grpc.RpcError) as caught:
        stubs.admin.Drain(admin_pb2.DrainRequest(wait_seconds=-1.0))

    assert "wait_seconds must be 0 to 86400, got -1" in str(caught.value.details())


def test_stop_lets_running_requests_finish(engine, serving):
    stubs = serving.stubs(serving.start(engine))
    call = stubs.generation.Generate(pb.GenerateRequest(text="x", request_id="r"))
    engine.wait_request()
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(serving.servers.pop().stop, 20.0)
        engine.wait_draining()
        engine.start("r")
        engine.give("r", "ok")
        engine.finish("r", tokens=2)
        events = list(call)
        stopped.result()

    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished"]


def test_stop_ends_what_is_left_after_the_grace_period_as_resumable(engine, serving):
    stubs = serving.stubs(serving.start(engine))
    stream = stubs.generation.Generate(pb.GenerateRequest(text="x", request_id="stream"))
    engine.wait_request()
    watch = stubs.model.WatchStats(model_pb2.WatchStatsRequest())
    next(watch)
    queued = stubs.generation.GenerateUnary.future(
        pb.GenerateUnaryRequest(request=pb.GenerateRequest(text="x", request_id="unary"))
    )
    engine.wait_request(1)
    engine.start("stream")
    next(stream)
    serving.servers.pop().stop(grace_s=0.05)

    for call in (stream, watch):
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is Code.UNAVAILABLE
        assert info_of(caught.value).metadata["resumable"] == "true"
    with pytest.raises(grpc.RpcError) as caught:
        queued.result()
    assert caught.value.code() is Code.UNAVAILABLE
    assert sorted(engine.closed) == ["stream", "unary"]


def test_stopping_twice_and_leaving_no_thread(engine, serving):
    before = set(threading.enumerate())  # Other tests' doubles may have left some.
    serving.start(engine)
    server = serving.servers.pop()
    server.stop(0.0)
    server.stop(0.0)

    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("jaxserve-")]


def test_the_server_thread_is_a_context_manager(engine, serving):
    serving.start(engine)
    text, info, *_ = serving.servers[0]._parts
    engine.draining = False
    with type(serving.servers[0])(text, info, ServerConfig(port=0)) as address:
        stubs = serving.stubs(address)
        assert stubs.model.GetModel(model_pb2.GetModelRequest()).model.name == "scripted"
        engine.draining = False


def test_the_plain_event_loop_serves_where_uvloop_is_missing(engine, serving, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    stubs = serving.stubs(serving.start(engine))
    call = stubs.generation.Generate(pb.GenerateRequest(text="x", request_id="r"))
    engine.wait_request()
    engine.start("r")
    engine.finish("r")

    assert len(list(call)) == 2
    assert isinstance(serving.servers[0]._loop, asyncio.SelectorEventLoop)
