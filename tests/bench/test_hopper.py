"""The benchmark of the kernels for Hopper: its cases interpreted, its search, what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from bench.hopper import measure, search
from bench.hopper.kernels import Attention, Product, grid
from bench.hopper.run import KERNELS, main
from pallas_kernels.paged_attention.mosaic_config import rule
from pallas_kernels.quantized_matmul.mosaic_config import choose

RATES = {"copy_bytes_per_s": 1e9, "flops_per_s": 1e10}


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; its exit code and lines."""
    monkeypatch.setattr("bench.hopper.run.rates_here", lambda *, dry: RATES)

    def run(*words: str) -> tuple[int, list[dict[str, Any]]]:
        code = main(["--dry-run", *words])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "only"),
    [
        ("paged_attention", "'skew, 1 at 80, 1 at 8', 'model': 'tiny', 'pages': 'int4'"),
        ("paged_attention", "'prefill, 2 of 5 at 16', 'model': 'tiny', 'pages': 'bfloat16'"),
        ("quantized_matmul", "'1 rows', 'model': 'tiny', 'weights': 'int4/128'"),
        ("quantized_matmul", "'1 rows', 'model': 'tiny', 'weights': 'fp8', 'narrow': True"),
        ("quantized_matmul", "'1 rows', 'model': 'tiny', 'weights': 'int8/row', 'narrow': True"),
        ("rope_append", "'prefill, 2 of 5 at 16', 'model': 'tiny', 'pages': 'int8'"),
    ],
)
def test_a_kernel_is_compared_and_timed(kernel: str, only: str, dry_run: Any) -> None:
    code, (line,) = dry_run("--kernels", kernel, "--only", only)
    assert code == 0, line
    assert line["kernel"] == kernel
    assert 0 <= line["error"] < measure.TOLERANCE
    if kernel == "paged_attention":
        assert line["error"] > 0, "a softmax over more than one key is rounded"
    least, most = line["spread"]
    assert 0 < least <= line["microseconds"] <= most
    assert line["bytes"] > 0
    assert 0 <= line["share"] < 1


@pytest.mark.slow
def test_wrong_answers_are_said_and_not_timed(
    dry_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Product.step

    def wrong(self: Product, state: Any, layer: Any, implementation: str, config: Any) -> Any:
        found = step(self, state, layer, "reference", config)
        return found if implementation == "reference" else found | {"out": found["out"] * 1.1}

    monkeypatch.setattr(Product, "step", wrong)
    code, lines = dry_run("--kernels", "quantized_matmul", "--only", "'1 rows'")
    assert code == 1
    assert len(lines) == 5
    for line in lines:
        assert "answers are off by 0." in line["wrong"]
        assert "microseconds" not in line


def test_a_kernel_that_fails_only_in_a_loop_is_said(
    dry_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other cases go on."""

    def step(self: Product, state: Any, layer: Any, implementation: str, config: Any) -> Any:
        if not isinstance(layer, int):
            raise RuntimeError("no room for a loop")
        return state | {"out": state["out"] + 1}

    monkeypatch.setattr(Product, "step", step)
    code, lines = dry_run("--kernels", "quantized_matmul", "--only", "'1 rows'")
    assert code == 1
    assert [line["wrong"] for line in lines] == ["RuntimeError: no room for a loop"] * 5


@pytest.mark.parametrize("kernel", ["paged_attention", "quantized_matmul"])
def test_a_search_records_under_the_key_that_the_kernel_asks_for(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel is traced as in a program, as far as to where it looks its tiling up."""

    class AskedError(Exception):
        """Carries the problem's key."""

    def best_known(problem: Any, kind: str) -> None:
        raise AskedError(problem.key)

    monkeypatch.setattr(f"pallas_kernels.{kernel}.mosaic.best_known", best_known)
    searched = {}
    for case in grid(kernel, dry=False):
        searched.setdefault(search.PROBLEMS[type(case)](case).key, case)
    step = {"layer": 1, "implementation": "mosaic", "config": None}
    for key, case in searched.items():
        with measure.interpreted(), pytest.raises(AskedError) as asked:
            jax.eval_shape(partial(case.step, **step), jax.eval_shape(case.state))
        assert str(asked.value) == key, case.label
    if kernel == "quantized_matmul":
        activations = {key.split()[2] for key in searched}
        assert activations == {"bfloat16", "float16", "int8", "float8_e4m3fn"}


def test_what_the_budget_leaves_out_is_counted(dry_run: Any) -> None:
    code, lines = dry_run("--budget-s", "1e-9")
    assert code == 0
    assert [line["kernel"] for line in lines] == list(KERNELS)
    assert all(line["left_out"] > 1 for line in lines)


@pytest.mark.slow
def test_a_search_records_the_fastest_tiling(dry_run: Any, tmp_path: Path) -> None:
    only = "'1 rows', 'model': 'tiny', 'weights': 'fp8', 'narrow': True"
    words = ("--kernels", "quantized_matmul", "--only", only)
    code, (line,) = dry_run(*words, "--search", "--configs", str(tmp_path))
    assert code == 0, line
    assert line["tried"] == search.DRY_CANDIDATES < line["of"]
    recorded = json.loads((tmp_path / "quantized_matmul" / "configs.json").read_text())
    assert recorded == {"cpu": {line["key"]: line["config"]}}
    search.record(tmp_path / "quantized_matmul" / "configs.json", "other", "key", {"tokens": 8})
    kept = json.loads((tmp_path / "quantized_matmul" / "configs.json").read_text())
    assert kept == recorded | {"other": {"key": {"tokens": 8}}}


def test_every_problem_has_the_rule_first_and_others_that_fit() -> None:
    for kernel in ("paged_attention", "quantized_matmul"):
        for case in grid(kernel, dry=False):
            problem = search.PROBLEMS[type(case)](case)
            first, *others = search.CANDIDATES[type(case)](case)
            assert first == (rule(problem) if isinstance(case, Attention) else choose(problem))
            assert len(others) > 3, case.label
            assert not [config for config in others if problem.why_not(config)], case.label


def test_every_case_fits_a_gpu_and_no_round_fits_its_cache() -> None:
    for kernel in KERNELS:
        for case in grid(kernel, dry=False):
            assert case.moved < 8e9
            if kernel != "rope_append":
                assert 100e6 < case.moved * case.layers < 20e9, case.label


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--kernels", "lunch"], "there is no kernel lunch"),
        (["--budget-s", "0"], "--budget-s is 0; give seconds above 0"),
        (["--dry-run", "--search"], "give --configs FOLDER"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert problem in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Hopper GPUs, and this program is for cpu; try --dry-run" in capsys.readouterr().err
