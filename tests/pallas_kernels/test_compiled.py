"""The GPU kernels compile for an H200 that is not there, and their machine code is as declared."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench.machine_code import (
    faults_of,
    kernels_of,
    large_copies,
    launches_of,
    loop_launches,
    more_than,
    table,
)
from pallas_kernels.compiling import CompileCase, all_cases

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".aot"
"""Where the Makefile puts the wheels of the extra ``aot-gpu``."""
NOT_INSTALLED = 3
"""The exit status without them of what compiles, which must not be imported here."""

CASE = CompileCase(
    name="decode",
    function=jnp.sin,
    arguments=(jax.ShapeDtypeStruct((8,), jnp.float32),),
    instructions=("HGMMA", "UTMALDG"),
    most_launches=3,
)
KERNEL = {
    "name": "attend",
    "registers": 168,
    "stack_bytes": 0,
    "spill_bytes": 0,
    "spills_between_products": 0,
    "shared_bytes": 2048,
    "instructions": {"HGMMA": 12, "UTMALDG": 2},
}
ROW: dict[str, Any] = {
    "kernels": [KERNEL],
    "launches": {"custom-call": 1, "fusion": 2},
    "temporary_bytes": 100,
    "aliased_bytes": 4096,
}


@pytest.mark.prove
@pytest.mark.timeout(1200)
def test_kernels_compile_for_an_h200_as_they_should() -> None:
    """A sample; `make prove-compile`, which CI runs, compiles all.

    In a process of its own: one that compiles for a GPU with dumps runs nothing on a CPU.
    """
    path = os.pathsep.join([str(ROOT), *([str(FETCHED)] if FETCHED.is_dir() else [])])
    ended = subprocess.run(
        [sys.executable, "-m", "bench.compiled", "--every", "10"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1180,
        check=False,
    )
    print(ended.stdout)
    if ended.returncode == NOT_INSTALLED:
        pytest.skip(f"no kernel was compiled: {ended.stderr.strip()}")
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--every", "0"], "argument --every: give a whole number above 0, got '0'"),
        (["--every", "-3"], "argument --every: give a whole number above 0, got '-3'"),
        (["--record", "--every", "2"], "of all cases: leave out --only and --every"),
        (["--record", "--only", "decode"], "of all cases: leave out --only and --every"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(words: list[str], said: str) -> None:
    ended = _python("-m", "bench.compiled", *words)
    assert ended.returncode == 2
    assert said in ended.stderr


@pytest.mark.slow
def test_dumps_go_to_a_directory_of_their_own_that_is_gone_at_the_end(tmp_path: Path) -> None:
    """Whatever the variable says: what is in it would be removed."""
    said = "import os, bench.compiled as c; print(c.DUMP, os.environ['MOSAIC_GPU_DUMP_TO'])"
    ended = _python("-c", said, MOSAIC_GPU_DUMP_TO=str(tmp_path))
    own, told = map(Path, ended.stdout.split())
    assert own == told != tmp_path
    assert not own.exists()


def _python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_cases_of_a_family_have_names_of_their_own() -> None:
    for family, cases in all_cases().items():
        names = [case.name for case in cases]
        assert len(names) == len(set(names)), family


def test_nothing_is_wrong_with_a_kernel_as_declared() -> None:
    assert faults_of(CASE, ROW, 4096) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spill_bytes": 68}, "attend spills 68 bytes"),
        ({"stack_bytes": 16}, "attend has a stack of 16 bytes"),
        ({"spills_between_products": 3}, "attend spills between its products"),
        ({"instructions": {"UTMALDG": 2}}, "no HGMMA is left"),
        ({"instructions": {"HGMMA": 2}}, "no UTMALDG is left"),
    ],
)
def test_a_worse_kernel_is_found(change: dict[str, Any], said: str) -> None:
    row = ROW | {"kernels": [KERNEL | change]}
    assert faults_of(CASE, row, 4096) == [said]


def test_a_copied_pool_is_found() -> None:
    assert faults_of(CASE, ROW | {"aliased_bytes": 0}, 4096) == [
        "0 of 4096 donated bytes stay in place"
    ]
    assert faults_of(CASE, ROW | {"temporary_bytes": 4096}, 4096) == [
        "4096 bytes of temporaries: is a pool copied?"
    ]


def test_more_launches_than_declared_are_found() -> None:
    [said] = faults_of(replace(CASE, most_launches=2), ROW, 4096)
    assert said == "launches {'custom-call': 1, 'fusion': 2}, and 2 in all are allowed"


def test_a_program_without_a_kernel_is_found() -> None:
    said = faults_of(replace(CASE, instructions=()), ROW | {"kernels": []}, 0)
    assert said == ["there is no Mosaic kernel in it, or another case has the same"]


def test_a_dump_is_read(tmp_path: Path) -> None:
    (tmp_path / "attend_0.ptxas").write_text(
        "ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem\n"
    )
    (tmp_path / "attend_0.resources.txt").write_text("Resources(smem_scratch_bytes=105472, x=0)\n")
    (tmp_path / "attend_0.sass_ctrl").write_text(
        "   -:1:-:Y:01        /*0a80*/                   @UP1 UTMALDG.5D [UR16], [UR26]\n"
        "   -:1:-:Y:01        /*0a90*/                   HGMMA.64x64x16.F32.BF16 R24, R4\n"
        "   -:1:-:Y:01        /*0a98*/                   LDL R3, [R1]\n"
        "   -:1:-:Y:01        /*0aa0*/                   HGMMA.64x64x16.F32.BF16 R24, R8\n"
    )
    assert kernels_of(tmp_path) == [
        {
            "name": "attend",
            "registers": 168,
            "stack_bytes": 8,
            "spill_bytes": 28,
            "spills_between_products": 1,
            "shared_bytes": 105472,
            "instructions": {"HGMMA": 2, "UTMALDG": 1},
        }
    ]


@pytest.mark.parametrize(
    "lost", ["stack frame", "spill stores", "spill loads", "registers", "smem_scratch_bytes"]
)
def test_a_dump_without_a_line_that_says_so_is_an_error(lost: str, tmp_path: Path) -> None:
    """Such as of another version of ptxas, whose silence is no zero."""
    said = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 168 registers\n"
    (tmp_path / "attend_0.ptxas").write_text(said.replace(lost, "?"))
    resources = "smem_scratch_bytes=8".replace(lost, "?")
    (tmp_path / "attend_0.resources.txt").write_text(resources)
    (tmp_path / "attend_0.sass_ctrl").write_text("")
    with pytest.raises(ValueError, match=rf"written of attend_0.ptxas has no .*{lost}"):
        kernels_of(tmp_path)


def test_launches_are_counted_in_the_entry_only() -> None:
    program = """
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} sine(%p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %call = (f32[8]{0}, s8[16]{0}) custom-call(%fusion), custom_call_target="mosaic_gpu_v2"
  %first = f32[8]{0} get-tuple-element(%call), index=0
  ROOT %copy = f32[8]{0} copy(%first)
}
"""
    assert launches_of(program) == {"copy": 1, "custom-call": 1, "fusion": 1}


LOOP = """
%body (p: (bf16[64,960], bf16[30,960,576])) -> (bf16[64,960]) {
  %p = (bf16[64,960]{1,0}, bf16[30,960,576]{2,1,0}) parameter(0)
  %w = bf16[30,960,576]{2,1,0} get-tuple-element(%p), index=1
  %dynamic_slice_fusion = (bf16[64,960]{1,0}, s8[64]{0}) fusion(%w), kind=kCustom, calls=%fused
  %loop_dynamic_slice_fusion.2 = bf16[1,960,576]{2,1,0} fusion(%w), kind=kLoop, calls=%slice
  %attend = (bf16[64,960]{1,0}, f32[8]{0}) custom-call(%w), custom_call_target="mosaic_gpu_v2"
  %all-reduce-start.1 = bf16[64,960]{1,0} all-reduce-start(%attend), to_apply=%add
  %all-reduce-done.1 = bf16[64,960]{1,0} all-reduce-done(%all-reduce-start.1)
  %dot = (f32[64,960]{1,0}, s8[9]{0}) custom-call(%w), custom_call_target="__cublas$lt$matmul"
  ROOT %copy.1 = bf16[64,960]{1,0} copy(%all-reduce-done.1)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %copy.7 = f32[8388608]{0} copy(%x)
}
"""


def test_launches_of_a_layer_are_those_of_the_loop_that_has_kernels() -> None:
    assert loop_launches(LOOP) == {
        "Mosaic kernel": 1,
        "all-reduce": 1,
        "copy": 1,
        "fusion": 1,
        "product": 2,
    }


@pytest.mark.parametrize("check", [loop_launches, lambda program: large_copies(program, 1)])
def test_a_program_whose_loop_has_no_kernel_is_an_error(check: Any) -> None:
    alone = LOOP.replace('"mosaic_gpu_v2"', '"other"')
    with pytest.raises(ValueError, match="no loop over layers calls a Mosaic kernel"):
        check(alone)
    entry = '\nENTRY %main {\n  %a = f32[8] custom-call(), custom_call_target="mosaic_gpu_v2"\n}\n'
    with pytest.raises(ValueError, match="no loop over layers calls a Mosaic kernel"):
        check(entry)


def test_numbers_of_4_bits_are_half_a_byte() -> None:
    [(size, _)] = large_copies(LOOP.replace("bf16[1,960,576]", "s4[1,960,577]"), 200_000)
    assert size == 960 * 577 // 2


def test_a_number_of_an_unknown_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="not known how many bits a f7 has"):
        large_copies(LOOP.replace("bf16[1,960,576]", "f7[1,960,576]"), 1)


def test_a_step_that_takes_more_than_it_may_is_found() -> None:
    row = {"launches_of_a_layer": {"Mosaic kernel": 2, "fusion": 16}, "temporary_bytes": 900}
    assert more_than(row, 18, 900) == []
    assert more_than(row, 17, 899) == [
        "a layer launches {'Mosaic kernel': 2, 'fusion': 16}, and 17 in all are allowed",
        "900 bytes of temporaries, and 899 are allowed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["compiled", "compiled_step"])
def test_without_the_compiler_the_exit_status_says_so(module: str) -> None:
    run = (
        "from jaxserve.planning import aot; aot.why_not = lambda *_: 'no wheels'; "
        f"import bench.{module} as program; raise SystemExit(program.main([]))"
    )
    ended = _python("-c", run)
    assert ended.returncode == NOT_INSTALLED, ended.stderr
    assert "no wheels; `make prove-compile` fetches what it takes" in ended.stderr


def test_a_matrix_that_is_copied_out_of_its_stack_is_found() -> None:
    [(size, line)] = large_copies(LOOP, 1_000_000)
    assert size == 960 * 576 * 2
    assert line.startswith("%loop_dynamic_slice_fusion.2 = bf16[1,960,576]")
    assert [size for size, _ in large_copies(LOOP, 100)] == [960 * 576 * 2, 64 * 960 * 2]


def test_the_table_has_a_line_for_each_kernel() -> None:
    row = ROW | {"kernels": [KERNEL | {"spill_bytes": 68}]}
    text = table({"attention: decode": row})
    assert text.splitlines()[-1] == (
        "| attention: decode | attend | 168 | 68 | 2 KiB | 12 HGMMA | 2 UTMALDG | 3 |"
    )
    assert "| Registers | Spills | Shared memory |" in text
    assert "No kernel spills" not in text
