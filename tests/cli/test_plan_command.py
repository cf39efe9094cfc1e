"""`jaxserve plan`: exit statuses, the keys of --json, and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.models.presets import PRESETS

pytestmark = pytest.mark.slow

KEYS = [
    *("fits", "model", "mesh", "device", "params", "weight_bytes_per_device"),
    *("quantization", "kv_bytes_per_token", "kv_tokens", "page_tokens", "pages_per_data_shard"),
    "sequences_guaranteed",
    *("sequences_expected", "temp_bytes_per_device", "temp_source", "flops_per_step"),
    *("hbm_bytes_per_step", "collective_bytes", "step_ms", "limit", "tokens_per_s_per_user"),
    *("tokens_per_s_total", "ttft_ms", "nearest_fit"),
]


def test_a_model_that_fits_exits_with_0_and_json_has_the_promised_keys(shell: Any) -> None:
    result = shell("plan", "dummy:llama-3.1-8b", "--device", "h200", "--mesh", "2x4", "--json")
    assert result.status == 0
    plan = json.loads(result.out)
    assert list(plan) == KEYS
    assert (plan["fits"], plan["mesh"], plan["device"]) == (True, "2x4", "h200")
    assert plan["temp_source"] == "estimated"
    assert plan["collective_bytes"].keys() == {"data", "tensor"}
    assert all(value is not None for value in plan.values())


def test_a_model_that_does_not_fit_exits_with_1_and_names_the_nearest_mesh(shell: Any) -> None:
    arguments = ["plan", "dummy:llama-3.3-70b", "--device", "h200"]
    result = shell(*arguments)
    assert result.status == 1
    assert "on 1x1 h200: does not fit; the nearest is 1x2\n" in result.out
    assert "MiB weights" in result.out
    assert "tokens/s" not in result.out
    plan = json.loads(shell(*arguments, "--json").out)
    assert list(plan) == KEYS
    assert (plan["fits"], plan["nearest_fit"], plan["step_ms"]) == (False, "1x2", None)


def test_perhaps_no_mesh_fits(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.planning.memory.MOST_DEVICES", 4)
    arguments = ["plan", "dummy:tiny-llama", "--device", "h200", "--kv-memory", "1KiB"]
    assert "does not fit; no mesh of up to 64 devices does" in shell(*arguments).out


def test_the_table_says_what_limits_a_step_and_what_is_padded(shell: Any) -> None:
    arguments = ["plan", "dummy:smollm2-135m", "--device", "l40s", "--tp", "2"]
    result = shell(*arguments, "--prompt-tokens", "128", "--output-tokens", "64")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0] == "dummy:smollm2-135m on 1x2 l40s: fits"
    table = {line[2:24].strip(): line[24:].split(None, 1) for line in lines[1:-1]}
    assert table["parameters"][0] == "134.5"
    assert table["sequences expected"] == ["64", "of 128 + 64 tokens"]
    assert "limited by link: memory" in table["step"][1]
    assert "  note: q_heads: 9 padded to 12 in 4 groups of 3" in lines
    assert "  device facts: NVIDIA L40S data sheet" in lines
    assert lines[-1].startswith("predicted, not measured")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["dummy:nope"], "there is no built-in model 'nope'"),
        (["./nowhere"], "is no file or directory here"),
        (["dummy:tiny-llama", "--device", "b300"], "of which nothing is known; choose h200"),
        (["dummy:tiny-llama", "--device", "h200", "--mesh", "8"], "--mesh 8: a mesh is written"),
        (["dummy:tiny-llama", "--device", "cpu", "--mesh", "3x5"], "needs 15 devices, 8 are"),
        (["dummy:tiny-llama", "--context-tokens", "1024"], "model's window is 512"),
        (["dummy:tiny-llama", "--prompt-tokens", "512"], "no sequence within 512 tokens"),
        (["dummy:tiny-llama", "--max-rows", "0"], "max_rows is 0"),
        (
            ["dummy:tiny-llama", "--kernels", "paged_attention=mosaic", "--device", "cpu"],
            "--kernels paged_attention=mosaic: no implementation of paged_attention accepts these "
            "arguments (tried mosaic): Mosaic kernels run on Hopper GPUs, and this program is for ",
        ),
        (["dummy:tiny-llama", "--quantization", "int8"], "the last axis of w_o (16) is not a mul"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(
    shell: Any, flags: list[str], message: str, tmp_path: Path
) -> None:
    result = shell("plan", *flags, "--cache-dir", tmp_path)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.out == ""


@pytest.mark.slow
def test_a_cpu_says_what_was_compiled(shell: Any) -> None:
    result = shell("plan", shell.model, "--json", *shell.flags)
    assert result.status == 0
    plan = json.loads(result.out)
    assert (plan["device"], plan["temp_source"]) == ("cpu", "compiled")
    assert plan["temp_bytes_per_device"] > 0


def test_quantized_weights_are_planned_as_a_launch_would_hold_them(shell: Any) -> None:
    """134.5 M: 28.3 of the embedding in 8.5 bits, norms in 16, the rest in 5."""
    arguments = ["plan", "dummy:smollm2-135m", "--device", "h200", "--quantization", "int4"]
    result = shell(*arguments)
    assert result.status == 0
    lines = [line.split() for line in result.out.splitlines()]
    (weights,) = (line[1:] for line in lines if line[0] == "weights")
    assert weights == ["96.5", "MB", "int4+int8,", "the", "rest", "bfloat16"]
    assert json.loads(shell(*arguments, "--json").out)["quantization"] == "int4+int8"


def test_a_config_is_all_that_is_read_of_a_model(shell: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PRESETS["tiny-llama"]))
    answers = []
    for model in (tmp_path, config, "dummy:tiny-llama"):
        result = shell("plan", model, "--device", "h200", "--json")
        assert result.status == 0, result.err
        answers.append(json.loads(result.out) | {"model": ""})
    assert answers[0] == answers[1] == answers[2]
