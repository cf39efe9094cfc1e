"""The benchmarks' command lines over doubles: lines have exactly the keys that are promised."""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import asking, common, compare, frontend, host, machine, offline, serving, workloads
from bench.common import KEYS, Run
from bench.workloads import PRESETS, WARM_UP, Load, Workload
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.testing import counting_engine

LENGTHS = ["--requests", "3", "--prompt-tokens", "4:9", "--output-tokens", "5:7"]
MACHINE = {
    "cpu": "abacus",
    "cores": 2,
    "memory_gb": 1.0,
    "has_amx": False,
    "device": "cpu",
    "read_gb_per_s": 12.5,
    "f32_tflop_per_s": 0.13,
    "bf16_tflop_per_s": 0.05,
}


@contextmanager
def counting_service() -> Iterator[Any]:
    """What the benchmarks use of a service, over an engine that counts."""
    tokenizer = byte_tokenizer()
    engine, _ = counting_engine(vocab_size=tokenizer.vocab_size)
    info = ModelInfo(
        name="counting",
        model_digest="0" * 64,
        vocab_size=tokenizer.vocab_size,
        dtype="int32",
        server_version="9.9",
    )
    engine.start()
    try:
        yield SimpleNamespace(
            engine=engine, text=TextEngine(engine, tokenizer, None), info=info, ready_seconds=0.0
        )
    finally:
        engine.stop()
    engine.check_integrity()


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and nobody else is there."""
    monkeypatch.setattr(machine, "measured", lambda: dict(MACHINE))
    monkeypatch.setattr(machine.OtherLoad, "cores", lambda self: 0.0)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_line(line: dict[str, Any], door: str) -> None:
    assert tuple(line) == KEYS
    assert line["door"] == door
    assert line["precision"] == "int32"
    assert line["workload"]["requests"] == 3
    assert line["output_tokens_per_s"] > 0
    for name in ("ttft_ms", "itl_ms"):
        assert tuple(line[name]) == ("p50", "p99")
        # Gaps are 0 when a double is so fast that an answer comes in one message.
        assert 0 <= line[name]["p50"] <= line[name]["p99"]
    assert line["ttft_ms"]["p50"] > 0
    assert tuple(line["phases_ms"]) == ("plan", "pack", "dispatch", "wait", "publish")
    assert 0 < line["padding_waste"] < 1
    assert line["compiles_after_ready"] == 0
    assert line["machine"] == {**MACHINE, "other_cores": 0.0}
    assert {"python", "jax", "jaxserve"} <= line["versions"].keys()


# -- the doors -------------------------------------------------------------------------------------


def test_serving_writes_a_line_for_every_run(tmp_path: Path) -> None:
    out = tmp_path / "lines"
    with counting_service() as service:
        server = ServerThread(service.text, service.info, ServerConfig(port=0))
        with server as address:
            words = ["--server", address, *LENGTHS, "--out", str(out)]
            serving.main([*words, "--concurrency", "2", "--runs", "2"])
            serving.main([*words, "--rate", "500"])
    lines = read_lines(out)
    for line in lines:
        check_line(line, "grpc")
    assert [line["workload"]["load"] for line in lines] == [
        "2 clients",
        "2 clients",
        "500 requests/s",
    ]
    assert lines[0]["versions"]["server"] == "9.9"


class Entered(SimpleNamespace):
    """A service that somebody else closes."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture
def offline_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``bench.offline`` gets an engine that counts instead of a model."""
    with counting_service() as service:
        monkeypatch.setattr(offline, "build", lambda config, report: Entered(**vars(service)))
        yield


@pytest.mark.usefixtures("offline_service")
@pytest.mark.parametrize("load", [[], ["--concurrency", "1"], ["--rate", "500"]])
def test_offline_writes_a_line_for_every_run(tmp_path: Path, load: list[str]) -> None:
    out = tmp_path / "lines"
    offline.main([*LENGTHS, *load, "--runs", "2", "--out", str(out)])
    lines = read_lines(out)
    assert len(lines) == 2
    for line in lines:
        check_line(line, "offline")


@pytest.mark.usefixtures("offline_service")
def test_offline_runs_the_workloads_of_a_file_and_holds_them_to_the_goals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def variant(first: int) -> dict[str, Any]:
        one = {"ids": [first, 4, 5], "text": "", "out": 6}
        return {"W1": [one], "W3": [one] * 4}

    file, out = tmp_path / "workload.json", tmp_path / "lines"
    file.write_text(json.dumps({"seed": 5, "variants": [variant(3), variant(9)]}))
    offline.main(["--workload", str(file), "--out", str(out)])
    lines = read_lines(out)
    assert [line["workload"]["name"] for line in lines] == ["W1", "W3"]
    assert [line["workload"]["load"] for line in lines] == ["at once", "32 clients"]
    said = capsys.readouterr().err
    assert "goal >= 25 on the stated machine, here >= 12.2 (39.89 ms x 25/12.5 GB/s + 0.2" in said
    assert "goal <= 150 on the stated machine, here <= 492.5 (139.3 ms x 25/12.5 GB/s + 2" in said


@pytest.mark.usefixtures("offline_service")
def test_answers_that_are_short_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = asking.Asking._note

    def lose_one(self: asking.Asking, output: Any, answer: common.Answer) -> None:
        note(self, output, answer)
        answer.tokens = min(answer.tokens, 4)

    monkeypatch.setattr(asking.Asking, "_note", lose_one)
    out = tmp_path / "lines"
    offline.main([*LENGTHS, "--out", str(out)])
    (line,) = read_lines(out)
    assert line["short"].endswith(" tokens")
    with pytest.raises(compare.IncomparableError, match=r"custom was short \(\d+ of \d+ tokens\)"):
        compare.read(out)


def test_a_run_that_is_cut_off_leaves_the_engine_idle() -> None:
    asks = [workloads.Ask([3, 4, 5], 50), workloads.Ask([6, 7], 5)]
    with counting_service() as service:
        (cut,) = asking.Asking(service.text, asks, "", arrivals_s=[0.0, 60.0], seconds=0.0).run()
        assert service.engine.idle
    assert cut.end_s == 0.0, "it was given up"
    assert cut.tokens == 0


def test_a_disturbed_run_is_thrown_away_while_retries_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cores = iter([0.5, 0.0, 0.9])
    monkeypatch.setattr(machine.OtherLoad, "cores", lambda self: next(cores))
    workload = Workload(name="two", requests=2, prompt_tokens=(3, 5), output_tokens=(4, 4))
    with counting_service() as service:
        door = offline.make_door(service)
        runs = list(common.runs(door, workload, MACHINE, count=2, retries=1))
    assert [run.line["machine"]["other_cores"] for run in runs] == [0.0, 0.9]
    assert "two: others used 0.50 cores meanwhile (limit 0.15)" in capsys.readouterr().err


# -- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_variants_have_equal_lengths_and_other_tokens(name: str) -> None:
    workload = PRESETS[name]
    first, second = workload.asks(0, 49_152), workload.asks(1, 49_152)
    assert len(first) == workload.requests
    assert first == workload.asks(0, 49_152)
    for ask, other in zip(first, second, strict=True):
        assert len(ask.prompt) == len(other.prompt)
        assert ask.output_tokens == other.output_tokens
        assert ask.prompt[:16] != other.prompt[:16]
        assert all(6144 <= token < 24_576 for token in ask.prompt)
    assert workload.asks(WARM_UP, 49_152)[0].prompt[:16] != first[0].prompt[:16]


def test_the_shared_prefix_is_shared() -> None:
    asks = PRESETS["shared-prefix"].asks(0, 49_152)
    assert len({tuple(ask.prompt[:512]) for ask in asks}) == 1
    assert len({tuple(ask.prompt[512:]) for ask in asks}) == len(asks) == 64


def test_arrivals_keep_their_rate() -> None:
    times = Load(rate=10.0).arrivals_s(2000, seed=3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200, rel=0.1)
    assert Load(clients=2).arrivals_s(2, seed=3) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "give one of --preset, --workload, and --requests with two lengths"),
        (["--preset", "together", "--requests", "3"], "give one of --preset"),
        (["--preset", "together", "--rate", "1"], "a preset says its own load"),
        (["--requests", "3"], "--requests, --prompt-tokens and --output-tokens go together"),
        (LENGTHS, "give --concurrency or --rate"),
        (["--prompt-tokens", "9:4"], "'9:4' is no range; write for example 64:512"),
    ],
)
def test_flags_that_choose_no_workload_are_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serving.main(["--server", "127.0.0.1:1", *words])
    assert complaint in capsys.readouterr().err


def test_a_workload_file_needs_a_variant_to_warm_up_and_the_names_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workload.json"
    file.write_text('{"variants": [{"W1": []}]}')
    with pytest.raises(ValueError, match="has 1 variants; one to measure and one to warm up"):
        workloads.read_file(file)
    one = {"ids": [3], "out": 1}
    file.write_text(json.dumps({"variants": [{"W1": [one]}, {"W1": [one]}]}))
    with pytest.raises(SystemExit):
        serving.main(["--server", "127.0.0.1:1", "--workload", str(file), "--only", "W1,W9"])
    assert "has no W9; it has ['W1']" in capsys.readouterr().err


# -- comparing -------------------------------------------------------------------------------------


def result(path: Path, rate: float, **changes: Any) -> Path:
    """Writes a result of one line, with some keys changed; dicts are merged."""
    workload = PRESETS["together"].describe("m")
    line: dict[str, Any] = {
        "workload": workload,
        "door": "offline",
        "precision": "float32",
        "output_tokens_per_s": rate,
        "ttft_ms": {"p50": 10.0, "p99": 20.0},
        "itl_ms": {"p50": 1.0, "p99": 2.0},
        "phases_ms": dict.fromkeys(common.PHASES, 0.5),
        "padding_waste": 0.0,
        "compiles_after_ready": 0,
        "commit": "c",
        "versions": {"jax": "1"},
        "machine": {**MACHINE, "other_cores": 0.0},
    }
    for key, value in changes.items():
        line[key] = {**line[key], **value} if isinstance(value, dict) else value
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path


def test_compare_prints_ratios_of_medians(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "a", tmp_path / "b"
    for rate in (90.0, 100.0, 500.0):
        result(before, rate)
    result(after, 150.0, precision="bfloat16", compiles_after_ready=2)
    compare.main([str(before), str(after)])
    said = capsys.readouterr().out
    assert said.splitlines()[1].split() == [
        "together",
        "output_tokens_per_s",
        "100",
        "150",
        "1.500",
    ]
    assert "note: together: precision float32 before, bfloat16 after" in said
    assert "note: together: after, 2 programs were compiled after ready" in said


def test_compare_points_at_disturbed_runs_and_drifting_machines(tmp_path: Path) -> None:
    before = result(tmp_path / "a", 1.0, machine={"other_cores": 0.7})
    after = result(tmp_path / "b", 1.0, machine={"read_gb_per_s": 20.0})
    said = compare.compare(compare.read(before), compare.read(after))
    assert "together: before, others used 0.7 cores; run it again" in said
    assert "the machine's read_gb_per_s was 12.5 before and 20 after" in said


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"workload": {"seed": 2}}, "together: workload seed is 1 and 2"),
        ({"workload": {"model": "n"}}, "together: workload model is 'm' and 'n'"),
        ({"machine": {"cpu": "other"}}, "together: machine cpu is 'abacus' and 'other'"),
        ({"workload": {"name": "clients"}}, "no workload is in both"),
        ({"short": "3 of 4 tokens"}, "together was short (3 of 4 tokens); run it again"),
    ],
)
def test_compare_refuses_what_is_not_the_same_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], complaint: str
) -> None:
    before = result(tmp_path / "a", 1.0)
    after = result(tmp_path / "b", 1.0, **changes)
    with pytest.raises(SystemExit) as ended:
        compare.main([str(before), str(after)])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "NOT COMPARABLE" in said
    assert complaint in said


def test_compare_refuses_a_file_without_usable_lines(tmp_path: Path) -> None:
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    empty.write_text("\n")
    with pytest.raises(compare.IncomparableError, match="holds no lines"):
        compare.read(empty)
    empty.write_text('{"bench": "host"}\n')
    with pytest.raises(compare.IncomparableError, match="a line without a workload"):
        compare.read(empty)
    result(mixed, 1.0)
    result(mixed, 1.0, door="grpc")
    with pytest.raises(compare.IncomparableError, match="mixes door offline and grpc"):
        compare.compare(compare.read(mixed), compare.read(mixed))


# -- parts alone -----------------------------------------------------------------------------------


def test_goals_scale_with_the_machine() -> None:
    """Half the bandwidth and a twentieth of the matrix rate, worked out by hand."""
    (together,) = offline.GOALS["together"]
    (whole,) = offline.GOALS["shared-prefix"]
    (long,) = offline.GOALS["long-prompt"]
    # (8.333 - 0.742 / 2.6) x 2 + 0.742 / 0.13 ms a token.
    assert together.scaled(MACHINE)[0] == pytest.approx(1e3 / 21.803, rel=1e-3)
    # (15 - 0.477) x 2 + 9.538 s, and (4 - 0.558) x 2 + 11.154 s.
    assert whole.scaled(MACHINE)[0] == pytest.approx(38.58, rel=1e-3)
    assert long.scaled(MACHINE)[0] == pytest.approx(18_038, rel=1e-3)
    run = Run({"output_tokens_per_s": 30.0}, 1.0)
    assert together.verdict(run, MACHINE).endswith("MISSED, 0.65 of what is asked")


def test_host_writes_a_line_for_each_kind_of_traffic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines"
    host.main(["--rows", "16", "--steps", "40", "--out", str(out)])
    lines = read_lines(out)
    assert [line["traffic"] for line in lines] == ["decode", "churn"]
    for line in lines:
        assert tuple(line["step_ms"]) == ("plan", "pack", "dispatch", "publish", "host")
    assert "decode: host" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        host.main(["--steps", "5000"])
    assert "answers end after 1984 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_frontend_delivers_every_token_to_clients_in_another_process(
    tmp_path: Path, door: str
) -> None:
    out = tmp_path / "line"
    frontend.main(["--door", door, "--rows", "4", "--seconds", "0.2", "--out", str(out)])
    (line,) = read_lines(out)
    assert line["delivered_tokens_per_s"] > 0
    assert 50 <= line["messages"] <= 4 * 50
    assert line["tokens_a_message"]["p50"] >= 1


def test_frontend_refuses_more_tokens_than_a_stream_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        frontend.main(["--seconds", "60"])
    assert "is 15000 tokens a stream; at most 2046" in capsys.readouterr().err


def test_the_listener_of_a_port_is_found() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert machine.listener_pid(f"127.0.0.1:{port}") == os.getpid()
    assert machine.listener_pid(f"127.0.0.1:{port}") is None
    assert machine.listener_pid("elsewhere.example:443") is None


def test_a_span_is_read() -> None:
    assert workloads.span("64:512") == (64, 512)
    assert workloads.span("7") == (7, 7)
    with pytest.raises(argparse.ArgumentTypeError, match="'0:4' is no range"):
        workloads.span("0:4")
