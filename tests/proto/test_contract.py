"""The contract as it is written: released image, presence, numbering, names that others rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor

from jaxserve.engine.stats import EngineStats
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.v1 import admin_pb2, generation_pb2, model_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
BUF = Path(sys.executable).with_name("buf")
FILES = (generation_pb2, model_pb2, admin_pb2)


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if not BUF.exists():
        pytest.skip(f"{BUF} is missing; install the dev extra")
    return subprocess.run([BUF, *arguments], capture_output=True, text=True, check=False)


def copy_of_the_contract(target: Path) -> Path:
    for source in [PROTO / "buf.yaml", *PROTO.rglob("*.proto")]:
        copy = target / source.relative_to(PROTO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    return target / "jaxserve" / "v1" / "generation.proto"


def test_the_contract_is_lint_clean():
    done = buf("lint", PROTO)

    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_was_broken_since_the_release():
    done = buf("breaking", PROTO, "--against", PROTO / "released" / "v1.binpb")

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("  optional int32 top_k = 10;\n", "", 'Previously present field "10"'),
        ("optional int32 top_k = 10;", "optional int64 top_k = 10;", "changed type"),
        ("  rpc Abort(AbortRequest) returns (AbortResponse);\n", "", 'RPC "Abort"'),
    ],
)
def test_a_planted_breaking_change_is_caught(tmp_path, before, after, complaint):
    generation = copy_of_the_contract(tmp_path)
    text = generation.read_text()
    assert text.count(before) == 1
    generation.write_text(text.replace(before, after))
    done = buf("breaking", tmp_path, "--against", PROTO / "released" / "v1.binpb")

    assert done.returncode == 100
    assert complaint in done.stdout


def test_the_released_image_holds_this_package():
    released = descriptor_pb2.FileDescriptorSet.FromString(
        (PROTO / "released" / "v1.binpb").read_bytes()
    )

    assert {file.package for file in released.file} == {"jaxserve.v1"}
    names = {service.name for file in released.file for service in file.service}
    assert names == {"GenerationService", "ModelService", "AdminService"}


def test_fields_of_every_token_have_one_byte_tags():
    for name in ("GenerateResponse", "GenerateDelta", "TokenLogprob", "TopLogprob"):
        message = generation_pb2.DESCRIPTOR.message_types_by_name[name]
        assert max(field.number for field in message.fields) <= 15


def test_a_message_of_one_token_is_small():
    delta = generation_pb2.GenerateDelta(first_index=1000, token_ids=[40_000], text=" token")
    message = generation_pb2.GenerateResponse(delta=delta)

    assert message.ByteSize() <= 20


ZERO_IS_LEGAL = {
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "logprobs",
    "prompt_logprobs", "truncate_prompt_tokens",
}  # fmt: skip


def test_absence_and_zero_are_told_apart_where_they_differ():
    message = generation_pb2.GenerateRequest.DESCRIPTOR
    numbers = [
        field
        for field in message.fields
        if field.cpp_type not in (FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_STRING)
        and not field.is_repeated
        and field.cpp_type != FieldDescriptor.CPPTYPE_BOOL
    ]

    assert {field.name for field in numbers if field.has_presence} == ZERO_IS_LEGAL
    assert {field.name for field in numbers} - ZERO_IS_LEGAL == {"priority"}


def test_generate_request_has_the_names_that_others_rely_on():
    names = set(generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)

    assert names == ZERO_IS_LEGAL | {
        "request_id", "model", "text", "token_ids", "chat", "stop", "stop_token_ids",
        "include_stop", "ignore_eos", "logit_bias", "allowed_token_ids", "banned_token_ids",
        "echo", "priority", "cache_salt", "resume", "json_schema", "json_object", "regex",
        "grammar", "choices",
    }  # fmt: skip
    constraint = generation_pb2.GenerateRequest.DESCRIPTOR.oneofs_by_name["constraint"]
    kinds = ["json_schema", "json_object", "regex", "grammar", "choices"]
    assert [field.name for field in constraint.fields] == kinds
    oneof = generation_pb2.GenerateRequest.DESCRIPTOR.oneofs_by_name["prompt"]
    assert [field.name for field in oneof.fields] == ["text", "token_ids", "chat"]
    assert [f.name for f in generation_pb2.Resume.DESCRIPTOR.fields] == ["token_ids"]
    event = generation_pb2.GenerateResponse.DESCRIPTOR.oneofs_by_name["event"]
    assert [field.name for field in event.fields] == ["started", "delta", "finished"]


def test_stats_and_model_carry_what_the_server_knows_under_the_same_names():
    stats = set(model_pb2.GetStatsResponse.DESCRIPTOR.fields_by_name)
    model = set(model_pb2.Model.DESCRIPTOR.fields_by_name)

    assert stats == set(EngineStats.__dataclass_fields__) | {"model_digest"}
    assert model == set(ModelInfo.__dataclass_fields__)


def test_every_service_method_has_its_own_messages():
    for module in FILES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert method.input_type.name == f"{method.name}Request"
                assert method.output_type.name == f"{method.name}Response"
